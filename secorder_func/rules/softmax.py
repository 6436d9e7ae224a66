"""Softmax, log-softmax and cross-entropy in forward mode.

torch takes the forward derivative of log-softmax's backward pass through a decomposition that meets tangents of zero,
whose shapes it computes in Python: 0.3 ms of a product whatever its size. Written out of `logsumexp`, the same
functions are right in every order of modes, and faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules import dual_softmax
from secorder_func.rules.dual_norm import is_dual
from secorder_func.rules.registry import Rules, repairs, takes_dual_numbers, takes_tangents

__all__: list[str] = []

_SLOW = "forward mode differentiates its backward pass by a decomposition in Python"


@repairs(F.log_softmax, because=_SLOW)
def _log_softmax(
    rules: Rules,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is None or dtype is not None or not (takes_tangents(rules) and _is_usual(input, dim)):
        return F.log_softmax(input, dim, _stacklevel, dtype)
    return _written_out(rules, input, dim)


@repairs(F.cross_entropy, because=_SLOW)
def _cross_entropy(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options: Any = {
        "weight": weight,
        "size_average": size_average,
        "ignore_index": ignore_index,
        "reduce": reduce,
        "reduction": reduction,
    }
    dim = 0 if input.ndim == 1 else 1
    labels = not (target.is_floating_point() or label_smoothing)
    if not (takes_tangents(rules) and labels and input.ndim and _is_usual(input, dim)):
        return F.cross_entropy(input, target, **options, label_smoothing=label_smoothing)
    return F.nll_loss(_written_out(rules, input, dim), target, **options)


def _is_usual(input: Tensor, dim: int) -> bool:
    """Say whether torch computes with the dtype of the input, and there is something to compute."""
    return input.dtype in (torch.float32, torch.float64) and bool(input.numel())


def _written_out(rules: Rules, input: Tensor, dim: int) -> Tensor:
    if takes_dual_numbers(rules) and is_dual(input):
        return dual_softmax.log_softmax(input, dim)
    return input - input.logsumexp(dim, keepdim=True)


@repairs(F.softmax, because=_SLOW)
def _softmax(
    rules: Rules,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is None or dtype is not None or not (takes_dual_numbers(rules) and is_dual(input)):
        return F.softmax(input, dim, _stacklevel, dtype)
    return dual_softmax.softmax(input, dim)


@repairs(torch.softmax, torch.Tensor.softmax, because=_SLOW)
def _direct_softmax(rules: Rules, input: Tensor, dim: Any, *args: Any, **kwargs: Any) -> Tensor:
    if (
        args
        or kwargs
        or not (isinstance(dim, int) and takes_dual_numbers(rules) and is_dual(input))
    ):
        return torch.softmax(input, dim, *args, **kwargs)
    return dual_softmax.softmax(input, dim)
