"""What functorch's levels say: which of them differentiate, and what they wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

__all__ = [
    "JVP",
    "differentiating_levels",
    "innermost_is_vmap",
    "mapping",
    "requires_gradients",
    "unwrapped",
]

JVP = _functorch.TransformType.Jvp
_VMAP = _functorch.TransformType.Vmap


def differentiating_levels() -> list[Any]:
    """Return the kinds of the levels in force that differentiate, outermost first; none that Dynamo could show."""
    return [kind for kind in _kinds() if kind in (_functorch.TransformType.Grad, JVP)]


def innermost_is_vmap() -> bool:
    """Say whether the level in force maps."""
    return _kinds()[-1:] == [_VMAP]


def mapping() -> bool:
    """Say whether some level maps."""
    return _VMAP in _kinds()


def _kinds() -> list[Any]:
    if torch.compiler.is_compiling():
        return []
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def requires_gradients(tensor: Tensor) -> bool:
    """Say whether some level, or plain autograd, takes the gradient in a tensor."""
    while not tensor.requires_grad and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside all levels."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
