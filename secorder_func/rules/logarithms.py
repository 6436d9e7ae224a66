"""Logarithms of sums whose second derivatives are NaN where a term is zero."""

from __future__ import annotations

import math

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


def _log_of_sum(x: Tensor, y: Tensor, base: float) -> Tensor:
    """Return max + log(1 + base^(min - max)), smooth where both are equal as either branch is."""
    larger, smaller = torch.where(x >= y, x, y), torch.where(x >= y, y, x)
    both_infinite = (x == y) & x.isinf()
    gap = torch.where(both_infinite, torch.zeros_like(larger), smaller - larger)
    return larger + F.softplus(gap * base) / base
