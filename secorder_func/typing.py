"""The vocabulary of the library's signatures.

A `Tree` is any pytree of tensors that optree knows: a tensor, a dict, a list, a tuple, a named tuple,
a registered class, nested at will. The aliases document intent; they do not restrict types.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor

__all__ = ["ChunkSize", "LossFn", "MatVec", "Mode", "ModelFn", "Tree"]

Tree: TypeAlias = Any
"""A pytree of tensors."""

LossFn: TypeAlias = Callable[..., Tensor]
"""`(params, *args, **kwargs) -> scalar`, or `(outputs, targets) -> scalar` beside a `ModelFn`."""

ModelFn: TypeAlias = Callable[[Tree, Any], Tree]
"""`(params, inputs) -> outputs`."""

MatVec: TypeAlias = Callable[[Tree], Tree]
"""A linear map from a tree to a tree of the same structure."""

Mode: TypeAlias = Literal[
    "auto",
    "reverse_over_forward",
    "forward_over_reverse",
    "reverse_over_reverse",
    "double_backward",
]
"""How an exact product is differentiated; see `secorder_func.transforms.policy`."""

ChunkSize: TypeAlias = int | Literal["auto"] | None
"""How many vectors are multiplied at once: a number, all (None), or as many as fit a budget of memory."""
