"""Logarithms of sums whose second derivatives are NaN where a term is zero."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []

_NAN = "second derivatives are NaN where an argument is -inf"


@repairs(torch.logaddexp, torch.Tensor.logaddexp, because=_NAN)
def _logaddexp(rules: Rules, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is not None or input.is_complex() or other.is_complex():
        return torch.logaddexp(input, other, out=out)
    return _log_of_sum(input, other, 1.0)


@repairs(torch.logaddexp2, torch.Tensor.logaddexp2, because=_NAN)
def _logaddexp2(rules: Rules, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.logaddexp2(input, other, out=out)
    return _log_of_sum(input, other, math.log(2.0))


@repairs(
    torch.logcumsumexp,
    torch.Tensor.logcumsumexp,
    because="its third derivatives are NaN by reverse mode; its forward rule is 4e-7 to 1e-6 off in float64 (2.13)",
)
def _logcumsumexp(rules: Rules, input: Tensor, dim: Any, **kwargs: Any) -> Tensor:
    torchs = kwargs or input.is_complex() or not input.ndim or not (rules.higher or rules.forward)
    if torchs or isinstance(dim, str):
        return torch.logcumsumexp(input, dim, **kwargs)
    x, step = input.movedim(dim, -1), 1
    while step < x.shape[-1]:  # after each round an entry is a sum over 2 * step entries
        x = torch.cat([x[..., :step], _log_of_sum(x[..., step:], x[..., :-step], 1.0)], -1)
        step *= 2
    return x.movedim(-1, dim)


def _log_of_sum(x: Tensor, y: Tensor, base: float) -> Tensor:
    """Return max + log(1 + base^(min - max)), smooth where both are equal as either branch is."""
    larger, smaller = torch.where(x >= y, x, y), torch.where(x >= y, y, x)
    both_infinite = (x == y) & x.isinf()
    gap = torch.where(both_infinite, torch.zeros_like(larger), smaller - larger)
    return larger + F.softplus(gap * base) / base
