"""What a loss writes while it is differentiated must not outlive the evaluation.

`Shadows` gives an in-place operation on a captured tensor (a module's buffer, a user's counter) a copy to work on,
which stands in for the original until the evaluation ends. `module_attributes_restored` puts back what modules
assign to their own attributes, which would otherwise keep dead functorch wrappers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules.module import register_module_forward_pre_hook

from secorder_func.rules.distributed import refuse_sharded, without_reducer
from secorder_func.rules.levels import innermost_is_vmap, unwrapped

__all__ = ["Shadows", "module_attributes_restored", "storage_of"]


class Shadows:
    """Stand-ins for captured tensors that the loss writes to, by identity.

    A tensor is captured if the evaluation has not made it. Inside a level that differentiates whatever is made carries
    that level. Without one, and under vmap alone, which wraps only what is mapped, what has a gradient history is made
    here or must not be written to anyway;
    the rest is remembered as it is born.
    """

    def __init__(self) -> None:
        self.level: int = -1 if torch.compiler.is_compiling() else _current_level()
        self.remembers = self.level <= 0 or innermost_is_vmap()
        self.born: dict[int, weakref.ref[Tensor]] = {}
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.captured: dict[int, Tensor] = {}
        self.written: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.protected: tuple[Tensor, ...] = ()

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Refuse writes to these tensors and to whatever shares their storage."""
        if not torch.compiler.is_compiling():
            self.protected = tuple(tensors)

    def note_captured(self, tensor: Tensor) -> None:
        """Remember a captured tensor that the loss uses: the result may be a view of it."""
        # In this order: while torch words an error of a backward pass, looking at grad_fn waits for ever (2.13).
        if not tensor.requires_grad and self.is_captured(tensor):
            self.captured.setdefault(storage_of(tensor), tensor)

    def note_born(self, result: Any) -> None:
        """Remember a result without gradient history, which no level marks."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                self.born[id(tensor)] = weakref.ref(tensor)

    def is_captured(self, tensor: Tensor) -> bool:
        """Say whether a tensor is older than this evaluation."""
        if self.level > 0 and _functorch.maybe_get_level(tensor) >= self.level:
            return False
        if not self.remembers:
            return True
        if tensor.requires_grad and tensor.grad_fn is not None:
            return False
        made_here = self.born.get(id(tensor))
        return made_here is None or made_here() is not tensor

    def stand_in(self, tensor: Tensor) -> Tensor:
        """Return what takes the writes to a tensor: a copy if it is captured, itself if it was made here."""
        storage = storage_of(tensor)
        if any(storage == storage_of(p) for p in self.protected):
            raise RuntimeError(
                "the loss writes to a parameter in place, so that it is no function of the parameters; "
                "write to a copy of it instead"
            )
        if id(tensor) in self.replaced:
            return self.replaced[id(tensor)][1]
        base = tensor if self.is_captured(tensor) else self.captured.get(storage)
        if base is None:
            return tensor
        copy = self._copy_of(base)
        if base is tensor:
            return copy
        return self._view_of(copy, base, tensor)

    def alias(self, tensor: Tensor) -> Tensor | None:
        """Return what stands for a tensor whose memory the loss has written to by another name, None if it has not."""
        for base, copy in self.written.get(storage_of(tensor), ()):
            first, last = _extent(tensor)
            start, end = _extent(base)
            if last < start or end < first:
                continue
            if tensor.dtype != base.dtype or copy.stride() != base.stride():
                raise _shared()
            if first < start or last > end:
                raise _shared()
            return self._view_of(copy, base, tensor)
        return None

    def _view_of(self, copy: Tensor, base: Tensor, tensor: Tensor) -> Tensor:
        """Return the part of a copy that a tensor is of its base, and remember it as the tensor's stand-in."""
        offset = copy.storage_offset() + tensor.storage_offset() - base.storage_offset()
        view = copy.as_strided(tensor.size(), tensor.stride(), offset)
        self.replaced[id(tensor)] = (tensor, view)
        return view

    def _copy_of(self, base: Tensor) -> Tensor:
        if id(base) not in self.replaced:
            copy = base.detach().clone() if self.level <= 0 else base.clone()
            self.replaced[id(base)] = (base, copy)
            self.written.setdefault(storage_of(base), []).append((base, copy))
            self.note_born(copy)
        return self.replaced[id(base)][1]


def storage_of(tensor: Tensor) -> int:
    """Return what tensors with one memory have in common."""
    tensor = unwrapped(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse and other tensors without a storage of their own
        return id(tensor)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last place of a tensor's entries in its storage."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return first, first + sum((size - 1) * stride for size, stride in steps)


def _shared() -> RuntimeError:
    return RuntimeError(
        "the loss writes to a captured tensor and reads its memory through another one, which is not part of it; "
        "write through the tensor that owns the memory, or clone one of them"
    )


def _current_level() -> int:
    level = _functorch.maybe_current_level()
    return -1 if level is None else level


def _everything(tensor: Tensor) -> bool:
    return True


def module_attributes_restored(
    is_captured: Callable[[Tensor], bool] = _everything,
) -> AbstractContextManager[None]:
    """Put back, on exit, the attributes and buffers that modules called inside assigned to themselves."""
    return nullcontext() if torch.compiler.is_compiling() else _ModuleAttributes(is_captured)


class _ModuleAttributes:
    """What modules were before they were called.

    A buffer's reference is put back only if what stood there is captured and what stands there was made inside:
    `functional_call` exchanges buffers too, and puts its own back, perhaps in another thread at this moment.
    """

    __slots__ = ("_before", "_hook", "_is_captured", "_thread")

    def __init__(self, is_captured: Callable[[Tensor], bool]) -> None:
        self._is_captured = is_captured
        self._before: dict[int, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = {}

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._hook = register_module_forward_pre_hook(self._remember)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        for module, attributes, buffers in self._before.values():
            _restore(module.__dict__, attributes)
            for name, now in list(module._buffers.items()):
                was = buffers.get(name)
                if now is was or now is None or self._is_captured(now):
                    continue
                if was is None or self._is_captured(was):
                    module._buffers[name] = was

    def _remember(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._before or threading.get_ident() != self._thread:
            return
        refuse_sharded(module)
        self._before[id(module)] = (module, dict(module.__dict__), dict(module._buffers))
        if isinstance(module, nn.parallel.DistributedDataParallel):
            without_reducer(module)


_MISSING = object()


def _restore(namespace: dict[str, Any], before: dict[str, Any]) -> None:
    if namespace.keys() == before.keys() and all(map(is_, namespace.values(), before.values())):
        return  # as almost always: the loops below take ten times as long
    for name in [name for name in namespace if name not in before]:
        del namespace[name]
    for name, value in before.items():
        if namespace.get(name, _MISSING) is not value:
            namespace[name] = value
