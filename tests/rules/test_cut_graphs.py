"""Functions that declare no second derivative are refused, not differentiated wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from secorder_func import (
    CurvatureFallbackWarning,
    NoExactRouteError,
    finite_difference_hvp,
    hessian_operator,
    hvp,
)
from tests import oracles

P, V = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 2.0, -1.0]).double()
MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]


class OnceCube(torch.autograd.Function):
    """x**3 with a backward that cannot be differentiated."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class PlainCube(torch.autograd.Function):
    """Without `setup_context`, which torch.func asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(torch.autograd.Function):
    """x**3 with a backward that can be differentiated, and no forward rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_a_once_differentiable_function_has_no_exact_route() -> None:
    with pytest.raises(NoExactRouteError, match=r"OnceCube.*once_differentiable"):
        hvp(lambda p: OnceCube.apply(p).sum())(P, V)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_named_mode_refuses_it_too(mode: Any) -> None:
    reason = (
        r"custom autograd.Function" if mode == "reverse_over_forward" else "once_differentiable"
    )
    with pytest.raises(RuntimeError, match=reason):
        hvp(lambda p: OnceCube.apply(p).sum(), mode=mode)(P, V)


def test_an_operator_refuses_it_too() -> None:
    with pytest.raises(NoExactRouteError, match=r"OnceCube.*once_differentiable"):
        hessian_operator(lambda p: OnceCube.apply(p).sum(), P)


def test_a_twice_differentiable_function_of_the_users_own_is_exact() -> None:
    f = lambda p: (Cube.apply(p) ** 2).sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode="reverse_over_reverse")(P, V), oracles.hvp(f, P, V))


def test_a_function_that_torch_func_refuses_goes_to_double_backward_and_says_so() -> None:
    f = lambda p: (PlainCube.apply(p) ** 2).sum()  # noqa: E731
    with pytest.warns(CurvatureFallbackWarning, match="setup_context.*Took double_backward"):
        hv = hvp(f)(P, V)
    oracles.assert_same(hv, oracles.hvp(f, P, V))
    oracles.assert_same(hvp(f, mode="double_backward")(P, V), oracles.hvp(f, P, V))


def test_so_does_its_operator_once_with_the_mode_on_it() -> None:
    f = lambda p: (PlainCube.apply(p) ** 2).sum()  # noqa: E731
    with pytest.warns(CurvatureFallbackWarning) as caught:
        op = hessian_operator(f, P)
    oracles.assert_same(op.dense(), oracles.hessian(f, P))
    assert op.mode == "double_backward"
    assert len(caught) == 1


def test_its_product_can_be_differentiated_again() -> None:
    p = P.clone().requires_grad_()
    f = lambda p: PlainCube.apply(p).sum()  # noqa: E731
    product = hvp(f, mode="double_backward")(p, V)
    oracles.assert_same(torch.autograd.grad(product.sum(), p)[0], 6 * V)


def test_inside_vmap_the_error_tells_the_way_out() -> None:
    with pytest.raises(NoExactRouteError, match=r"setup_context.*hessian_operator\(\.\.\.\)\.mm"):
        torch.func.vmap(lambda v: hvp(lambda p: PlainCube.apply(p).sum())(P, v))(V[None])
    with pytest.raises(NoExactRouteError, match="plain autograd does not work inside vmap"):
        torch.func.vmap(lambda v: hvp(torch.sum, mode="double_backward")(P, v))(V[None])


def test_checkpointing_which_torch_func_lacks_goes_to_double_backward() -> None:
    f = lambda p: checkpoint(lambda q: torch.sin(q**2), p, use_reentrant=False).sum()  # noqa: E731
    with pytest.warns(CurvatureFallbackWarning, match="saved tensor hooks"):
        hv = hvp(f)(P, V)
    oracles.assert_same(hv, 2 * torch.cos(P**2) * V - 4 * P**2 * torch.sin(P**2) * V)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpoint's own
def test_reentrant_checkpointing_is_refused() -> None:
    def f(p: Tensor) -> Tensor:
        return checkpoint(lambda q: torch.sin(q**2), p, use_reentrant=True).sum()

    with pytest.raises(NoExactRouteError, match="use_reentrant=False"):
        hvp(f)(P, V)


def test_differences_of_what_only_plain_autograd_differentiates() -> None:
    f = lambda p: PlainCube.apply(p).sum()  # noqa: E731
    oracles.assert_same(finite_difference_hvp(f)(P, V), 6 * P * V, 1e-8)


def test_differences_of_a_once_differentiable_function() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * g

    oracles.assert_same(finite_difference_hvp(lambda p: Once.apply(p).sum())(P, V), 6 * P * V, 1e-8)
