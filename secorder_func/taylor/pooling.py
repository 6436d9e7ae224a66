"""Pooling by the largest entry, which takes the term from where the entry was."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.registry import Terms, together

__all__: list[str] = []


def _with_indices(name: str, dims: int) -> None:
    pool: Any = getattr(F, name)
    pool_with_indices: Any = getattr(F, f"{name}_with_indices")

    def taken(t: Terms, indices: Tensor, input: Tensor) -> Any:
        flat = t(input).flatten(-dims).gather(-1, indices.flatten(-dims))
        return flat.reshape(indices.shape)

    @together(pool_with_indices, kind="selection")
    def both(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, indices = pool_with_indices(input, *args, **kwargs)
        return (out, indices), lambda t: (taken(t, indices, input), None)

    @together(pool, kind="selection")
    def alone(
        input: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        if return_indices:
            return both(input, *args, **kwargs)
        out, indices = pool_with_indices(input, *args, **kwargs)
        return out, lambda t: taken(t, indices, input)


for _kind in ("max_pool", "adaptive_max_pool"):
    for _dims in (1, 2, 3):
        _with_indices(f"{_kind}{_dims}d", _dims)
for _dims in (2, 3):
    _with_indices(f"fractional_max_pool{_dims}d", _dims)
