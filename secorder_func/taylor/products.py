"""Products: linear in each factor alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.registry import RULES, Terms, forms, tangent

__all__ = ["total"]

_TENSOR: Any = torch.Tensor


def total(*parts: Tensor | None) -> Any:
    """Return the sum of what is there."""
    found: Tensor | None = None
    for part in parts:
        if part is not None:
            found = part if found is None else found + part
    return found


# -------------------------------------------------------------------------------- arithmetic


@tangent(*forms("add", "__add__", "__radd__"), kind="linear", by_output=True)
def _add(t: Terms, out: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    second = t(other)
    if second is not None and alpha != 1:
        second = second * alpha
    return total(t(input), second)


@tangent(*forms("sub", "subtract", "__sub__"), kind="linear", by_output=True)
def _sub(t: Terms, out: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    first, second = t(input), t(other)
    if second is None:
        return first
    if alpha != 1:
        second = second * alpha
    return -second if first is None else first - second


@tangent(*forms("rsub", "__rsub__"), kind="linear")
def _rsub(t: Terms, out: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    first, second = t(input), t(other)
    if first is None:
        return second
    if alpha != 1:
        first = first * alpha
    return -first if second is None else second - first


@tangent(*forms("mul", "multiply", "__mul__", "__rmul__"), kind="bilinear")
def _mul(t: Terms, out: Any, input: Any, other: Any) -> Any:
    first, second = t(input), t(other)
    if input is other and first is not None:
        return 2 * first * input
    return total(
        None if first is None else first * other, None if second is None else input * second
    )


@tangent(*forms("square"), kind="elementwise")
def _square(t: Terms, out: Any, input: Tensor) -> Any:
    return 2 * t(input) * input


@tangent(*forms("div", "divide", "true_divide", "__div__", "__truediv__"), kind="elementwise")
def _div(t: Terms, out: Any, input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return None
    first, second = t(input), t(other)
    if second is None:
        return first / other
    return (-second * out if first is None else first - second * out) / other


@tangent(*forms("__rdiv__", "__rtruediv__"), kind="elementwise")
def _rdiv(t: Terms, out: Any, input: Tensor, other: Any) -> Any:
    return _div(t, out, other, input)


@tangent(*forms("addcmul"), kind="bilinear")
def _addcmul(t: Terms, out: Any, input: Tensor, a: Any, b: Any, *, value: Any = 1) -> Any:
    product = _mul(t, out, a, b)
    return total(t(input), product if product is None or value == 1 else value * product)


@tangent(*forms("addcdiv"), kind="elementwise")
def _addcdiv(t: Terms, out: Any, input: Tensor, a: Any, b: Any, *, value: Any = 1) -> Any:
    quotient = _div(t, a / b, a, b) if t(a) is not None or t(b) is not None else None
    return total(t(input), quotient if quotient is None or value == 1 else value * quotient)


@tangent(*forms("lerp"), kind="bilinear")
def _lerp(t: Terms, out: Any, input: Tensor, end: Tensor, weight: Any) -> Any:
    first, last, mixed = t(input), t(end), t(weight)
    return total(
        None if first is None else first - weight * first,
        None if last is None else weight * last,
        None if mixed is None else mixed * (end - input),
    )


# -------------------------------------------------------------- products of matrices and their like


def _bilinear(product: Callable[..., Tensor], *functions: Any) -> None:
    """Register functions of two factors, `product(a, b, *others)`."""

    @tangent(*functions, kind="bilinear")
    def push(t: Terms, out: Any, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Any:
        first, second = t(a), t(b)
        if first is None:
            return product(a, second, *args, **kwargs)
        pushed = product(first, b, *args, **kwargs)
        return pushed if second is None else t.summed(pushed, product(a, second, *args, **kwargs))


for _name in (
    *("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "kron"),
    *("cross", "vecdot"),
):
    for _function in forms(_name):
        _bilinear(_function, _function)
_bilinear(torch.matmul, _TENSOR.__matmul__)
_tensordot: Any = torch._C._VariableFunctions.tensordot  # type: ignore[attr-defined]
_bilinear(_tensordot, _tensordot)


@tangent(_TENSOR.__rmatmul__, kind="bilinear")
def _rmatmul(t: Terms, out: Any, a: Tensor, b: Tensor) -> Any:
    return RULES[torch.matmul].push(t, out, b, a)


@tangent(F.linear, kind="bilinear")
def _linear(t: Terms, out: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    x, w, b = t(input), t(weight), t(bias)
    if w is None:
        return b if x is None else F.linear(x, weight, b)
    if x is None:
        return F.linear(input, w, b)
    return t.summed(F.linear(input, w, b), F.linear(x, weight))


@tangent(F.bilinear, torch.bilinear, kind="bilinear")
def _bilinear_layer(
    t: Terms, out: Any, a: Tensor, b: Tensor, weight: Tensor, bias: Any = None
) -> Any:
    first, second, w = t(a), t(b), t(weight)
    return total(
        None if first is None else F.bilinear(first, b, weight),
        None if second is None else F.bilinear(a, second, weight),
        None if w is None else F.bilinear(a, b, w),
        t(bias),
    )


def _with_sum(product: Callable[..., Tensor], *names: str) -> None:
    """Register `beta * input + alpha * product(a, b)`."""

    @tangent(*forms(*names), kind="bilinear")
    def push(
        t: Terms, out: Any, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Any:
        start, first, second = t(input), t(a), t(b)
        pushed = total(
            None if first is None else product(first, b),
            None if second is None else product(a, second),
        )
        if pushed is not None and alpha != 1:
            pushed = alpha * pushed
        if start is not None and beta != 1:
            start = beta * start
        return total(start, pushed)


_with_sum(torch.mm, "addmm")
_with_sum(torch.mv, "addmv")
_with_sum(torch.outer, "addr")
_with_sum(torch.bmm, "baddbmm")
_with_sum(lambda a, b: torch.bmm(a, b).sum(0), "addbmm")


def _convolution(function: Any, *more: Any) -> None:
    @tangent(function, *more, kind="bilinear")
    def push(
        t: Terms,
        out: Any,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, w, b = t(input), t(weight), t(bias)
        if w is None:
            if x is None:
                assert b is not None
                return b.reshape(-1, *[1] * (weight.ndim - 2))
            return function(x, weight, b, *args, **kwargs)
        moved = function(input, w, b, *args, **kwargs)
        return moved if x is None else t.summed(moved, function(x, weight, None, *args, **kwargs))


for _name in (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "convolution",
):
    for _function in forms(_name):
        _convolution(_function)


@tangent(torch.einsum, kind="bilinear")
def _einsum(t: Terms, out: Any, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise TypeError("subscripts as numbers")
    return _multilinear(t, operands, lambda *factors: torch.einsum(equation, *factors))


@tangent(torch.chain_matmul, kind="bilinear")
def _chain_matmul(t: Terms, out: Any, *matrices: Tensor) -> Any:
    return _multilinear(t, matrices, lambda *factors: torch.linalg.multi_dot(factors))


@tangent(torch.linalg.multi_dot, kind="bilinear")
def _multi_dot(t: Terms, out: Any, tensors: Any) -> Any:
    return _multilinear(t, tuple(tensors), lambda *factors: torch.linalg.multi_dot(factors))


def _multilinear(t: Terms, factors: tuple[Any, ...], product: Callable[..., Tensor]) -> Any:
    parts = []
    for place, factor in enumerate(factors):
        term = t(factor)
        if term is not None:
            parts.append(product(*factors[:place], term, *factors[place + 1 :]))
    return total(*parts)
