"""Functions of each entry alone: the term is multiplied by the derivative.

Where torch has a fused kernel for the backward pass, that is what multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secorder_func.taylor.products import total
from secorder_func.taylor.registry import Terms, forms, tangent

__all__: list[str] = []

_TENSOR: Any = torch.Tensor
_aten: Any = torch.ops.aten
_ROOT = 2 / math.sqrt(math.pi)

Slope = Callable[[Any, Any], Any]
"""(input, output) -> derivative of the output in the input."""

SLOPES: dict[str, Slope] = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: y * math.log(2),
    "expm1": lambda x, y: y + 1,
    "log1p": lambda x, y: 1 / (1 + x),
    "rsqrt": lambda x, y: -0.5 * y * y * y,
    "reciprocal": lambda x, y: -y * y,
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "tan": lambda x, y: 1 + y * y,
    "sinh": lambda x, y: x.cosh(),
    "cosh": lambda x, y: x.sinh(),
    "asin": lambda x, y: (1 - x * x).rsqrt(),
    "acos": lambda x, y: -(1 - x * x).rsqrt(),
    "atan": lambda x, y: 1 / (1 + x * x),
    "asinh": lambda x, y: (1 + x * x).rsqrt(),
    "acosh": lambda x, y: (x - 1).rsqrt() * (x + 1).rsqrt(),
    "atanh": lambda x, y: 1 / (1 - x * x),
    "erf": lambda x, y: _ROOT * (-x * x).exp(),
    "erfc": lambda x, y: -_ROOT * (-x * x).exp(),
    "erfinv": lambda x, y: (y * y).exp() / _ROOT,
    "lgamma": lambda x, y: x.digamma(),
    "digamma": lambda x, y: torch.polygamma(1, x),
}
_BY_QUOTIENT: dict[str, Slope] = {
    "log": lambda x, y: x,
    "log2": lambda x, y: x * math.log(2),
    "log10": lambda x, y: x * math.log(10),
    "sqrt": lambda x, y: 2 * y,
}
"""(input, output) -> one over the derivative."""
_SAME = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
    "gammaln": "lgamma",
    "psi": "digamma",
}


def _by_slope(name: str, slope: Slope) -> None:
    functions = forms(name, *(other for other, same in _SAME.items() if same == name))

    @tangent(*functions, kind="elementwise")
    def push(t: Terms, out: Tensor, input: Tensor) -> Any:
        return t(input) * slope(input, out)


def _by_quotient(name: str, inverse: Slope) -> None:
    @tangent(*forms(name), kind="elementwise")
    def push(t: Terms, out: Tensor, input: Tensor) -> Any:
        return t(input) / inverse(input, out)


for _name, _slope in SLOPES.items():
    _by_slope(_name, _slope)
for _name, _slope in _BY_QUOTIENT.items():
    _by_quotient(_name, _slope)


@tangent(*forms("abs", "absolute", "__abs__"), kind="elementwise")
def _abs(t: Terms, out: Tensor, input: Tensor) -> Any:
    if input.is_complex():
        return (input.sgn().conj() * t(input)).real
    return t(input) * input.sgn()


# ----------------------------------------------------------------------------------- powers


@tangent(*forms("pow", "__pow__", "float_power"), kind="elementwise")
def _pow(t: Terms, out: Tensor, input: Any, exponent: Any) -> Any:
    base, power = t(input), t(exponent)
    parts = []
    if base is not None:
        parts.append(base * _slope_of_power(input, exponent))
    if power is not None:
        parts.append(power * _slope_in_exponent(input, exponent, out))
    return total(*parts)


def _slope_of_power(base: Tensor, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return torch.zeros_like(base)
        if exponent == 1:
            return torch.ones_like(base)
        return 2 * base if exponent == 2 else exponent * base.pow(exponent - 1)
    trivial = exponent == 0
    lowered = base.pow(torch.where(trivial, torch.ones_like(exponent), exponent - 1))
    return torch.where(trivial, 0.0, exponent * lowered)


def _slope_in_exponent(base: Any, exponent: Tensor, out: Tensor) -> Any:
    """Return `out log(base)`, zero where the base is zero and the power is constant there."""
    if not isinstance(base, Tensor):
        return out * math.log(base) if base else torch.zeros_like(out)
    flat = (base == 0) & (exponent >= 0)
    return torch.where(flat, 0.0, out * torch.where(flat, 1.0, base).log())


@tangent(*forms("__rpow__"), kind="elementwise")
def _rpow(t: Terms, out: Tensor, exponent: Tensor, base: Any) -> Any:
    return _pow(t, out, base, exponent)


# ----------------------------------------------------------------------------- two arguments


@tangent(*forms("atan2", "arctan2"), kind="elementwise")
def _atan2(t: Terms, out: Tensor, input: Tensor, other: Tensor) -> Any:
    size = input * input + other * other
    y, x = t(input), t(other)
    return total(
        None if y is None else y * (other / size), None if x is None else x * (-input / size)
    )


@tangent(*forms("hypot"), kind="elementwise")
def _hypot(t: Terms, out: Tensor, input: Tensor, other: Tensor) -> Any:
    x, y = t(input), t(other)
    return total(None if x is None else x * (input / out), None if y is None else y * (other / out))


@tangent(*forms("logaddexp"), kind="elementwise")
def _logaddexp(t: Terms, out: Tensor, input: Tensor, other: Tensor) -> Any:
    x, y = t(input), t(other)
    share = (input - other).sigmoid()
    return total(None if x is None else x * share, None if y is None else y * (1 - share))


@tangent(*forms("logaddexp2"), kind="elementwise")
def _logaddexp2(t: Terms, out: Tensor, input: Tensor, other: Tensor) -> Any:
    x, y = t(input), t(other)
    share = ((input - other) * math.log(2)).sigmoid()
    return total(None if x is None else x * share, None if y is None else y * (1 - share))


@tangent(*forms("xlogy"), kind="elementwise")
def _xlogy(t: Terms, out: Tensor, input: Any, other: Any) -> Any:
    x, y = t(input), t(other)
    return total(
        None if x is None else _times_log(x, input, other),
        None if y is None else y * (input / other),
    )


def _times_log(term: Tensor, input: Tensor, other: Any) -> Any:
    if not isinstance(other, Tensor):
        return term * math.log(other)
    flat = (input == 0) & (other <= 0)
    return term * torch.where(flat, 0.0, torch.where(flat, 1.0, other).log())


# -------------------------------------------------------------------------------- clamping


@tangent(*forms("clamp", "clip"), kind="elementwise")
def _clamp(t: Terms, out: Tensor, input: Tensor, min: Any = None, max: Any = None) -> Any:
    term, low, high = t(input), t(min), t(max)
    raised = input if max is None else torch.minimum(input, _as_tensor(max, input))
    below = None if min is None else raised < min
    above = None if max is None else input > max
    parts = []
    if term is not None:
        outside = below if above is None else above if below is None else below | above
        if min is not None and max is not None:  # the lower bound counts first where they cross
            outside = (input < min) | (input > max)
        parts.append(term if outside is None else term.where(~outside, 0.0))
    if low is not None:
        crossed = input < min if max is None else (input < min) & ~(torch.as_tensor(min) > max)
        parts.append(low * crossed)
    if high is not None:
        crossed = input > max if min is None else (input > max) | (torch.as_tensor(min) > max)
        parts.append(high * crossed)
    return total(*parts)


def _as_tensor(bound: Any, like: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else like.new_tensor(bound)


@tangent(*forms("clamp_min"), kind="elementwise")
def _clamp_min(t: Terms, out: Tensor, input: Tensor, min: Any) -> Any:
    return _clamp(t, out, input, min=min)


@tangent(*forms("clamp_max"), kind="elementwise")
def _clamp_max(t: Terms, out: Tensor, input: Tensor, max: Any) -> Any:
    return _clamp(t, out, input, max=max)


@tangent(*forms("frac"), kind="linear", by_output=True)
def _frac(t: Terms, out: Tensor, input: Tensor) -> Any:
    return t(input)


@tangent(*forms("fmod", "remainder", "__mod__"), kind="elementwise")
def _remainder(t: Terms, out: Tensor, input: Any, other: Any) -> Any:
    y = t(other)
    if y is None:
        return t(input)
    turns = ((input - out) / other).detach().round()
    return total(t(input), -turns * y)


@tangent(*forms("nan_to_num"), kind="selection")
def _nan_to_num(t: Terms, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return torch.where(input.isfinite(), t(input), 0.0)


@tangent(*forms("copysign"), kind="elementwise")
def _copysign(t: Terms, out: Tensor, input: Any, other: Any) -> Any:
    term = t(input)
    ratio = torch.where(input == 0, 0.0, (out / input).detach())
    return None if term is None else term * ratio
