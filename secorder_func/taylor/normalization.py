"""Normalisation layers: a core with a symmetric Jacobian, then a scale and a shift.

The core subtracts the mean and divides by the root of the variance over some dimensions; torch's backward kernel of a
layer norm multiplies with its Jacobian, and is differentiated rightly once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.normalization import float32_under_autocast, per_channel
from secorder_func.taylor.products import total
from secorder_func.taylor.registry import (
    NotCoveredError,
    Terms,
    together,
    written,
    written_by_repair,
)

__all__: list[str] = []

_aten: Any = torch.ops.aten


def _core(term: Any, input: Tensor, shape: Any, mean: Tensor, rstd: Tensor) -> Any:
    """Return the term of a standardised tensor."""
    if term is None:
        return None
    return _aten.native_layer_norm_backward(
        term.to(input.dtype), input, shape, mean, rstd, None, None, [True, False, False]
    )[0]


def _times(core: Any, weight: Tensor | None) -> Any:
    return core if core is None or weight is None else core * weight


def _affine(t: Terms, scaled: Any, unscaled: Tensor, weight: Any, bias: Any, spread: Any) -> Any:
    """Return the term of `unscaled * weight + bias`, of which that of the first factor is known, and scaled."""
    w, b = t(weight), t(bias)
    return total(
        scaled, None if w is None else unscaled * spread(w), None if b is None else spread(b)
    )


@together(F.layer_norm, torch.layer_norm, kind="symmetric", beyond=written_by_repair)
def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    shape = list(normalized_shape)
    wide = input if weight is None else input.to(weight.dtype)
    unscaled, mean, rstd = torch.native_layer_norm(wide, shape, None, None, eps)
    out = unscaled if weight is None else unscaled * weight
    out = out if bias is None else out + bias

    def term(t: Terms) -> Any:
        scaled = _times(_core(t(input), wide, shape, mean, rstd), weight)
        return _affine(t, scaled, unscaled, weight, bias, _as_it_is)

    return out.to(float32_under_autocast(input)), term


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter


def _channels(ndim: int) -> Callable[[Tensor], Tensor]:
    """Return what spreads an entry for each channel."""
    return lambda parameter: parameter.reshape(-1, *[1] * (ndim - 2))


def _groups(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Any]:
    """Standardise each of some groups of channels, then scale and shift each channel."""
    spread = _channels(input.ndim)
    wide = None if weight is None else spread(weight)
    if not input.numel():
        empty = lambda t: _affine(t, _times(t(input), wide), input, weight, bias, spread)  # noqa: E731
        return per_channel(input, weight, bias), empty
    grouped = input.reshape(input.shape[0], groups, -1)
    shape = [grouped.shape[-1]]
    out, mean, rstd = torch.native_layer_norm(grouped, shape, None, None, eps)
    unscaled = out.reshape(input.shape)

    def term(t: Terms) -> Any:
        x = t(input)
        core = None
        if x is not None:
            core = _core(x.reshape(grouped.shape), grouped, shape, mean, rstd).reshape(input.shape)
        return _affine(t, _times(core, wide), unscaled, weight, bias, spread)

    return per_channel(unscaled, weight, bias), term


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
    return per_channel(out, weight, bias)


@together(F.group_norm, torch.group_norm, kind="symmetric", beyond=_group_norm_written)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> tuple[Tensor, Any]:
    return _groups(input, num_groups, weight, bias, eps)


def _by_constants(
    input: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Any]:
    """Standardise each channel by running statistics, then scale and shift it."""
    spread = _channels(input.ndim)
    scale = (var + eps).rsqrt()
    unscaled = (input - spread(mean)) * spread(scale)

    def term(t: Terms) -> Any:
        if t(mean) is not None or t(var) is not None:
            raise NotCoveredError("running statistics that are differentiated")
        scaled = t(input)
        if scaled is not None:
            scaled = scaled * spread(scale if weight is None else scale * weight)
        return _affine(t, scaled, unscaled, weight, bias, spread)

    return per_channel(unscaled, weight, bias), term


@together(F.instance_norm, kind="symmetric", beyond=written_by_repair)
def _instance_norm(
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
        return _by_constants(input, running_mean, running_var, weight, bias, eps)
    F._verify_spatial_size(input.size())  # type: ignore[attr-defined]
    return _groups(input, input.shape[1], weight, bias, eps)


@together(F.batch_norm, kind="symmetric", beyond=written_by_repair)
def _batch_norm(
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
        return _by_constants(input, running_mean, running_var, weight, bias, eps)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    if not input.numel():
        return _groups(input, 1, weight, bias, eps)
    spread = _channels(input.ndim)
    unscaled, mean, rstd = torch.native_batch_norm(
        input, None, None, None, None, True, momentum, eps
    )

    def term(t: Terms) -> Any:
        scaled = t(input)
        if scaled is not None:
            scaled = _aten.native_batch_norm_backward(
                scaled, input, None, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
        scaled = _times(scaled, None if weight is None else spread(weight))
        return _affine(t, scaled, unscaled, weight, bias, spread)

    return per_channel(unscaled, weight, bias), term


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
