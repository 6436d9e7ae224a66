"""Evaluating a loss in double precision: what is left of a difference there is no rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secorder_func import tree
from secorder_func.typing import Tree

__all__ = ["InDouble", "widened", "wider"]

_TENSOR: Any = torch.Tensor
_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS = (_TENSOR.float, _TENSOR.half, _TENSOR.bfloat16)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of double precision for a floating or complex one, others as they are."""
    return _WIDER.get(dtype, dtype)


class InDouble(TorchFunctionMode):
    """Evaluates in double precision: every floating tensor and every dtype that a function is given is widened.

    Captured tensors are widened once an evaluation, so that what the loss writes to one is there when it is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._widened: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            func = _TENSOR.double
        return func(*self._wide(tuple(args)), **self._wide(dict(kwargs or {})))

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in _WIDER:
                return value
            if id(value) not in self._widened:
                self._widened[id(value)] = (value, value.to(_WIDER[value.dtype]))
            return self._widened[id(value)][1]
        if isinstance(value, torch.dtype):
            return wider(value)
        if type(value) is tuple or type(value) is list:
            return type(value)(self._wide(item) for item in value)
        if type(value) is dict:
            return {key: self._wide(item) for key, item in value.items()}
        return value


def widened(given: Tree) -> Tree:
    """Return a tree with its floating tensors in double precision."""
    tensors, restore = tree.tensors_and_rest(given)
    return restore([t.to(wider(t.dtype)) for t in tensors])
