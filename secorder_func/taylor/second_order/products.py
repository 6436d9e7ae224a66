"""Products: a sum over the vectors of a group is one contraction, accumulated in one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from secorder_func.taylor.products import total
from secorder_func.taylor.registry import NotCoveredError, forms
from secorder_func.taylor.second_order.registry import Jets, Pair, aligned, closed

__all__: list[str] = []

_SMALL = 2**14
"""Entries of an input below which several convolutions are faster as one."""

_TENSOR: Any = torch.Tensor


def _added(first: Any, second: Any) -> Any:
    """Return the sum, in the memory of the second."""
    return second if first is None else first if second is None else second.add_(first)


@closed(*forms("mul", "multiply", "__mul__", "__rmul__"))
def _mul(t: Jets, out: Tensor, input: Any, other: Any) -> Pair:
    if out.is_complex():
        raise NotCoveredError("complex entries")
    a, b = aligned(t(input), input, out), aligned(t(other), other, out)
    a2, b2 = aligned(t.second(input), input, out), aligned(t.second(other), other, out)
    first = total(None if a is None else a * other, None if b is None else b * input)
    second = total(None if a2 is None else a2 * other, None if b2 is None else b2 * input)
    if a is not None and b is not None and not t.only_first:
        second = _added(second, t.products(a, b).mul_(2))
    return first, second


@closed(*forms("add", "__add__", "__radd__"))
def _add(t: Jets, out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Pair:
    if alpha != 1:
        raise NotCoveredError("alpha")
    return (
        total(aligned(t(input), input, out), aligned(t(other), other, out)),
        total(aligned(t.second(input), input, out), aligned(t.second(other), other, out)),
    )


@closed(*forms("div", "divide", "true_divide", "__div__", "__truediv__"))
def _div(t: Jets, out: Tensor, input: Any, other: Any, *, rounding_mode: Any = None) -> Pair:
    if rounding_mode is not None or out.is_complex():
        raise NotCoveredError("rounding, or complex entries")
    a, b = aligned(t(input), input, out), aligned(t(other), other, out)
    a2, b2 = aligned(t.second(input), input, out), aligned(t.second(other), other, out)
    first = total(a, None if b is None else -(b * out)) / other
    second = total(a2, None if b2 is None else -(b2 * out))
    if b is not None and not t.only_first:
        second = _added(second, t.products(first, b.expand(first.shape)).mul_(-2))
    return first, None if second is None else second / other


def _usual(*tensors: Any) -> bool:
    """Say whether products may be accumulated in place: real matrices of one dtype, and no autocast."""
    dtypes = {x.dtype for x in tensors if x is not None}
    device = tensors[0].device.type
    return (
        len(dtypes) == 1
        and tensors[0].is_floating_point()
        and all(x is None or x.layout == torch.strided for x in tensors)
        and not torch.is_autocast_enabled(device)
    )


@closed(F.linear)
def _linear(t: Jets, out: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> Pair:
    if weight.ndim != 2 or not input.ndim or not out.numel() or not _usual(input, weight, bias):
        raise NotCoveredError("an unusual product")
    x, w = t(input), t(weight)
    first = _affine(x, w, t(bias), input, weight, out)
    second = _affine(t.second(input), t.second(weight), t.second(bias), input, weight, out)
    if x is not None and w is not None and not t.only_first:
        bend = t.contracted(x.reshape(x.shape[0], -1, x.shape[-1]), w.mT).mul_(2)
        bend = bend.reshape(bend.shape[0], *out.shape)
        second = bend if second is None else second + bend
    return first, second


def _affine(x: Any, w: Any, b: Any, input: Tensor, weight: Tensor, out: Tensor) -> Any:
    """Return the terms of an affine function from those of its input, weight and bias."""
    rows = input.reshape(-1, input.shape[-1])
    found: Any = None
    if w is not None:
        spread, turned = rows.expand(w.shape[0], *rows.shape), w.mT
        found = torch.bmm(spread, turned) if b is None else _biased(b, spread, turned)
    elif b is not None:
        found = b.unsqueeze(1).expand(-1, rows.shape[0], -1)
        found = found.clone() if x is not None else found
    if x is None:
        return None if found is None else found.reshape(found.shape[0], *out.shape)
    if _is_spread(x):  # the same for all rows
        moved = (x.reshape(x.shape[0], -1, x.shape[-1])[:, 0] @ weight.mT).unsqueeze(1)
        found = moved.expand(-1, rows.shape[0], -1) if found is None else found.add_(moved)
        return found.unflatten(1, out.shape[:-1]) if out.ndim > 1 else found[:, 0]
    flat = x.reshape(-1, x.shape[-1])
    if found is None:
        found = flat @ weight.mT
    else:
        found.view(-1, found.shape[-1]).addmm_(flat, weight.mT)
    return found.reshape(x.shape[0], *out.shape)


def _biased(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), rows, weight)


def _is_spread(x: Tensor) -> bool:
    """Say whether terms `(K, ..., n)` are the same for all rows of a vector, by their strides."""
    middle = range(1, x.ndim - 1)
    return (
        x.ndim > 2
        and any(x.shape[d] > 1 for d in middle)
        and all(x.stride(d) == 0 or x.shape[d] == 1 for d in middle)
    )


def _matrices(t: Jets, out: Tensor, a: Tensor, b: Tensor) -> Pair:
    if not out.numel() or not _usual(a, b) or a.ndim < 2 or b.ndim < 2:
        raise NotCoveredError("an unusual product")
    x, y = t(a), t(b)
    first, second = _both_ways(x, y, a, b, out), _both_ways(t.second(a), t.second(b), a, b, out)
    if x is not None and y is not None and not t.only_first:
        batch = out.shape[:-2]
        x = _batched(x, a, batch)
        y = _batched(y, b, batch)
        bend = _contracted_in_batches(t, x, y).mul_(2)
        bend = bend.reshape(bend.shape[0], *out.shape)
        second = bend if second is None else second + bend
    return first, second


def _batched(term: Tensor, x: Tensor, batch: Any) -> Tensor:
    """Return terms with the dimensions over which a product of matrices is repeated, one at least."""
    missing = len(batch) + 2 - x.ndim
    term = term.reshape(term.shape[0], *[1] * missing, *x.shape)
    term = term.expand(term.shape[0], *batch, *x.shape[-2:])
    return term.reshape(term.shape[0], -1, *x.shape[-2:])


def _contracted_in_batches(t: Jets, x: Tensor, y: Tensor) -> Tensor:
    """Return the sums over the groups of products of batches of matrices, `(K, b, ., .)`."""
    y = t.partner(y)
    groups = t.groups
    size = x.shape[0] // groups
    shape = (groups * x.shape[1], x.shape[2], y.shape[3])
    x, y = x.unflatten(0, (groups, size)), y.unflatten(0, (groups, size))
    total = torch.bmm(x[:, 0].flatten(0, 1), y[:, 0].flatten(0, 1))
    for place in range(1, size):
        total.baddbmm_(x[:, place].flatten(0, 1), y[:, place].flatten(0, 1))
    return total.view(groups, -1, *shape[1:])


def _both_ways(x: Any, y: Any, a: Tensor, b: Tensor, out: Tensor) -> Any:
    left = None if x is None else torch.matmul(aligned(x, a, out), b)
    right = None if y is None else torch.matmul(a, aligned(y, b, out))
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right) if left.shape == right.shape else left + right


for _function in (*forms("matmul", "mm", "bmm"), _TENSOR.__matmul__):
    if _function is not None:
        closed(_function)(_matrices)


# ------------------------------------------------------------------------------ convolutions


def _convolution(name: str, dims: int) -> None:
    function: Any = getattr(F, name)

    @closed(function)
    def push(
        t: Jets,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Pair:
        if input.ndim != dims + 2 or not out.numel() or not _usual(input, weight, bias):
            raise NotCoveredError("an unusual convolution")
        rest = stride, padding, dilation, groups
        x, w = t(input), t(weight)

        def terms(x: Any, w: Any, b: Any) -> Any:
            found = None if x is None else _rows(function, x, weight, rest)
            if w is not None:
                moved = _columns(function, input, w, rest, groups)
                found = moved if found is None else found.add_(moved)
            if b is not None:
                spread = b.reshape(b.shape[0], 1, -1, *[1] * dims)
                found = spread.expand(-1, *out.shape) if found is None else found.add_(spread)
            return found

        first = terms(x, w, t(bias))
        second = terms(t.second(input), t.second(weight), t.second(bias))
        if x is not None and w is not None and not t.only_first:
            bend = _bent(t, function, x, t.partner(w), rest, groups).mul_(2)
            second = bend if second is None else second + bend
        return first, second


def _rows(function: Any, x: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """Return convolutions of several inputs, more rows of one batch."""
    return function(x.flatten(0, 1), weight, None, *rest).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


def _columns(function: Any, x: Tensor, w: Tensor, rest: Any, groups: int) -> Any:
    """Return convolutions with several weights, more channels of one output."""
    if groups != 1:
        return vmap(lambda one: function(x, one, None, *rest))(w)
    moved = function(x, w.flatten(0, 1), None, *rest)
    return moved.unflatten(1, w.shape[:2]).transpose(0, 1)


def _bent(t: Jets, function: Any, x: Tensor, w: Tensor, rest: Any, groups: int) -> Tensor:
    """Return the sums over the groups of vectors of convolutions: small ones as more channels of one input."""
    if groups != 1:
        each: Callable[..., Tensor] = lambda a, b: function(a, b, None, *rest)  # noqa: E731
        return t.gathered(vmap(each)(x, w))
    size = x.shape[0] // t.groups
    if x.numel() // x.shape[0] > _SMALL:
        return _one_by_one(lambda k: function(x[k], w[k], None, *rest), t.groups, size)
    sums = []
    for begin in range(0, x.shape[0], size):
        rows = x[begin : begin + size].transpose(0, 1).flatten(1, 2)
        kernel = w[begin : begin + size].transpose(0, 1).flatten(1, 2)
        sums.append(function(rows, kernel, None, *rest))
    return torch.stack(sums)


def _one_by_one(product: Callable[[int], Tensor], groups: int, size: int) -> Tensor:
    """Return the sums over the groups of the products of every vector."""
    first = product(0)
    sums = first.new_zeros(groups, *first.shape)
    sums[0] = first
    for k in range(1, groups * size):
        sums[k // size].add_(product(k))
    return sums


for _dims in (1, 2, 3):
    _convolution(f"conv{_dims}d", _dims)
