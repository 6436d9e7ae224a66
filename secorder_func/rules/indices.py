"""Functions that read a tensor of indices, which torch's transforms wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import unwrapped
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    torch.tensor_split,
    torch.Tensor.tensor_split,
    because="it reads a tensor of indices from memory that a wrapped tensor lacks",
)
def _tensor_split(rules: Rules, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return torch.tensor_split(
        input, *map(_as_numbers, args), **{key: _as_numbers(value) for key, value in kwargs.items()}
    )


def _as_numbers(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    numbers: Any = unwrapped(value).tolist()
    return tuple(numbers) if isinstance(numbers, list) else numbers


@repairs(
    torch.as_strided_scatter,
    torch.Tensor.as_strided_scatter,
    because="its gradient in input is that of no function: not zero where src is written (2.13)",
)
def _as_strided_scatter(
    rules: Rules,
    input: Tensor,
    src: Tensor,
    size: Any,
    stride: Any,
    storage_offset: int | None = None,
) -> Tensor:
    if not input.is_contiguous():
        raise NoExactRouteError(
            "torch's derivatives of as_strided_scatter are wrong; pass it a contiguous tensor, or use scatter"
        )
    places = torch.full((), storage_offset or 0, device=input.device)
    for length, step in zip(size, stride, strict=True):
        places = places.unsqueeze(-1) + step * torch.arange(length, device=input.device)
    return input.reshape(-1).scatter(0, places.reshape(-1), src.reshape(-1)).reshape(input.shape)
