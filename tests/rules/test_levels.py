"""Derivatives inside the loss and outside of the product: the rules look at the levels that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

from secorder_func import NoExactRouteError, hessian_operator, hvp
from tests import oracles

MODES: list[Any] = ["auto", "forward_over_reverse", "reverse_over_reverse"]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


X, P, V = _rand(5, 3), _rand(9, 6)[:3], _rand(9, 6)[3:6]


def _written_out(h: Tensor, dims: Any) -> Tensor:
    c = h - h.mean(dims, keepdim=True)
    return c / (c.square().mean(dims, keepdim=True) + 1e-5).sqrt()


NORMS: dict[str, Any] = {
    "F.layer_norm": (lambda h: F.layer_norm(h, (6,)), lambda h: _written_out(h, -1)),
    "torch.layer_norm": (lambda h: torch.layer_norm(h, (6,)), lambda h: _written_out(h, -1)),
    "F.batch_norm": (
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: _written_out(h, 0),
    ),
    "torch.batch_norm": (
        lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        lambda h: _written_out(h, 0),
    ),
    "F.instance_norm": (
        lambda h: F.instance_norm(h.reshape(5, 2, 3)),
        lambda h: _written_out(h.reshape(5, 2, 3), -1),
    ),
}


def _penalty_by_grad(norm: Any) -> Any:
    def f(p: Tensor) -> Tensor:
        return grad(lambda x: torch.tanh(norm(x @ p)).sum())(X).square().sum()

    return f


def _penalty_by_jvp(norm: Any) -> Any:
    def f(p: Tensor) -> Tensor:
        return jvp(lambda x: torch.tanh(norm(x @ p)), (X,), (X.flip(0),))[1].square().sum()

    return f


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("penalty", [_penalty_by_grad, _penalty_by_jvp])
@pytest.mark.parametrize("name", NORMS)
def test_a_loss_that_differentiates_a_norm_is_exact(name: str, penalty: Any, mode: Any) -> None:
    norm, written_out = NORMS[name]
    expected = oracles.hvp(penalty(written_out), P, V)
    oracles.assert_same(hvp(penalty(norm), mode=mode)(P, V), expected, 1e-9)


@pytest.mark.parametrize("name", ["torch.layer_norm", "torch.batch_norm"])
def test_third_derivatives_through_the_direct_functions_are_right(name: str) -> None:
    norm, written_out = NORMS[name]
    weights = _rand(5, 6)

    def form(n: Any) -> Any:
        return lambda p: (hvp(lambda q: (torch.sin(n(X @ q)) * weights).sum())(p, V) * V).sum()

    oracles.assert_same(grad(form(norm))(P), grad(form(written_out))(P), 1e-9)


def _through_no_grad(p: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 2 * p
    return (scale * p**3).sum()


@pytest.mark.parametrize("mode", MODES)
def test_no_grad_inside_the_loss_stops_an_outer_jvp_too(mode: Any) -> None:
    p, v = torch.tensor([0.5, 1.0, -2.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    product = hvp(_through_no_grad, mode=mode)
    by_grad = torch.autograd.functional.jacobian(
        lambda q: oracles_third(q, v), p, create_graph=False
    )
    found = jvp(lambda q: product(q, v), (p,), (v,))[1]
    oracles.assert_same(found, by_grad @ v, 1e-10)
    op_product = jvp(lambda q: hessian_operator(_through_no_grad, q) @ v, (p,), (v,))[1]
    oracles.assert_same(op_product, by_grad @ v, 1e-10)


def oracles_third(q: Tensor, v: Tensor) -> Tensor:
    """Return H v of the loss above from the formula: the scale is a constant of value 2 q."""
    return 6 * (2 * q).detach() * q * v


def test_an_outer_jvp_through_a_wrong_forward_rule_is_refused() -> None:
    index = torch.tensor([0, 0, 1, 1])

    def f(q: Tensor) -> Tensor:
        out = torch.zeros(2).double()
        return out.scatter_reduce(0, index, q, "prod", include_self=False).sin().sum()

    p, v = torch.tensor([0.5, 1.0, -2.0, 0.3]).double(), torch.ones(4).double()
    with pytest.raises(NoExactRouteError, match="scatter_reduce"):
        jvp(lambda q: hvp(f)(q, v), (p,), (v,))
