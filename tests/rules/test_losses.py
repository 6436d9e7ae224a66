"""Losses that torch cannot differentiate forward over reverse: repaired, left to reverse mode, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import (
    CurvatureFallbackWarning,
    NoExactRouteError,
    ggnvp,
    hessian_operator,
    hvp,
    hvp_and_grad,
)
from tests import oracles
from tests.versions import BEFORE_2_10

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
_g = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, dtype=torch.float64, generator=_g)
Y = torch.randn(6, dtype=torch.float64, generator=_g)
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0]).double()
P = torch.randn(4, dtype=torch.float64, generator=_g)
V = torch.randn(4, dtype=torch.float64, generator=_g)
IMAGE = torch.randn(2, 4, dtype=torch.float64, generator=_g)


def _with(loss: Callable[..., Tensor], *rest: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda p: loss(torch.tanh(X @ p), *rest, **options)


# -------------------------------------------------------------------------------------- mse_loss


def test_raw_forward_over_reverse_raises_on_the_mean_of_squares() -> None:
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        torch.func.jvp(torch.func.grad(_with(F.mse_loss, Y)), (P,), (V,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_loss_with_a_constant_target_is_exact(reduction: str, mode: Any) -> None:
    f = _with(F.mse_loss, Y, reduction=reduction)
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
def test_mse_loss_without_reduction_is_exact(mode: Any) -> None:
    f = lambda p: (F.mse_loss(torch.tanh(X @ p), Y, reduction="none") ** 2).sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
def test_mse_loss_with_both_sides_depending_on_the_parameters_is_exact(mode: Any) -> None:
    f = lambda p: F.mse_loss(torch.tanh(X @ p), (X**2) @ p**2)  # noqa: E731
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", ["auto", "reverse_over_reverse"])
def test_mse_loss_with_weights_is_exact(mode: Any) -> None:
    f = _with(F.mse_loss, Y, weight=torch.rand(6).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureFallbackWarning)
        oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
def test_mse_loss_with_mismatched_shapes_gives_torchs_own_warning(mode: Any) -> None:
    f = _with(F.mse_loss, Y[:, None])
    with pytest.warns(UserWarning, match="target size .* different to the input size"):
        hv = hvp(f, mode=mode)(P, V)
    with pytest.warns(UserWarning, match="target size"):
        expected = oracles.hvp(f, P, V)
    oracles.assert_same(hv, expected)


def test_mse_loss_refuses_an_unknown_reduction_as_torch_does() -> None:
    with pytest.raises(ValueError, match="median is not a valid value for reduction"):
        hvp(_with(F.mse_loss, Y, reduction="median"))(P, V)


# ----------------------------------------------------------------- exact, but only in reverse mode

REVERSE_ONLY: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "ormqr": (
        lambda p: torch.ormqr(torch.eye(4).double() + p, p.tanh(), X.T).sin().sum(),
        "ormqr",
    ),
    "grid_sample": (
        lambda p: (
            F.grid_sample(
                torch.outer(p, p)[None, None],
                torch.tanh(IMAGE).reshape(1, 2, 2, 2),
                align_corners=False,
            )
            .sin()
            .sum()
        ),
        "grid_sampler_2d",
    ),
}
if BEFORE_2_10:  # torch differentiates it once
    del REVERSE_ONLY["grid_sample"]


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_raw_forward_over_reverse_raises(name: str) -> None:
    f, operator = REVERSE_ONLY[name]
    with pytest.raises(NotImplementedError, match=operator):
        torch.func.jvp(torch.func.grad(f), (P,), (V,))


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_auto_falls_back_with_one_warning_that_names_the_cause(name: str, transform: Any) -> None:
    f, operator = REVERSE_ONLY[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transform(f)(P, V)
    assert [w.category for w in caught] == [CurvatureFallbackWarning]
    text = str(caught[0].message)
    assert text.startswith(f"{transform.__name__}: no forward_over_reverse")
    assert operator in text
    assert "reverse_over_reverse" in text


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_the_warning_points_at_the_callers_line(name: str) -> None:
    f, _ = REVERSE_ONLY[name]
    with pytest.warns(CurvatureFallbackWarning) as caught:
        hvp(f)(P, V)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_the_fallback_is_exact(name: str) -> None:
    f, _ = REVERSE_ONLY[name]
    with pytest.warns(CurvatureFallbackWarning):
        hv = hvp(f)(P, V)
    oracles.assert_same(hv, oracles.hvp(f, P, V))


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_naming_reverse_mode_is_exact_and_silent(name: str) -> None:
    f, _ = REVERSE_ONLY[name]
    oracles.assert_same(hvp(f, mode="reverse_over_reverse")(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_naming_forward_mode_raises(name: str) -> None:
    f, operator = REVERSE_ONLY[name]
    with pytest.raises(RuntimeError, match=operator):
        hvp(f, mode="forward_over_reverse")(P, V)


def test_ggnvp_falls_back_with_one_warning_and_is_exact() -> None:
    model = lambda p, x: torch.ormqr(torch.eye(4).double(), p.tanh(), x.T)  # noqa: E731
    loss = lambda z, y: (z.sum(0) - y).square().sum()  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gv = ggnvp(model, loss)(P, V, X, Y)
    assert [w.category for w in caught] == [CurvatureFallbackWarning]
    assert str(caught[0].message).startswith("ggnvp: ")
    oracles.assert_same(gv, oracles.ggn(model, loss, P, X, Y) @ V)


def test_an_operator_takes_reverse_mode_first_and_need_not_warn() -> None:
    f, _ = REVERSE_ONLY["ormqr"]
    oracles.assert_same(hessian_operator(f, P) @ V, oracles.hvp(f, P, V))


# -------------------------------------------------------------------- no exact second derivative

TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])
LABELS = torch.tensor([[0, 2, -1, -1]] * 6)

NO_ROUTE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a kernel called directly": (
        lambda p: torch.ops.aten.multi_margin_loss(X @ p[:, None].tanh() * p, TARGETS).sin(),
        "multi_margin_loss",
    ),
    "another one": (
        lambda p: torch.ops.aten.multilabel_margin_loss(X @ p.diag().tanh(), LABELS).sin(),
        "multilabel_margin_loss",
    ),
}


@pytest.mark.parametrize("make", [hvp, hvp_and_grad])
@pytest.mark.parametrize("name", NO_ROUTE)
def test_where_torch_has_no_route_the_error_names_the_operator_and_the_way_out(
    name: str, make: Any
) -> None:
    f, operator = NO_ROUTE[name]
    with pytest.raises(NoExactRouteError, match=f"^{make.__name__}: .*{operator}") as caught:
        make(f)(P, V)
    assert "finite_difference_hvp" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("name", NO_ROUTE)
def test_an_operator_of_such_a_loss_is_refused_when_it_is_made_or_used(name: str) -> None:
    f, operator = NO_ROUTE[name]
    with pytest.raises(NoExactRouteError, match=operator):
        hessian_operator(f, P) @ V


@pytest.mark.parametrize("name", NO_ROUTE)
def test_such_a_loss_is_refused_also_at_parameters_that_require_gradients(name: str) -> None:
    f, operator = NO_ROUTE[name]
    with pytest.raises(NoExactRouteError, match=operator):
        hvp(f)(P.clone().requires_grad_(), V)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", NO_ROUTE)
def test_a_named_mode_raises_an_error_that_names_the_operator(name: str, mode: Any) -> None:
    f, operator = NO_ROUTE[name]
    with pytest.raises(RuntimeError, match=operator):
        hvp(f, mode=mode)(P, V)
