"""Special functions whose derivatives torch writes with a division by the argument, near zero by their series.

At zero torch puts a constant in the place of the quotient, which loses its derivatives, and next to zero the quotient
loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []

_TERMS = 14
_SINC = [(-1.0) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1) for k in range(_TERMS)]
_I0 = [0.25**k / math.factorial(k) ** 2 for k in range(_TERMS)]
_I1 = [0.5 * 0.25**k / (math.factorial(k) * math.factorial(k + 1)) for k in range(_TERMS)]


def _near_zero(
    function: Callable[[Tensor], Tensor], input: Tensor, coefficients: list[float], odd: bool
) -> Tensor:
    """Return the series in the square of the argument where that is at most a half, the function elsewhere."""
    near = input.abs() <= 0.5
    x = torch.where(near, input, torch.zeros_like(input))
    square = x * x
    series = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        series = series * square + coefficient
    far = function(torch.where(near, torch.full_like(input, 2.0), input))
    return torch.where(near, series * x if odd else series, far)


@repairs(
    torch.sinc,
    torch.special.sinc,
    torch.Tensor.sinc,
    because="its second derivative at zero is NaN (2.13)",
)
def _sinc(rules: Rules, input: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not input.is_floating_point():
        return torch.sinc(input, **kwargs)
    return _near_zero(torch.sinc, input, _SINC, odd=False)


@repairs(
    torch.i0, torch.special.i0, torch.Tensor.i0, because="its derivatives are those of special.i1"
)
def _i0(rules: Rules, input: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not rules.higher or not input.is_floating_point():
        return torch.i0(input, **kwargs)
    return _near_zero(torch.i0, input, _I0, odd=False)


@repairs(
    torch.special.i1,
    because="its third derivative at zero is 0 and not 3/8 (2.13), the second one loses digits next to it",
)
def _i1(rules: Rules, input: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not input.is_floating_point():
        plain: Tensor = torch.special.i1(input, **kwargs)
        return plain
    return _near_zero(torch.special.i1, input, _I1, odd=True)
