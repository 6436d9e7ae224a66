"""How many vectors are multiplied at once."""

from __future__ import annotations

from collections.abc import Iterator

from secorder_func.checks import check_count

__all__ = ["chunks", "default_chunk_size"]


def chunks(count: int, size: int | None, where: str) -> Iterator[slice]:
    """Yield the slices that cut `count` items into chunks of `size` (one chunk if None)."""
    if size is not None:
        check_count(size, where, name="chunk_size")
    step = size or max(1, count)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def default_chunk_size(n: int, *, at_most: int = 64) -> int:
    """Return how many vectors of `n` entries to multiply at once: 4 million entries, at most so many vectors."""
    return max(1, min(at_most, 2**22 // max(1, n)))
