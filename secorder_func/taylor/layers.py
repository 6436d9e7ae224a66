"""What is written out of other functions: dropout, attention, norms and distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.levels import mapping, unwrapped
from secorder_func.taylor.losses import reduced
from secorder_func.taylor.registry import written

__all__: list[str] = []


def _dropped(input: Tensor, p: float, train: bool, drop: Callable[[], Any]) -> Any:
    """Return what `drop` does where something is dropped, and something kept."""
    if not train or p == 0.0:
        return input
    return input * torch.zeros_like(input) if p == 1.0 else drop()


def _kept(input: Tensor, p: float) -> Tensor:
    """Return ones and zeros for the entries, in the order in which a plain evaluation draws them."""
    if mapping():  # vmap knows whether what it maps shares them
        return F.dropout(torch.ones_like(input), p, True).ne(0).to(input.dtype)
    return torch.empty_like(unwrapped(input), requires_grad=False).bernoulli_(1 - p)


def _kept_channels(input: Tensor, p: float) -> Tensor:
    """Return a one or a zero for each channel of each sample, as torch draws them."""
    shape = (*input.shape[:2], *[1] * (input.ndim - 2))
    if mapping():
        ones = torch.ones_like(input).reshape(*input.shape[:2], -1)[..., :1].reshape(shape)
        return F.dropout(ones, p, True).ne(0).to(input.dtype)
    plain = unwrapped(input)
    return torch.empty(shape, dtype=plain.dtype, device=plain.device).bernoulli_(1 - p)


@written(F.dropout)
def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return _dropped(input, p, training, lambda: input * _kept(input, p).div_(1 - p))


@written(torch.feature_dropout)
def _feature_dropout(input: Tensor, p: float, train: bool) -> Any:
    return _dropped(input, p, train, lambda: input * _kept_channels(input, p).div_(1 - p))


_ALPHA = 1.7580993408473766


def _alpha(input: Tensor, kept: Tensor, p: float) -> Any:
    """Return an affine function of what is kept, with mean and variance as before."""
    a = 1 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    b = kept.add(-1).mul_(_ALPHA * a).add_(_ALPHA * a * p)
    return input * kept.mul(a) + b


@written(torch.alpha_dropout)
def _alpha_dropout(input: Tensor, p: float, train: bool) -> Any:
    return _dropped(input, p, train, lambda: _alpha(input, _kept(input, p), p))


@written(torch.feature_alpha_dropout)
def _feature_alpha_dropout(input: Tensor, p: float, train: bool) -> Any:
    return _dropped(input, p, train, lambda: _alpha(input, _kept_channels(input, p), p))


@written(F.scaled_dot_product_attention)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    idle = None
    if is_causal:
        size = query.shape[-2], key.shape[-2]
        hidden = torch.ones(size, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        idle = attn_mask.logical_not().all(-1, keepdim=True)
        scores = scores.masked_fill(attn_mask.logical_not() & ~idle, -math.inf)
    elif attn_mask is not None:
        idle = (attn_mask == -math.inf).all(-1, keepdim=True)
        scores = scores + attn_mask.masked_fill(idle, 0.0)
    shares = F.softmax(scores, -1)
    if idle is not None:
        shares = shares.masked_fill(idle, 0.0)
    if dropout_p:
        shares = F.dropout(shares, dropout_p, True)
    return torch.matmul(shares, value)


# ------------------------------------------------------------------------- distances and their losses


@written(F.cosine_similarity, torch.cosine_similarity)
def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    sizes = (torch.linalg.vector_norm(x, 2, dim, True).clamp_min(eps) for x in (x1, x2))
    first, second = sizes
    return (x1 / first * (x2 / second)).sum(dim)


@written(F.pairwise_distance, torch.pairwise_distance)
def _pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


@written(torch.margin_ranking_loss)
def _margin_ranking(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: Any = 1
) -> Any:
    return reduced((-target * (input1 - input2) + margin).clamp_min(0), reduction)


@written(torch.hinge_embedding_loss)
def _hinge_embedding(input: Tensor, target: Tensor, margin: float = 1.0, reduction: Any = 1) -> Any:
    apart = torch.where(target != 1, (margin - input).clamp_min(0), 0.0)
    together = torch.where(target != -1, input, 0.0)
    return reduced(apart + together, reduction)


@written(torch.cosine_embedding_loss)
def _cosine_embedding(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: Any = 1
) -> Any:
    small = 1e-12
    dim = target.ndim
    first = (input1 * input1).sum(dim) + small
    second = (input2 * input2).sum(dim) + small
    cosine = (input1 * input2).sum(dim) / (first * second).sqrt()
    apart = torch.where(target == -1, (cosine - margin).clamp_min(0), 0.0)
    return reduced(torch.where(target == 1, 1 - cosine, 0.0) + apart, reduction)


@written(torch.triplet_margin_loss)
def _triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: Any = 1,
) -> Any:
    near = F.pairwise_distance(anchor, positive, p, eps)
    far = F.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return reduced((margin + near - far).clamp_min(0), reduction)


@written(F.affine_grid, torch.affine_grid_generator)
def _affine_grid(theta: Tensor, size: Any, align_corners: Any = None) -> Any:
    shape = list(size)
    axes = []
    for length in shape[2:]:
        axis = torch.linspace(-1, 1, length, dtype=theta.dtype, device=theta.device)
        if length == 1:
            axis = torch.zeros_like(axis)
        axes.append(axis if align_corners else axis * ((length - 1) / length))
    grid = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([*reversed(grid), torch.ones_like(grid[0])], -1)
    moved = points.flatten(0, -2) @ theta.transpose(-2, -1)
    return moved.reshape(shape[0], *shape[2:], len(axes))


@written(torch.conv_tbc)
def _conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Any:
    out = F.conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad)
    return out.permute(2, 0, 1)
