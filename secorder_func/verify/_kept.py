"""Copies of what a loss could change, to see whether it did and to put it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secorder_func import tree
from secorder_func.typing import Tree

__all__ = ["Kept"]


class Kept:
    """Parameters, the parameters and buffers of modules, and the `.grad` of all, as they are now."""

    def __init__(self, params: Tree, modules: list[tuple[str, nn.Module]]) -> None:
        self._tensors: dict[Any, tuple[str, Tensor, Tensor]] = {}
        self._grads: dict[int, tuple[str, Tensor, Tensor | None, Tensor | None]] = {}
        self.num_buffers = 0
        for path, leaf in zip(tree.paths(params), tree.flatten(params)[0], strict=True):
            self._keep(f"params{path}", leaf)
        for owner, module in modules:
            for name, parameter in module.named_parameters():
                if not nn.parameter.is_lazy(parameter):
                    self._keep(f"the parameter {name} of {owner}", parameter)
            for name, buffer in module.named_buffers():
                before = len(self._tensors)
                if not nn.parameter.is_lazy(buffer):
                    self._keep(f"the buffer {name} of {owner}", buffer)
                self.num_buffers += len(self._tensors) - before

    def _keep(self, name: str, tensor: Tensor) -> None:
        if _place(tensor) not in self._tensors:
            self._tensors[_place(tensor)] = (name, tensor, tensor.detach().clone())
        if tensor.is_leaf and id(tensor) not in self._grads:
            grad = tensor.grad
            copy = None if grad is None else grad.detach().clone()
            self._grads[id(tensor)] = (name, tensor, grad, copy)

    def put_back(self) -> list[str]:
        """Put everything back as it was; return the names of what had changed."""
        return [*self._put_tensors_back(), *self._put_grads_back()]

    def _put_tensors_back(self) -> Iterator[str]:
        for name, tensor, copy in self._tensors.values():
            if not _same(tensor, copy):
                _overwrite(tensor, copy)
                yield name

    def _put_grads_back(self) -> Iterator[str]:
        for name, tensor, grad, copy in self._grads.values():
            intact = tensor.grad is grad
            if not intact:
                tensor.grad = grad
            if grad is not None and copy is not None and not _same(grad, copy):
                _overwrite(grad, copy)
                intact = False
            if not intact:
                yield f"the .grad of {name}"


def _place(tensor: Tensor) -> Any:
    """Return what two tensors with one memory have in common."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr() or id(tensor), tuple(tensor.shape)


def _same(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        tensor, copy = tensor.to_dense(), copy.to_dense()
    return tensor.shape == copy.shape and bool(
        ((tensor == copy) | ((tensor != tensor) & (copy != copy))).all()
    )


def _overwrite(tensor: Tensor, copy: Tensor) -> None:
    with torch.no_grad():
        tensor.data.copy_(copy)
