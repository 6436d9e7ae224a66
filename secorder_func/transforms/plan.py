"""How many vectors are propagated at once, and how many of them are summed."""

from __future__ import annotations

import torch

from secorder_func.typing import ChunkSize

__all__ = ["Plan", "group_size", "power_of_two"]

_TERMS = 4
"""How many terms of the largest size a propagation holds at a time."""
_GROUPS = 8
"""How many sums stand behind a standard error at least, where there are twice as many probes."""
_AT_MOST = 16
"""Probes in a group; more make it no faster."""


def group_size(count: int) -> int:
    """Return over how many of some probes terms are summed: a power of two, so that groups can be joined."""
    return power_of_two(max(1, min(count // _GROUPS, _AT_MOST)))


class Plan:
    """How many probes are propagated at once.

    Larger chunks share the evaluation of the loss, until their terms no longer fit the caches, and allocating them
    costs more than it saves: on two cores a convolutional network is fastest at 4 probes and a GPT at 16, where the
    largest term takes 16 MiB, a wide MLP at 16, where the probes of its largest leaf take 25.

    Parameters
    ----------
    size, budget
        As for `hutchinson_trace`.
    leaf
        The bytes of the largest leaf.
    cache
        How many bytes the largest term may take.
    group
        Over how many probes terms are summed at most, a power of two; fewer where chunks are smaller.

    Attributes
    ----------
    largest
        The largest chunk so far.
    """

    def __init__(
        self,
        size: ChunkSize,
        budget: int | None,
        device: torch.device,
        leaf: int,
        *,
        cache: int | None = None,
        group: int = 1,
    ) -> None:
        self.group = group if size in (None, "auto") else power_of_two(min(group, int(size)))
        self.largest = 0
        self.adapts = size == "auto"
        self._size = size
        self._budget = budget
        self._cache = cache or (2**24 if device.type == "cpu" else 2**28)
        self._drawn = 2 * self._cache
        self._leaf = leaf

    def pieces(self, start: int, stop: int, term: int | None) -> list[tuple[int, int]]:
        """Return the counts of the next chunk of some probes, and of how many each group of them is.

        `term` is the bytes of the largest term of one probe, None before the first chunk. Groups begin at multiples of
        their size: so the first and the last of them may be in pieces.
        """
        size = self.size(stop - start, term)
        group = self.group = power_of_two(min(self.group, size))
        pieces = []
        if start % group:
            first = min(group - start % group, size)
            pieces.append((first, first))
            size -= first
        if size >= group:
            pieces.append((size - size % group, group))
        if size % group:
            pieces.append((size % group, size % group))
        return pieces

    def size(self, count: int, term: int | None) -> int:
        """Return how many of `count` probes to take: a multiple of the group, if it is not less than one."""
        group = self.group
        if self._size is None:
            return count
        if self._size != "auto":
            found = self._size
        else:
            term = self._leaf if term is None else term
            found = min(self._cache // max(1, term), self._drawn // max(1, self._leaf))
            if self._budget is not None:
                found = min(found, self._budget // max(1, _TERMS * term + 2 * self._leaf))
        found = max(1, min(found, count))
        if self._size == "auto":
            found = -(-count // -(-count // found))  # chunks of like sizes
            found = min(count, -(-found // group) * group)
        return found - found % group if found > group else found

    def halve(self, size: int) -> None:
        """Take half as many from now on."""
        self._size = max(1, size // 2)


def power_of_two(most: int) -> int:
    """Return the largest one that is not above a number."""
    return 1 << (most.bit_length() - 1)
