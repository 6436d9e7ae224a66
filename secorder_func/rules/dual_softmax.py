"""Softmax and log-softmax for plain dual numbers, by closed forms out of torch's fused kernels.

torch differentiates their backward passes in forward mode by a decomposition that meets tangents of zero, whose shapes
it computes in Python. With `y = softmax(x)` the Jacobian of softmax is `diag(y) - y y^T`, symmetric, and that of
log-softmax `I - 1 y^T`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["log_softmax", "softmax"]


class _Softmax(torch.autograd.Function):
    keeps_tangents = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = torch.softmax(x, dim)
        ctx.dim, ctx.tangent = dim, None
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, dim: None) -> Tensor:
        (y,) = ctx.saved_tensors
        ctx.tangent = _pulled(tangent, y, ctx.dim)
        return ctx.tangent  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y = forward_ad.unpack_dual(ctx.saved_tensors[0]).primal
        value, tangent = forward_ad.unpack_dual(g)
        result = _pulled(value, y, ctx.dim)
        moved = torch.zeros_like(y) if tangent is None else _pulled(tangent, y, ctx.dim)
        if ctx.tangent is not None:
            centred = value - (y * value).sum(ctx.dim, keepdim=True)
            moved = moved + ctx.tangent * centred
            moved = moved - y * (ctx.tangent * value).sum(ctx.dim, keepdim=True)
        return forward_ad.make_dual(result, moved), None


class _LogSoftmax(torch.autograd.Function):
    keeps_tangents = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        z = torch.log_softmax(x, dim)
        ctx.dim, ctx.tangent = dim, None
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)
        return z

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, dim: None) -> Tensor:
        (z,) = ctx.saved_tensors
        ctx.tangent = tangent - (z.exp() * tangent).sum(ctx.dim, keepdim=True)
        return ctx.tangent  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y = forward_ad.unpack_dual(ctx.saved_tensors[0]).primal.exp()
        value, tangent = forward_ad.unpack_dual(g)
        total = value.sum(ctx.dim, keepdim=True)
        result = value - y * total
        moved = torch.zeros_like(y)
        if tangent is not None:
            moved = tangent - y * tangent.sum(ctx.dim, keepdim=True)
        if ctx.tangent is not None:
            moved = moved - y * ctx.tangent * total
        return forward_ad.make_dual(result, moved), None


def _pulled(vector: Tensor, y: Tensor, dim: int) -> Tensor:
    product: Tensor = torch.ops.aten._softmax_backward_data(vector, y, dim, y.dtype)
    return product


_softmax: Any = _Softmax.apply
_log_softmax: Any = _LogSoftmax.apply


def softmax(x: Tensor, dim: int) -> Tensor:
    """Return `softmax(x, dim)`."""
    result: Tensor = _softmax(x, dim)
    return result


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """Return `log_softmax(x, dim)`."""
    result: Tensor = _log_softmax(x, dim)
    return result
