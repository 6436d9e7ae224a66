"""Writes to intermediates: the term goes where the value goes, or the propagation says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import NoExactRouteError, hvp, rule_kinds
from tests import oracles

P = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2, -0.7], dtype=torch.float64)
V = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3, -2.0], dtype=torch.float64)
MODE: Any = "reverse_over_forward"


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def _writes(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Return the cube of `p sin(p)` after a write to it."""

    def f(p: Tensor) -> Tensor:
        x = p * p.sin()
        write(x)
        return x.pow(3).sum()

    return f


def _item(x: Tensor) -> None:
    x[2] = x[0].exp()


def _items(x: Tensor) -> None:
    x[1:4] = 2.0
    x[::2] = x[1::2].exp()


def _augmented(x: Tensor) -> None:
    y = x.clone()
    y += x
    y *= 2.5
    y -= 1
    y /= 3
    x.copy_(y)


def _row_of_a_matrix(x: Tensor) -> None:
    x.view(2, 3)[1].mul_(2).add_(1)
    x.reshape(2, 3)[:, 0] = x[3].clone() ** 2


def _base_after_view(x: Tensor) -> None:
    row = x.view(2, 3)[0]
    x.mul_(3)
    x[0] = row[1] * 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda x: x.add_(x.exp(), alpha=2),
    "mul_": lambda x: x.mul_(x.clone()),
    "pow_": lambda x: x.pow_(2),
    "exp_": lambda x: x.exp_(),
    "relu_": lambda x: x.relu_(),
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.elu": lambda x: F.elu(x, inplace=True),
    "clamp_": lambda x: x.clamp_(-0.3, 0.9),
    "masked_fill_": lambda x: x.masked_fill_(P > 1, 2.0),
    "zero_": lambda x: x[:2].zero_(),
    "fill_": lambda x: x[1:3].fill_(0.7),
    "index_add_": lambda x: x.index_add_(0, torch.tensor([0, 0]), x[2:4].clone()),
    "scatter_": lambda x: x.scatter_(0, torch.tensor([5]), x[:1].clone() ** 2),
    "an item": _item,
    "slices": _items,
    "augmented assignments": _augmented,
    "a row of a view": _row_of_a_matrix,
    "a base with a view": _base_after_view,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_takes_the_term_along(name: str) -> None:
    f = _writes(WRITES[name])
    oracles.assert_same(hvp(f, mode=MODE)(P, V), oracles.hvp(f, P, V), 1e-12)


def test_a_buffer_that_is_filled_row_by_row() -> None:
    def f(p: Tensor) -> Tensor:
        out = _zeros(3, 6)
        state = p
        for k in range(3):
            state = torch.tanh(state * p + 0.1)
            out[k] = state
        return (out * out.flip(0)).sum()

    assert rule_kinds(f)(P).closed
    oracles.assert_same(hvp(f, mode=MODE)(P, V), oracles.hvp(f, P, V), 1e-12)


def test_terms_that_do_not_lie_as_their_values_are_refused_not_wrong() -> None:
    """`expand` and `contiguous` give a term another layout than its value may have."""

    def f(p: Tensor) -> Tensor:
        x = (p.reshape(2, 3).t() * 1.0).contiguous()
        y = x.view(6)
        x.mul_(2)
        return (y**3).sum() + (x * x).sum()

    expected = oracles.hvp(f, P, V)
    oracles.assert_same(hvp(f)(P, V), expected)
    with suppress(NoExactRouteError):
        oracles.assert_same(hvp(f, mode=MODE)(P, V), expected)


def test_a_view_from_before_its_base_had_a_term_is_seen() -> None:
    def f(p: Tensor) -> Tensor:
        out = _zeros(6)
        part = out[:3]
        out.add_(p * p)
        return (part**2).sum()

    expected = oracles.hvp(f, P, V)
    oracles.assert_same(hvp(f)(P, V), expected)
    with pytest.raises(RuntimeError, match="reverse_over_forward"):
        hvp(f, mode=MODE)(P, V)


def test_a_tensor_that_shares_its_term_is_not_overwritten() -> None:
    """`x + 1` has the term of `x` itself: a write to a view of it must not reach `x`."""

    def f(p: Tensor) -> Tensor:
        x = p * p
        y = x + 1
        y[:3].mul_(5)
        return (x**2).sum() + (y**2).sum()

    expected = oracles.hvp(f, P, V)
    oracles.assert_same(hvp(f)(P, V), expected)
    with suppress(NoExactRouteError):
        oracles.assert_same(hvp(f, mode=MODE)(P, V), expected)
