"""Shapes, softmax and its logarithm, normalisation, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.normalization import float32_under_autocast, per_channel
from secorder_func.taylor.registry import NotCoveredError, forms
from secorder_func.taylor.second_order.registry import Jets, Pair, closed, rewritten

__all__: list[str] = []


def _along(out: Tensor, input: Tensor, dim: Any) -> int:
    """Return a dimension of terms."""
    if dim is None or out.dtype != input.dtype or out.is_complex():
        raise NotCoveredError("along no dimension, or of another dtype")
    return int(dim) - max(1, out.ndim) if dim >= 0 else int(dim)


_SHAPES = ("reshape", "view", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze")


@closed(*forms(*_SHAPES))
def _reshaped(t: Jets, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Pair:
    if out.dtype != input.dtype:
        raise NotCoveredError("a view of the bits in another dtype")
    first, second = t(input), t.second(input)
    return (
        first.reshape(first.shape[0], *out.shape),
        None if second is None else second.reshape(second.shape[0], *out.shape),
    )


@closed(*forms("roll"))
def _roll(t: Jets, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Pair:
    if out.ndim:
        raise NotCoveredError("more than one entry")
    return t(input), t.second(input)  # vmap would roll the vectors (2.13)


@closed(*forms("softmax"))
def _softmax(
    t: Jets, out: Tensor, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
) -> Pair:
    d = _along(out, input, dim)
    x, second = t(input), t.second(input)
    if not out.ndim:
        return None, None
    centred = x - (x * out).sum(d, keepdim=True)
    if t.only_first:
        return centred.mul_(out), None
    bend = t.products(centred, centred)
    if second is not None:
        bend.add_(second)
    bend.mul_(out)
    bend = bend - out * bend.sum(d, keepdim=True)
    return centred.mul_(out), bend


@closed(*forms("log_softmax"))
def _log_softmax(
    t: Jets, out: Tensor, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
) -> Pair:
    d = _along(out, input, dim)
    x, second = t(input), t.second(input)
    if not out.ndim:
        return None, None
    shares = out.exp()
    first = x - (x * shares).sum(d, keepdim=True)
    if t.only_first:
        return first, None
    bend = t.products(first, first)
    if second is None:
        return first, (-(bend.mul_(shares)).sum(d, keepdim=True)).expand(bend.shape)
    return first, second - bend.add_(second).mul_(shares).sum(d, keepdim=True)


@closed(torch.layer_norm)
def _standardised(
    t: Jets,
    out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Pair:
    if weight is not None or bias is not None or out.dtype != input.dtype:
        raise NotCoveredError("a scale or a shift")
    dims = tuple(range(-len(normalized_shape), 0))
    rstd = (input.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    x, second = t(input), t.second(input)
    centred = x - x.mean(dims, keepdim=True)
    slope = (centred * out).mean(dims, keepdim=True)
    if t.only_first:
        return centred.sub_(slope * out).mul_(rstd), None
    squares = t.products(centred, centred).mean(dims, keepdim=True)
    bend = (3 * t.products(slope, slope) - squares) * out
    bend = bend.sub_(t.products(slope.expand(centred.shape), centred), alpha=2).mul_(rstd * rstd)
    if second is not None:
        second = second - second.mean(dims, keepdim=True)
        second = second.sub_((second * out).mean(dims, keepdim=True) * out)
        bend.addcmul_(second, rstd.expand(second.shape))
    return centred.sub_(slope * out).mul_(rstd), bend


@rewritten(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    wide = input if weight is None else input.to(weight.dtype)
    out = torch.layer_norm(wide, list(normalized_shape), None, None, eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(float32_under_autocast(input))


@rewritten(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training:
        shape = (-1, *[1] * (input.ndim - 2))
        scale = (running_var + eps).rsqrt()
        centred = input - running_mean.reshape(shape)
        return per_channel(centred * scale.reshape(shape), weight, bias)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    rows = input.transpose(0, 1).flatten(1)
    out = torch.layer_norm(rows, [rows.shape[1]], None, None, eps)
    out = out.reshape(input.shape[1], input.shape[0], *input.shape[2:]).transpose(0, 1)
    return per_channel(out, weight, bias)
