"""What stops gradients in eager torch stops second derivatives too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import ggnvp, hessian_operator, hvp
from tests import oracles

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
P, V = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 2.0, -1.0]).double()


def _no_grad(p: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (p**2).sum()
    return scale * (p**3).sum()


def _set_grad_enabled(p: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = (p**2).sum()
    return scale * (p**3).sum()


@torch.no_grad()
def _decorated(p: Tensor) -> Tensor:
    return (p**2).sum()


def _enabled_again(p: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (p**2).sum()
        with torch.enable_grad():
            cubes = (p**3).sum()
    return scale * cubes


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": _no_grad,
    "set_grad_enabled": _set_grad_enabled,
    "decorator": lambda p: _decorated(p) * (p**3).sum(),
    "enable_grad inside": _enabled_again,
    "data": lambda p: (p.data**2).sum() * (p**3).sum(),
    "data of an intermediate": lambda p: ((2 * p).data ** 2).sum() * (p**3).sum(),
    "detach": lambda p: (p.detach() ** 2).sum() * (p**3).sum(),
}


@pytest.mark.parametrize("name", ["no_grad", "set_grad_enabled", "decorator", "data"])
def test_raw_forward_over_reverse_is_silently_wrong(name: str) -> None:
    f = STOPS[name]
    _, raw = torch.func.jvp(torch.func.grad(f), (P,), (V,))
    assert oracles.relative_error(raw, oracles.hvp(f, P, V)) > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STOPS)
def test_hvp_equals_double_backward(name: str, mode: Any) -> None:
    f = STOPS[name]
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STOPS)
def test_operators_equal_double_backward(name: str, mode: Any) -> None:
    f = STOPS[name]
    oracles.assert_same(hessian_operator(f, P, mode=mode).dense(), _dense(f))


def _dense(f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the matrix whose products double backward gives."""
    return torch.stack([oracles.hvp(f, P, e) for e in torch.eye(3).double()], dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STOPS)
def test_ggnvp_equals_the_dense_product(name: str, mode: Any) -> None:
    f = STOPS[name]
    model = lambda p, x: torch.stack([f(p), p.sum()])  # noqa: E731
    loss = lambda z, y: (z**4).sum()  # noqa: E731
    gv = ggnvp(model, loss, mode=mode)(P, V, None, None)
    oracles.assert_same(gv, oracles.ggn(model, loss, P, None, None) @ V)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_is_on_again_after_an_error_under_no_grad(mode: Any) -> None:
    def f(p: Tensor) -> Tensor:
        with torch.no_grad():
            raise ArithmeticError("the user's own")

    with pytest.raises(ArithmeticError):
        hvp(f, mode=mode)(P, V)
    assert torch._C._is_fwd_grad_enabled()
    assert torch.is_grad_enabled()
