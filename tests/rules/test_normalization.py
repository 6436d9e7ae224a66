"""Normalisation: second derivatives on the fused kernels, third ones on formulas that are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import hvp
from tests import oracles

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
_g = torch.Generator().manual_seed(1)
X = torch.randn(4, 3, 5, dtype=torch.float64, generator=_g)
MEAN, VAR = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.5, 1.5, 2.0]).double()
P = {
    "shift": torch.randn(3, 5, dtype=torch.float64, generator=_g),
    "weight": torch.randn(3, dtype=torch.float64, generator=_g),
    "bias": torch.randn(3, dtype=torch.float64, generator=_g),
    "row": torch.randn(5, dtype=torch.float64, generator=_g),
}


def _input(p: Any) -> Tensor:
    return X * p["shift"] + torch.sin(p["shift"])


NORMS: dict[str, Callable[[Any], Tensor]] = {
    "layer_norm": lambda p: F.layer_norm(_input(p), (5,), p["row"], p["row"] ** 2),
    "layer_norm over two axes": lambda p: F.layer_norm(_input(p), (3, 5), p["shift"]),
    "layer_norm plain": lambda p: F.layer_norm(_input(p), (5,), eps=0.1),
    "batch_norm training": lambda p: F.batch_norm(
        _input(p), MEAN.clone(), VAR.clone(), p["weight"], p["bias"], training=True
    ),
    "batch_norm training without statistics": lambda p: F.batch_norm(
        _input(p), None, None, p["weight"], training=True, eps=0.1
    ),
    "batch_norm evaluation": lambda p: F.batch_norm(_input(p), MEAN, VAR, p["weight"], p["bias"]),
    "instance_norm": lambda p: F.instance_norm(_input(p), weight=p["weight"], bias=p["bias"]),
    "instance_norm with statistics": lambda p: F.instance_norm(
        _input(p), MEAN.clone(), VAR.clone(), p["weight"], use_input_stats=False
    ),
    "group_norm": lambda p: F.group_norm(_input(p), 3, p["weight"], p["bias"]),
    "rms_norm": lambda p: F.rms_norm(_input(p), (5,), p["row"]),
    "local_response_norm": lambda p: F.local_response_norm(_input(p), 2),
}


def _loss(name: str) -> Callable[[Any], Tensor]:
    return lambda p: (NORMS[name](p) ** 3).sum() + (p["weight"] ** 2).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NORMS)
def test_the_product_is_exact(name: str, mode: Any) -> None:
    v = oracles.random_like(P, 1)
    f = _loss(name)
    oracles.assert_same(hvp(f, mode=mode)(P, v), oracles.hvp(f, P, v))


@pytest.mark.parametrize("name", NORMS)
def test_the_third_derivative_is_right(name: str) -> None:
    v, u = oracles.random_like(P, 1), oracles.random_like(P, 2)
    f = _loss(name)
    third = torch.func.grad(lambda p: oracles.dot(v, hvp(f)(p, v)))(P)
    truth = oracles.directional_derivative(
        lambda p: oracles.dot(v, oracles.hvp(f, p, v)), P, u, step=3e-4
    )
    scale = (oracles.dot(u, u) * oracles.dot(third, third)).sqrt()
    assert abs(oracles.dot(u, third) - truth) <= 1e-6 * scale


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm training", "instance_norm"])
def test_the_raw_third_derivative_is_silently_wrong(name: str) -> None:
    v, u = oracles.random_like(P, 1), oracles.random_like(P, 2)
    f = _loss(name)
    raw = torch.func.grad(lambda p: oracles.dot(v, torch.func.vjp(torch.func.grad(f), p)[1](v)[0]))(
        P
    )
    truth = oracles.directional_derivative(
        lambda p: oracles.dot(v, oracles.hvp(f, p, v)), P, u, step=3e-4
    )
    scale = (oracles.dot(u, u) * oracles.dot(raw, raw)).sqrt()
    assert abs(oracles.dot(u, raw) - truth) > 1e-3 * scale


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (
            lambda p: F.batch_norm(p.reshape(1, 3), None, None, training=True).sum(),
            "more than 1 value per channel",
        ),
        (
            lambda p: F.instance_norm(p.reshape(1, 3, 1)).sum(),
            "more than 1 spatial element",
        ),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_torchs_own_checks_of_the_input_stay(f: Any, words: str, requires_grad: bool) -> None:
    p = torch.ones(3).requires_grad_(requires_grad)
    with pytest.raises(ValueError, match=words):
        hvp(f)(p, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_third_derivatives_keep_the_dtype_of_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5).to(dtype)
    p = torch.linspace(0.5, 1.5, 5).to(dtype)
    f = lambda p: (F.layer_norm(x * p, (5,)) ** 3).sum()  # noqa: E731
    third = torch.func.grad(lambda p: hvp(f)(p, torch.ones_like(p)).sum())(p)
    wide = lambda p: (F.layer_norm(x.double() * p, (5,)) ** 3).sum()  # noqa: E731
    truth = torch.func.grad(lambda p: hvp(wide)(p, torch.ones_like(p)).sum())(p.double())
    assert third.dtype == dtype
    assert oracles.relative_error(third, truth) < (0.3 if dtype == torch.bfloat16 else 1e-3)
