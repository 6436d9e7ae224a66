"""Autocast around a call and inside the loss.

The answer in the same precision is plain double backward under the same autocast. Both are also compared with float64:
the products must be as near to it as a few roundings of the half-precision type.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secorder_func import functional_loss, hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from tests import oracles
from tests.situations.entries import (
    ENTRIES,
    GAUSS_NEWTON,
    Case,
    double_backward,
    every_entry,
    gauss_newton,
)
from tests.versions import BEFORE_2_10

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _networks() -> dict[str, Callable[[], Case]]:
    def labels(count: int) -> Tensor:
        return torch.arange(count) % 3

    def mlp() -> Case:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        return Case(model, F.mse_loss, torch.randn(10, 6), torch.randn(10, 3))

    def layer_norm() -> Case:
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        return Case(model, F.cross_entropy, torch.randn(10, 6), labels(10))

    def batch_norm() -> Case:
        body = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*body, nn.Linear(18, 3))
        return Case(model, F.cross_entropy, torch.randn(6, 1, 5, 5), labels(6))

    def group_norm() -> Case:
        model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3))
        return Case(model, F.cross_entropy, torch.randn(10, 6), labels(10))

    def shared_layer() -> Case:
        layer = nn.Linear(6, 6)  # its weight is cast once and used twice
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))
        return Case(model, F.cross_entropy, torch.randn(10, 6), labels(10))

    def encoder() -> Case:
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True
        )
        model = nn.Sequential(nn.Linear(6, 8), layer, nn.Flatten(), nn.Linear(24, 3))
        return Case(model, F.cross_entropy, torch.randn(4, 3, 6), labels(4))

    return {f.__name__: f for f in (mlp, layer_norm, batch_norm, group_norm, shared_layer, encoder)}


class Autocast(nn.Module):
    """A module whose forward runs under autocast, as a mixed-precision training script writes it."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.inner(x)


def _built(name: str) -> Case:
    torch.manual_seed(0)
    return _networks()[name]()


def _in_float64(name: str) -> Case:
    case = _built(name)
    y = case.y.double() if case.y.is_floating_point() else case.y
    return Case(case.model.double(), case.loss_fn, case.x.double(), y)


def _assert_close(product: Any, name: str, dtype: torch.dtype, v: Any, half: Any) -> None:
    exact = double_backward(_in_float64(name), [t.double() for t in v])
    allowed = 16 * ROUNDING[dtype]
    assert oracles.relative_error(half, exact) < allowed  # the oracle itself
    assert oracles.relative_error(product, exact) < allowed
    assert oracles.relative_error(product, half) < allowed
    assert all(h.dtype == torch.float32 for h in product)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", _networks())
@every_entry
def test_autocast_inside_the_loss(entry: str, name: str, dtype: torch.dtype) -> None:
    if name == "mlp" and BEFORE_2_10:
        pytest.skip(
            "double backward of mse_loss under autocast, the oracle, fails before torch 2.10"
        )
    case = _built(name)
    case = Case(Autocast(case.model, dtype), case.loss_fn, case.x, case.y)
    v = case.vector()
    _assert_close(ENTRIES[entry](case, v), name, dtype, v, double_backward(case, v))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", _networks())
@every_entry
def test_autocast_around_the_call(entry: str, name: str, dtype: torch.dtype) -> None:
    case = _built(name)
    v = case.vector()
    half = double_backward(case, v, torch.autocast("cpu", dtype=dtype))
    with torch.autocast("cpu", dtype=dtype):
        product = ENTRIES[entry](case, v)
        again = ENTRIES[entry](case, v)
    _assert_close(product, name, dtype, v, half)
    assert all(torch.equal(a, b) for a, b in zip(product, again, strict=True))


@pytest.mark.parametrize("entry", GAUSS_NEWTON)
def test_gauss_newton_products_under_autocast(entry: str) -> None:
    case = _built("layer_norm")
    half = Case(Autocast(case.model, torch.bfloat16), case.loss_fn, case.x, case.y)
    v = case.vector()
    product = GAUSS_NEWTON[entry](half, v)
    exact = gauss_newton(_in_float64("layer_norm"), [t.double() for t in v])
    assert oracles.relative_error(product, exact) < 16 * ROUNDING[torch.bfloat16]


