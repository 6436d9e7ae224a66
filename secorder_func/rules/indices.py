"""Functions that read a tensor of indices, which torch's transforms wrap."""

from __future__ import annotations

from collections.abc import Callable
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
    plain = unwrapped(value)  # not by tolist(), which torch 2.9 refuses inside a transform
    return tuple(int(entry) for entry in plain) if plain.ndim else int(plain)


_SCALAR_INDEX = "with a 0-dim index torch's rules for vmap of derivatives have wrong shapes"


def _index_of_rows(function: Callable[..., Any]) -> None:
    @repairs(function, because=_SCALAR_INDEX)
    def _one_row(
        rules: Rules, input: Tensor, dim: int, index: Tensor, source: Tensor, **kwargs: Any
    ) -> Any:
        if index.ndim == 0:
            index = index.reshape(1)
            source = source.unsqueeze(dim) if source.ndim < input.ndim else source
        return function(input, dim, index, source, **kwargs)


for _name in ("index_copy", "index_add"):
    _index_of_rows(getattr(torch, _name))
    _index_of_rows(getattr(torch.Tensor, _name))
    _index_of_rows(getattr(torch.Tensor, _name + "_"))


@repairs(torch.index_select, torch.Tensor.index_select, because=_SCALAR_INDEX)
def _index_select(rules: Rules, input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
    if index.ndim == 0 and input.ndim > 1:
        index = index.reshape(1)
    return torch.index_select(input, dim, index, **kwargs)


_WRONG_FILL = (
    "vmap of its forward rule takes one differentiable value for all (14 to 56 % off in 2.13)"
)


@repairs(torch.index_fill, torch.Tensor.index_fill, because=_WRONG_FILL)
def _index_fill(rules: Rules, input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.index_fill(input, dim, index, value)
    length = input.shape[dim] if input.ndim else 1
    filled = torch.zeros(length, dtype=torch.bool, device=input.device)
    filled = filled.index_fill(0, index.reshape(-1), True)
    behind = input.ndim - 1 - dim % max(1, input.ndim)
    where = filled.reshape(-1, *[1] * behind) if input.ndim else filled.reshape(())
    return torch.where(where, value.to(input.dtype), input)


@repairs(torch.Tensor.index_fill_, because=_WRONG_FILL)
def _index_fill_(rules: Rules, input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return input.index_fill_(dim, index, value)
    return input.copy_(_index_fill(rules, input, dim, index, value))


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


@repairs(
    torch.masked_select,
    torch.Tensor.masked_select,
    because="where it broadcasts, vmap of its second derivative sums over the wrong dimension",
)
def _masked_select(rules: Rules, input: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    if input.shape != mask.shape:
        input, mask = torch.broadcast_tensors(input, mask)
    return torch.masked_select(input, mask, **kwargs)
