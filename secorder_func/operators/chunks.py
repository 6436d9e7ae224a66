"""How many vectors are multiplied at once: a number, or as many as a budget of memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from secorder_func import running, tree
from secorder_func.checks import check_count
from secorder_func.errors import ArgumentTypeError, message
from secorder_func.operators.memory import is_out_of_memory, with_peak_bytes
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import ChunkSize, Tree

__all__ = ["Chunks", "check_chunk_size", "chunks", "default_chunk_size", "default_memory_budget"]

T = TypeVar("T")

_HIDDEN = 2
"""How much more than what is counted may be taken: kernels copy their operands; 1.1 to 1.95 times were seen."""


def default_memory_budget(device: torch.device) -> int:
    """Return the bytes that one chunk may take: 128 MiB on a CPU, whose caches are small, else 1 GiB.

    Measured on two cores: larger chunks gain nothing on an MLP of 670,000 parameters, and lose on a convolutional
    network, whose products are bound by memory traffic: 2.2 gradients a product 4 at a time, 4.6 at 16.
    """
    return 2**27 if device.type == "cpu" else 2**30


class Chunks:
    """Work on `count` vectors, some at a time.

    Parameters
    ----------
    size
        A number; None for all at once; or `"auto"`: one vector first, with which the bytes of the work are counted,
        then as many at a time as fit the budget, half as many after every failure to allocate.
    budget
        In bytes, for `"auto"`; None for the default of the device.
    where
        The public function, for messages.
    device
        Where the work is done.
    entries
        Of one vector, by which `"auto"` goes inside a transform and under torch.compile, where nothing can be counted.
    known
        Bytes of one vector by kind of work, counted before; what is counted here is added.
    """

    def __init__(
        self,
        size: ChunkSize,
        budget: int | None,
        where: str,
        *,
        device: torch.device,
        entries: int,
        known: dict[str, int] | None = None,
    ) -> None:
        check_chunk_size(size, budget, where)
        if size == "auto" and in_transform():
            size = default_chunk_size(entries)
        self._size = size
        self._adapts = size == "auto"
        self._budget = default_memory_budget(device) if budget is None else budget
        self._where = where
        self._known = {} if known is None else known

    def map(
        self, take: Callable[[slice], Tree], work: Callable[[Tree, slice], T], count: int
    ) -> Iterator[T]:
        """Yield `work(take(chunk), chunk)` for the slices that cut `count` stacked vectors."""
        start = 0
        while start < count:
            running.look()
            stop = min(start + self._next(count), count)
            chunk = slice(start, stop)
            try:
                result = self._done(work, take(chunk), chunk)
            except RuntimeError as error:
                if not self._shrinks(error, stop - start):
                    raise
                continue  # outside, where the failed attempt is no longer held
            start = stop
            yield result

    def _next(self, count: int) -> int:
        if self._size is None:
            return count
        if self._size != "auto":
            return self._size
        taken = self._known.get(self._where)
        return 1 if taken is None else max(1, self._budget // max(1, _HIDDEN * taken))

    def _done(self, work: Callable[[Tree, slice], T], vectors: Tree, chunk: slice) -> T:
        if self._size != "auto" or self._where in self._known:
            return work(vectors, chunk)
        result, taken = with_peak_bytes(lambda: work(vectors, chunk))
        # Drawing them takes less than multiplying them, and comes first.
        taken += sum(leaf.numel() * leaf.element_size() for leaf in tree.flatten(vectors)[0])
        self._known[self._where] = taken
        return result

    def _shrinks(self, error: RuntimeError, size: int) -> bool:
        if not self._adapts or size == 1 or not is_out_of_memory(error):
            return False
        self._size = size // 2
        return True


def check_chunk_size(size: Any, budget: Any, where: str) -> None:
    """Refuse what is no number of items, and what is no number of bytes."""
    if isinstance(size, str):
        if size != "auto":
            problem = f"chunk_size must be a number, 'auto' or None, got {size!r}"
            raise ArgumentTypeError(message(where, problem))
    elif size is not None:
        check_count(size, where, name="chunk_size")
    if budget is not None:
        check_count(budget, where, name="memory_budget")


def chunks(count: int, size: int | None, where: str) -> Iterator[slice]:
    """Yield the slices that cut `count` items into chunks of `size` (one chunk if None)."""
    if size is not None:
        check_count(size, where, name="chunk_size")
    step = size or max(1, count)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def default_chunk_size(n: int, *, at_most: int = 64) -> int:
    """Return how many vectors of `n` entries to multiply at once: 4 million entries, at most so many vectors."""
    return max(1, min(at_most, 2**22 // max(1, n)))
