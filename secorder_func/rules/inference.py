"""Out of the caller's inference mode, in which torch's transforms give zeros (2.9) or none (2.13)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree

__all__ = ["out_of_inference_mode", "without_inference_tensors"]


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """Leave inference mode inside, if the caller is in it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield


def without_inference_tensors(value: Any) -> Any:
    """Return a tree with copies of the tensors that were made in inference mode, which autograd cannot save."""
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        if not value.is_inference():
            return value
    elif type(value) is list and all(isinstance(item, Tensor) for item in value):
        if not any(item.is_inference() for item in value):  # without taking a tree apart
            return value
    elif not any(tensor.is_inference() for tensor in tree.tensors_in(value)):
        return value

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

    with out_of_inference_mode():
        return tree.map(copied, value)
