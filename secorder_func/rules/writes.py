"""Which arguments a torch function writes to, and the stand-ins that take the writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.errors import ArgumentError
from secorder_func.rules.registry import Rules, repairs

__all__ = ["asks_in_place", "not_in_place", "redirected", "writes_first"]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_OPERATORS = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]
_DUNDER_WRITES = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS)})
_NOT_WRITES = frozenset({"requires_grad_", "share_memory_"})
_TENSOR: Any = torch.Tensor
_SET_DATA = _TENSOR.data.__set__


@cache
def _writes_by_name(function: Callable[..., Any]) -> bool:
    """Say whether torch's naming rule makes a function one that writes its first argument."""
    name = getattr(function, "__name__", "")
    if name in _DUNDER_WRITES:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITES


@cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    """Return where a function of torch.nn.functional takes `inplace`, None if it does not."""
    names = _parameters(function)
    return names.index("inplace") if "inplace" in names else None


@cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of a function of torch.nn.functional."""
    if not isinstance(function, FunctionType) or function.__module__ != F.__name__:
        return []
    return list(inspect.signature(function).parameters)


def writes_first(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Say whether a call writes to its first argument."""
    if not args:
        return False
    return (
        _writes_by_name(function) or function == _SET_DATA or asks_in_place(function, args, kwargs)
    )


def asks_in_place(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> bool:
    """Say whether a call of a function of torch.nn.functional has `inplace=True`."""
    place = _place_of_inplace(function)
    if place is None:
        return False
    return bool(args[place] if len(args) > place else kwargs.get("inplace", False))


def not_in_place(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return the arguments of such a call without its `inplace=True`."""
    place = _place_of_inplace(function)
    assert place is not None
    return args[:place], {
        **kwargs,
        **dict(zip(_parameters(function)[place:], args[place:], strict=False)),
        "inplace": False,
    }


def redirected(
    function: Callable[..., Any], args: Args, kwargs: Kwargs, stand_in: Callable[[Tensor], Tensor]
) -> tuple[Args, Kwargs, bool]:
    """Return the arguments with a stand-in for what the function writes to, and whether it writes its first."""
    if isinstance(kwargs.get("out"), Tensor):
        kwargs = {**kwargs, "out": stand_in(kwargs["out"])}
    if not writes_first(function, args, kwargs):
        return args, kwargs, False
    first = args[0]
    if isinstance(first, Tensor):
        first = stand_in(first)
    elif isinstance(first, (list, tuple)):  # torch._foreach_add_ and its like
        first = [stand_in(item) if isinstance(item, Tensor) else item for item in first]
    return (first, *args[1:]), kwargs, True


@repairs(_TENSOR.grad.__set__, because="what a loss does to .grad must not outlive its evaluation")
def _set_grad(rules: Rules, tensor: Tensor, value: Tensor | None) -> None:
    return None


@repairs(
    _TENSOR.backward, torch.autograd.backward, because="it would add to the .grad of parameters"
)
def _backward(rules: Rules, *args: Any, **kwargs: Any) -> None:
    raise ArgumentError(
        "The loss calls backward(), which writes to .grad. Return the loss and leave derivatives to the library; "
        "for a derivative inside the loss use torch.func.grad, or torch.autograd.grad with create_graph=True."
    )


@repairs(F.embedding, because="max_norm writes to the weight")
def _embedding(
    rules: Rules,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None and not weight.is_meta:
        used = weight.detach()[input]
        if bool((torch.linalg.vector_norm(used, norm_type, -1) > max_norm).any()):
            raise ArgumentError(
                "An embedding with max_norm would renormalise its weight, a parameter, in place. "
                "Evaluate the model once before, so that the rows in use are within max_norm."
            )
    return F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
