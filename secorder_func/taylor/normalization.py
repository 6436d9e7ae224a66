"""Normalisation layers: a core with a symmetric Jacobian, then a scale and a shift.

The core subtracts the mean and divides by the root of the variance over some dimensions; torch's backward kernel of a
layer norm multiplies with its Jacobian, and is differentiated rightly once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.normalization import float32_under_autocast
from secorder_func.taylor.products import total
from secorder_func.taylor.registry import (
    NotCoveredError,
    Terms,
    tangent,
    written,
    written_by_repair,
)

__all__: list[str] = []

_aten: Any = torch.ops.aten


def _core(term: Tensor, input: Tensor, shape: Any, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the term of a standardised tensor."""
    pushed: Tensor = _aten.native_layer_norm_backward(
        term, input, shape, mean, rstd, None, None, [True, False, False]
    )[0]
    return pushed


def _layer_norm_value(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    dtype = float32_under_autocast(input)
    if weight is not None and weight.dtype != input.dtype:
        input = input.to(weight.dtype)
    unscaled, mean, rstd = torch.native_layer_norm(input, list(normalized_shape), None, None, eps)
    out = unscaled if weight is None else unscaled * weight
    out = out if bias is None else out + bias
    return out.to(dtype), (input, mean, rstd, unscaled)


@tangent(
    F.layer_norm,
    torch.layer_norm,
    kind="symmetric",
    value=_layer_norm_value,
    beyond=written_by_repair,
)
def _layer_norm(
    t: Terms,
    pair: tuple[Tensor, Any],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
    **options: Any,
) -> Any:
    x, w = t(input), t(weight)
    input, mean, rstd, unscaled = pair[1]
    pushed = None
    if x is not None:
        pushed = _core(x.to(input.dtype), input, list(normalized_shape), mean, rstd)
        pushed = pushed if weight is None else pushed * weight
    return total(pushed, None if w is None else unscaled * w, t(bias))


def _channels(parameter: Tensor, ndim: int) -> Tensor:
    return parameter.reshape(-1, *[1] * (ndim - 2))


def _groups_value(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Any]:
    """Standardise each of some groups of channels, then scale and shift each channel."""
    if not input.numel():
        return _shifted(input, weight, bias), (None, None, None, None, input)
    grouped = input.reshape(input.shape[0], groups, -1)
    shape = [grouped.shape[-1]]
    out, mean, rstd = torch.native_layer_norm(grouped, shape, None, None, eps)
    unscaled = out.reshape(input.shape)
    return _shifted(unscaled, weight, bias), (grouped, shape, mean, rstd, unscaled)


def _shifted(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the channels scaled and shifted."""
    if weight is not None:
        out = out * _channels(weight, out.ndim)
    return out if bias is None else out + _channels(bias, out.ndim)


def _groups(t: Terms, more: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    x, w, b = t(input), t(weight), t(bias)
    grouped, shape, mean, rstd, unscaled = more
    pushed = None
    if x is not None:
        pushed = x  # of nothing
        if grouped is not None:
            pushed = _core(x.reshape(grouped.shape), grouped, shape, mean, rstd)
            pushed = pushed.reshape(input.shape)
        pushed = pushed if weight is None else pushed * _channels(weight, input.ndim)
    return total(
        pushed,
        None if w is None else unscaled * _channels(w, input.ndim),
        None if b is None else _channels(b, input.ndim),
    )


def _group_norm_value(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> tuple[Tensor, Any]:
    return _groups_value(input, num_groups, weight, bias, eps)


def _group_norm_written(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    out = F.layer_norm(grouped, grouped.shape[-1:], None, None, eps).reshape(input.shape)
    return _shifted(out, weight, bias)


@tangent(
    F.group_norm,
    torch.group_norm,
    kind="symmetric",
    value=_group_norm_value,
    beyond=_group_norm_written,
)
def _group_norm(
    t: Terms,
    pair: tuple[Tensor, Any],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Any:
    return _groups(t, pair[1], input, weight, bias)


def _per_channel_value(
    input: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Any]:
    scale = (var + eps).rsqrt()
    unscaled = (input - _channels(mean, input.ndim)) * _channels(scale, input.ndim)
    return _shifted(unscaled, weight, bias), (scale, unscaled)


def _instance_norm_value(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Any]:
    if not use_input_stats:
        return _per_channel_value(input, running_mean, running_var, weight, bias, eps)
    F._verify_spatial_size(input.size())  # type: ignore[attr-defined]
    return _groups_value(input, input.shape[1], weight, bias, eps)


@tangent(F.instance_norm, kind="symmetric", value=_instance_norm_value, beyond=written_by_repair)
def _instance_norm(
    t: Terms,
    pair: tuple[Tensor, Any],
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        _refuse_statistics(t, running_mean, running_var)
        return _scaled(t, pair[1], input, weight, bias)
    return _groups(t, pair[1], input, weight, bias)


def _batch_norm_value(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Any]:
    if not training:
        return _per_channel_value(input, running_mean, running_var, weight, bias, eps)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    if not input.numel():
        return _shifted(input, weight, bias), (None, None, input)
    unscaled, mean, rstd = torch.native_batch_norm(
        input, None, None, None, None, True, momentum, eps
    )
    return _shifted(unscaled, weight, bias), (mean, rstd, unscaled)


@tangent(F.batch_norm, kind="symmetric", value=_batch_norm_value, beyond=written_by_repair)
def _batch_norm(
    t: Terms,
    pair: tuple[Tensor, Any],
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _refuse_statistics(t, running_mean, running_var)
    if not training:
        return _scaled(t, pair[1], input, weight, bias)
    x, w, b = t(input), t(weight), t(bias)
    mean, rstd, unscaled = pair[1]
    pushed = None
    if x is not None:
        pushed = x  # of nothing
        if mean is not None:
            pushed = _aten.native_batch_norm_backward(
                x, input, None, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
        pushed = pushed if weight is None else pushed * _channels(weight, input.ndim)
    scaled = None if w is None else unscaled * _channels(w, input.ndim)
    return total(pushed, scaled, None if b is None else _channels(b, input.ndim))


def _refuse_statistics(t: Terms, *statistics: Any) -> None:
    if any(t(each) is not None for each in statistics):
        raise NotCoveredError("running statistics that are differentiated")


def _scaled(t: Terms, more: Any, input: Tensor, weight: Any, bias: Any) -> Any:
    """Return the term of a tensor standardised by constants."""
    x, w, b = t(input), t(weight), t(bias)
    scale, unscaled = more
    if x is not None:
        x = x * _channels(scale if weight is None else scale * weight, input.ndim)
    return total(
        x,
        None if w is None else unscaled * _channels(w, input.ndim),
        None if b is None else _channels(b, input.ndim),
    )


@written(F.rms_norm, torch.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: Any = None
) -> Tensor:
    half = input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if half else input
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    out = (x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)).to(input.dtype)
    return out if weight is None else out * weight


@written(F.local_response_norm)
def _local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    squares = (input * input).unsqueeze(1)
    flat = squares.reshape(*squares.shape[:3], *([-1, 1] if input.ndim > 2 else [1, 1]))
    padded = F.pad(flat, (0, 0, 0, 0, size // 2, (size - 1) // 2))
    summed = F.avg_pool3d(padded, (size, 1, 1), stride=1).reshape(input.shape)
    return input / (summed * alpha + k).pow(beta)
