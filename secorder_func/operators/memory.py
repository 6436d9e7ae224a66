"""How many bytes a computation takes at its peak, counted as tensors are made and die."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else _tensors(result):
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # sparse and other tensors without a storage of their own
                continue
            if storage._cdata not in self._live and not _is_view(storage, args):
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


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, (tuple, list)) else []


def _is_view(storage: torch.UntypedStorage, args: tuple[Any, ...]) -> bool:
    """Say whether a result is a view of an argument, which was there before."""
    return any(
        isinstance(arg, Tensor)
        and arg.layout == torch.strided
        and arg.untyped_storage()._cdata == storage._cdata
        for arg in args
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error is that of an allocator: the CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
