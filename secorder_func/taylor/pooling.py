"""Pooling by the largest entry, which takes the term from where the entry was."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.registry import Terms, tangent

__all__: list[str] = []


def _with_indices(name: str, dims: int) -> None:
    pool: Any = getattr(F, name)
    pool_with_indices: Any = getattr(F, f"{name}_with_indices")

    def value(*args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        asked = kwargs.pop("return_indices", False)
        out, indices = pool_with_indices(*args, **kwargs)
        return ((out, indices) if asked else out), indices

    def value_with_indices(*args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        out, indices = pool_with_indices(*args, **kwargs)
        return (out, indices), indices

    def taken(t: Terms, indices: Tensor, input: Tensor) -> Any:
        term = t(input)
        assert term is not None
        flat = term.flatten(-dims).gather(-1, indices.flatten(-dims))
        return flat.reshape(indices.shape)

    @tangent(pool, kind="closed", value=value)
    def push(t: Terms, pair: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        term = taken(t, pair[1], input)
        return (term, None) if isinstance(pair[0], tuple) else term

    @tangent(pool_with_indices, kind="closed", value=value_with_indices)
    def push_with_indices(t: Terms, pair: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return taken(t, pair[1], input), None


for _kind in ("max_pool", "adaptive_max_pool"):
    for _dims in (1, 2, 3):
        _with_indices(f"{_kind}{_dims}d", _dims)
for _dims in (2, 3):
    _with_indices(f"fractional_max_pool{_dims}d", _dims)
