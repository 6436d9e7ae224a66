"""Functions that declare no second derivative are refused, not differentiated wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from secorder_func import NoExactRouteError, hessian_operator, hvp
from tests import oracles

P, V = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 2.0, -1.0]).double()
MODES = ["auto", "forward_over_reverse", "reverse_over_reverse"]


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
    with pytest.raises(RuntimeError, match=r"OnceCube.*once_differentiable"):
        hvp(lambda p: OnceCube.apply(p).sum(), mode=mode)(P, V)


def test_an_operator_refuses_it_too() -> None:
    with pytest.raises(NoExactRouteError, match=r"OnceCube.*once_differentiable"):
        hessian_operator(lambda p: OnceCube.apply(p).sum(), P)


def test_a_twice_differentiable_function_of_the_users_own_is_exact() -> None:
    f = lambda p: (Cube.apply(p) ** 2).sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode="reverse_over_reverse")(P, V), oracles.hvp(f, P, V))


def test_checkpointing_which_torch_func_lacks_is_refused_with_the_cause() -> None:
    f = lambda p: checkpoint(lambda q: torch.sin(q**2), p, use_reentrant=False).sum()  # noqa: E731
    with pytest.raises(NoExactRouteError, match="saved tensor hooks"):
        hvp(f)(P, V)