@every_entry
def test_a_training_step_in_the_same_autocast_is_as_if_there_had_been_no_product(
    entry: str,
) -> None:
    case = _built("shared_layer")
    v = case.vector()

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(case.closure(), case.params))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ENTRIES[entry](case, v)
        found = gradient()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class WithTarget(nn.Module):
    """A loss against its own frozen output: the weights are cast under no_grad first, then with gradients."""

    def __init__(self, inner: nn.Module, autocast: Any) -> None:
        super().__init__()
        self.inner, self.autocast = inner, autocast

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast:
            with torch.no_grad():
                target = self.inner(x)
            return (self.inner(x) - target + 1).square().mean()


@pytest.mark.parametrize("made", ["beforehand", "inside"])
@every_entry
def test_a_cast_made_under_no_grad_is_not_taken_for_a_constant_afterwards(
    entry: str, made: str
) -> None:
    case, exact = _built("mlp"), _in_float64("mlp")

    class Fresh:
        def __enter__(self) -> None:
            self.context = torch.autocast("cpu", dtype=torch.bfloat16)
            self.context.__enter__()

        def __exit__(self, *exc: Any) -> None:
            self.context.__exit__(*exc)

    autocast = Fresh() if made == "inside" else torch.autocast("cpu", dtype=torch.bfloat16)
    half = Case(WithTarget(case.model, autocast), lambda loss, _: loss, case.x)
    plain = WithTarget(exact.model, torch.autocast("cpu", enabled=False))
    v = half.vector()
    truth = double_backward(Case(plain, lambda loss, _: loss, exact.x), [t.double() for t in v])
    assert oracles.relative_error(ENTRIES[entry](half, v), truth) < 16 * ROUNDING[torch.bfloat16]


@every_entry
def test_an_autocast_around_many_products_keeps_none_of_their_casts(entry: str) -> None:
    case = _built("mlp")
    v = case.vector()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ENTRIES[entry](case, v)
        before = alive()
        for _ in range(5):
            ENTRIES[entry](case, v)
        assert alive() <= before


@every_entry
def test_the_state_of_autocast_is_left_as_it_was(entry: str) -> None:
    case = _built("mlp")
    half = Case(Autocast(case.model, torch.float16), case.loss_fn, case.x, case.y)

    def state() -> tuple[Any, ...]:
        enabled = torch.is_autocast_enabled("cpu")
        return enabled, torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    before = state()
    ENTRIES[entry](half, case.vector())
    assert state() == before
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        before = state()
        ENTRIES[entry](half, case.vector())
        assert state() == before


def test_attention_under_autocast_is_that_of_the_math_kernel() -> None:
    w = 0.4 * torch.randn(2, 3, 4, 8)
    v = torch.randn_like(w)

    def loss(p: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = p @ p.transpose(-1, -2) @ p
            return F.scaled_dot_product_attention(h, h, h).float().square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.functional.hvp(lambda p: _in_double(p), w.double(), v.double())[1]
    for product in (hvp(loss)(w, v), hessian_operator(loss, w) @ v):
        assert oracles.relative_error(product, truth) < 16 * ROUNDING[torch.bfloat16]
    leaf = w.clone().requires_grad_()
    product = exact_hvp(lambda: loss(leaf), [leaf], v)
    assert oracles.relative_error(product, truth) < 16 * ROUNDING[torch.bfloat16]


def _in_double(p: Tensor) -> Tensor:
    h = p @ p.transpose(-1, -2) @ p
    return F.scaled_dot_product_attention(h, h, h).square().sum()


def test_functional_loss_of_an_autocast_module_keeps_float32_parameters() -> None:
    case = _built("mlp")
    _, params = functional_loss(Autocast(case.model, torch.bfloat16), case.loss_fn)
    assert {p.dtype for p in params.values()} == {torch.float32}
