"""Layer norm, and batch norm in evaluation mode, for plain dual numbers: closed forms out of torch's fused kernels.

torch differentiates the backward pass of layer norm in forward mode by a decomposition that meets tangents of zero: a
fifth of a Hessian-vector product of a GPT. The Jacobian of the standardisation `y = (x - mean) / std` of `n` entries is
symmetric, `J = r (I - 1 1^T / n - y y^T / n)` with `r = 1 / std`, so that one fused kernel gives `J v` and `J^T g`; its
derivative along a tangent `x'`, with `a = y . x' / n`, is `J' = -r a J - r (y' y^T + y y'^T) / n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_dual", "standardised", "standardised_by", "usual"]


class _Standardised(torch.autograd.Function):
    keeps_tangents = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, shape, None, None, eps)
        ctx.shape, ctx.mean, ctx.r = shape, mean, r
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        ctx.tangents = None
        return y

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, shape: None, eps: None) -> Tensor:
        x, y = ctx.saved_tensors
        bent = _times_jacobian(ctx, tangent, x)
        ctx.tangents = bent, _mean(y * tangent, ctx.axes)
        return bent

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, y = (forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors)
        value, tangent = forward_ad.unpack_dual(g)
        result = _times_jacobian(ctx, value, x)
        if ctx.tangents is None:
            moved = torch.zeros_like(result)
        else:
            bent, a = ctx.tangents
            along = bent * _mean(y * value, ctx.axes) + y * _mean(bent * value, ctx.axes)
            moved = -ctx.r * (a * result + along)
        if tangent is not None:
            moved = moved + _times_jacobian(ctx, tangent, x)
        return forward_ad.make_dual(result, moved), None, None


def _times_jacobian(ctx: Any, vector: Tensor, x: Tensor) -> Tensor:
    mask = [True, False, False]
    product: Tensor = torch.ops.aten.native_layer_norm_backward(
        vector.contiguous(), x, ctx.shape, ctx.mean, ctx.r, None, None, mask
    )[0]
    return product


def _mean(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.mean(axes, keepdim=True)


class _Affine(torch.autograd.Function):
    """`scale * x + shift` with constants, whose tangents of zero torch would compute with."""

    keeps_tangents = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.scale = scale
        return torch.addcmul(shift, x, scale)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, scale: None, shift: None) -> Tensor:
        return tangent * ctx.scale  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        value, tangent = forward_ad.unpack_dual(g)
        result = value * ctx.scale
        if tangent is not None:
            result = forward_ad.make_dual(result, tangent * ctx.scale)
        return result, None, None


_apply: Any = _Standardised.apply
_affine: Any = _Affine.apply


def standardised_by(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return `(x - mean) / sqrt(var + eps)` for constants of each channel, the second axis."""
    with torch.no_grad():
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(var + eps).to(x.dtype)
        shift = -mean.to(x.dtype) * scale
    result: Tensor = _affine(x, scale.reshape(shape), shift.reshape(shape))
    return result


def standardised(x: Tensor, shape: Sequence[int], eps: float) -> Tensor:
    """Return `(x - mean) / sqrt(var + eps)` over the last axes, which have this shape."""
    result: Tensor = _apply(x, tuple(shape), eps)
    return result


def usual(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Say whether a layer norm is one that this module takes: of dual numbers, all of one dtype."""
    return (
        is_dual(x)
        and 0 < len(shape) <= x.ndim
        and tuple(shape) == tuple(x.shape[-len(shape) :])
        and all(
            t is None or (t.dtype == x.dtype and t.shape == tuple(shape)) for t in (weight, bias)
        )
    )


def is_dual(x: Tensor) -> bool:
    """Say whether these are dual numbers of a dtype in which torch computes as it stands."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and forward_ad.unpack_dual(x).tangent is not None
    )
