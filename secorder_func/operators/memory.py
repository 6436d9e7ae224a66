"""How many bytes a computation takes at its peak, counted as tensors are made and die."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secorder_func import tree

__all__ = ["is_out_of_memory", "with_peak_bytes"]

T = TypeVar("T")


def with_peak_bytes(compute: Callable[[], T]) -> tuple[T, int]:
    """Return `compute()` and the most bytes that tensors made inside took at one time.

    Counts storages, so that it is the same on every machine and at every run; not what kernels use inside.
    """
    with _Count() as count:
        result = compute()
    return result, count.peak


class _Count(TorchDispatchMode):
    """Counts the storages of the results of all operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, int] = {}
        self._total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        older: set[int] | None = None
        for tensor in _dense(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self._live:
                continue
            if older is None:
                inputs = _dense((args, kwargs))
                older = {t.untyped_storage()._cdata for t in inputs}
            if storage._cdata not in older:  # else a view of what was there before
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = size
        self._total += size
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)


def _dense(tensors: Any) -> list[Tensor]:
    return [t for t in tree.tensors_in(tensors) if t.layout == torch.strided and not _is_wrapper(t)]


def _is_wrapper(tensor: Tensor) -> bool:
    return tensor.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error is that of an allocator: the CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
