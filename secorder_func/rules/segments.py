"""Reductions of segments, as reductions of a padded table of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.levels import unwrapped
from secorder_func.rules.registry import Rules, repairs

__all__ = ["reduced_segments"]

_NEUTRAL = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}


@repairs(torch.segment_reduce, because="its backward has no derivative in torch")
def _segment_reduce(
    rules: Rules,
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> Tensor:
    bounds = lengths if lengths is not None else offsets
    common = bounds is not None and bounds.ndim == 1 and axis == 0 and indices is None
    if not common or reduce not in _NEUTRAL or torch.compiler.is_compiling():
        return torch.segment_reduce(
            data,
            reduce,
            lengths=lengths,
            indices=indices,
            offsets=offsets,
            axis=axis,
            unsafe=unsafe,
            initial=initial,
        )
    if lengths is not None:
        return reduced_segments(data, reduce, lengths, lengths.cumsum(0) - lengths, initial)
    assert offsets is not None
    return reduced_segments(data, reduce, offsets.diff(), offsets[:-1], initial)


def reduced_segments(
    data: Tensor, reduce: str, lengths: Tensor, starts: Tensor, initial: Any = None
) -> Tensor:
    """Reduce the rows `starts[k]` to `starts[k] + lengths[k] - 1` of `data` for each k, in a padded table."""
    lengths, starts = unwrapped(lengths), unwrapped(starts)
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=data.device)
    entries = [1] * (data.ndim - 1)
    inside = (steps < lengths.unsqueeze(1)).reshape(len(lengths), longest, *entries)
    places = (starts.unsqueeze(1) + steps).clamp(max=max(0, data.shape[0] - 1))
    neutral = torch.full((), _NEUTRAL[reduce], dtype=data.dtype, device=data.device)
    rows = torch.where(inside, data[places], neutral)  # (segments, longest, ...)
    if initial is not None:
        rows = torch.cat([torch.full_like(rows[:, :1], initial), rows], 1)
        lengths = lengths.clamp(min=1)  # a mean divides by what the data alone count
    if reduce == "sum":
        return rows.sum(1)
    if reduce == "mean":
        return rows.sum(1) / lengths.reshape(-1, *entries)
    if reduce == "prod":
        return rows.prod(1)
    extreme: Tensor = rows.amax(1) if reduce == "max" else rows.amin(1)
    return extreme
