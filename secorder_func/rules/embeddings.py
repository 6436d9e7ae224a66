"""Bags of embeddings as sums of gathered rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs
from secorder_func.rules.segments import reduced_segments

__all__: list[str] = []


@repairs(F.embedding_bag, because="its backward has no derivative in torch")
def _embedding_bag(
    rules: Rules,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    traced_max = mode == "max" and torch.compiler.is_compiling()
    unusual = max_norm is not None or scale_grad_by_freq or sparse or traced_max
    if unusual or mode not in ("sum", "mean", "max") or input.ndim != (2 if offsets is None else 1):
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if mode == "max":
        return _maxima(rules, input, weight, offsets, include_last_offset, padding_idx)
    indices, bags, count = _bags(input, offsets, include_last_offset)
    entries = torch.ones_like(weight[:1, :1]).expand(len(indices), 1)
    if padding_idx is not None:
        padding = padding_idx % weight.shape[0]
        entries = torch.where((indices == padding).unsqueeze(1), torch.zeros_like(entries), entries)
    rows = F.embedding(indices, weight) * entries
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    output = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "mean":
        sizes = entries.new_zeros(count, 1).index_add(0, bags, entries)
        output = output / sizes.clamp(min=1)
    return output


def _bags(
    input: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor, int]:
    """Return the indices, the bag of each, and the number of bags."""
    if offsets is None:
        count, length = input.shape
        bags = torch.arange(count, device=input.device).repeat_interleave(length)
        return input.reshape(-1), bags, count
    starts = offsets[:-1] if include_last_offset else offsets
    positions = torch.arange(len(input), device=input.device)
    bags = torch.searchsorted(starts.to(positions.dtype).contiguous(), positions, right=True) - 1
    return input, bags, len(starts)


def _maxima(
    rules: Rules,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """Return the greatest entry of each column in a bag, zeros for an empty bag."""
    rows = F.embedding(input.reshape(-1), weight)
    if padding_idx is not None:
        padding = (input.reshape(-1) == padding_idx % weight.shape[0]).unsqueeze(1)
        rows = torch.where(padding, -torch.inf, rows)
    if offsets is None:
        maxima = rows.reshape(*input.shape, weight.shape[1]).amax(1)
    else:
        last = offsets.new_full((1,), len(input))
        edges = offsets if include_last_offset else torch.cat([offsets, last])
        maxima = reduced_segments(rows, "max", edges.diff(), edges[:-1])
    return torch.where(maxima.isinf(), 0.0, maxima)
