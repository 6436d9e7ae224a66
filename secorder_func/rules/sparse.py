"""Sparse tensors with differentiable values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import requires_gradients
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    torch.sparse_coo_tensor,
    because="its backward gives a second derivative in the values that is 100 to 120 % off (2.13)",
)
def _sparse_coo_tensor(rules: Rules, *args: Any, **kwargs: Any) -> Tensor:
    values = kwargs.get("values", args[1] if len(args) > 1 else None)
    if isinstance(values, Tensor) and requires_gradients(values):
        raise NoExactRouteError(
            "torch has no right second derivative of sparse_coo_tensor in its values; "
            "scatter them into a dense tensor, or multiply by gather and index_add"
        )
    return torch.sparse_coo_tensor(*args, **kwargs)
