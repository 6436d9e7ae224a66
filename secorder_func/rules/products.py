"""Products and their cumulations, right also with zeros among the factors.

torch divides by the factors in its forward rules; where one is zero, derivatives of these rules are NaN or wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.registry import Rules, forward_is_differentiated, repairs

__all__: list[str] = []

_WRONG = "derivatives of its forward rule are NaN or wrong where a factor is zero (2.13)"


@repairs(torch.prod, torch.Tensor.prod, because=_WRONG)
def _prod(
    rules: Rules,
    input: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Tensor:
    if not _is_written_out(rules, input) or kwargs or isinstance(dim, str):
        given = () if dim is None else (dim, keepdim)
        return torch.prod(input, *given, dtype=dtype, **kwargs)
    x = input if dtype is None else input.to(dtype)
    if dim is None:
        return _product(x.reshape(-1))
    product = _product(x.movedim(dim, -1))
    return product.unsqueeze(dim) if keepdim else product


@repairs(torch.cumprod, torch.Tensor.cumprod, because=_WRONG)
def _cumprod(
    rules: Rules, input: Tensor, dim: Any, *, dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    if not _is_written_out(rules, input) or kwargs or isinstance(dim, str):
        return torch.cumprod(input, dim, dtype=dtype, **kwargs)
    x = (input if dtype is None else input.to(dtype)).movedim(dim, -1)
    step = 1
    while step < x.shape[-1]:  # after each round an entry is the product of 2 * step factors
        x = torch.cat([x[..., :step], x[..., step:] * x[..., :-step]], -1)
        step *= 2
    return x.movedim(-1, dim)


def _is_written_out(rules: Rules, input: Tensor) -> bool:
    floating = input.is_floating_point() or input.is_complex()
    return floating and input.ndim > 0 and input.numel() > 0 and forward_is_differentiated(rules)


def _product(x: Tensor) -> Tensor:
    """Return the product over the last axis, in pairs."""
    while (length := x.shape[-1]) > 1:
        half = length // 2
        pairs = x[..., :half] * x[..., half : 2 * half]
        x = torch.cat([pairs, x[..., 2 * half :]], -1)
    return x[..., 0]
