"""The samples of a data set, one after the other as they are read, up to some number."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from secorder_func import tree
from secorder_func.report.finding import NotApplicable
from secorder_func.report.subject import Subject
from secorder_func.transforms.samples import has_list_of_samples

__all__ = ["MOST_WORK", "Rows"]

MOST_WORK = 2**25
"""Parameters times samples, up to which samples are taken from further batches than the first."""

_SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

_Args = tuple[Any, ...]


class Rows:
    """Samples, numbered in the order in which the data are read; nothing of them is kept.

    Parameters
    ----------
    subject
        Whose data they are.
    most
        How many at most. Of a large model they are no more than those of the first batch.
    """

    def __init__(self, subject: Subject, most: int) -> None:
        self.subject = subject
        first = _length(subject.first_batch)
        self._work = MOST_WORK // max(1, subject.num_params)
        self._most = most
        self.limit = max(min(first, most), min(most, self._work))

    def __iter__(self) -> Iterator[_Args]:
        """Yield the samples of each batch, as a batch."""
        begin = 0
        for batch in self._read():
            size = min(_length(batch), self.limit - begin)
            if size:
                yield _taken(batch, torch.arange(size))
            begin += size
            if begin >= self.limit:
                return

    def chosen(self, numbers: Collection[int]) -> Iterator[tuple[list[int], _Args]]:
        """Yield some samples again, with their numbers, batch by batch."""
        begin = 0
        for batch in self._read():
            if begin > max(numbers):
                return
            end = begin + _length(batch)
            own = sorted(number for number in set(numbers) if begin <= number < end)
            if own:
                yield own, _taken(batch, torch.tensor(own) - begin)
            begin = end

    def _read(self) -> Iterator[_Args]:
        if self.subject.batches is None:
            return iter([self.subject.first_batch])
        return self.subject.batches.read(self.subject.device)

    @cached_property
    def shuffled(self) -> bool:
        """Whether a loader draws the order."""
        loader = getattr(getattr(self.subject.batches, "_reader", None), "_data", None)
        inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        return isinstance(inner, _SHUFFLED) or isinstance(
            getattr(loader, "sampler", None), _SHUFFLED
        )

    def named(self, count: int) -> str:
        """Return which samples the first so many are."""
        total = self.subject.num_samples
        if total is None:
            return f"the first {count:,} samples"
        if count == total:
            return f"all {count:,} samples"
        return f"the first {count:,} of {total:,} samples"

    @property
    def remark(self) -> str:
        """What else is to be known of their choice and of their numbers."""
        said = []
        total = self.subject.num_samples
        fewer = self.limit < self._most and (total is None or self.limit < total)
        if fewer:
            said.append(
                f"There are no more because the model is large: parameters times samples beyond the first batch stay "
                f"below {MOST_WORK / 1e6:.0f} million."
            )
        if self.shuffled:
            said.append(
                "The loader draws the order: numbers count the samples in the order of reading, the same at every pass "
                "of this report, and are not those of the data set."
            )
        elif self.subject.batches is not None:
            said.append("Numbers count from 0 in the order of reading.")
        return " ".join(said)


def _length(batch: _Args) -> int:
    """Return how many samples a batch has."""
    tensors = tree.tensors_in(*batch)
    if not tensors:
        raise NotApplicable("the loss takes no data")
    lengths = {int(tensor.shape[0]) if tensor.ndim else None for tensor in tensors}
    (length, *others) = lengths
    if others or length is None:
        raise NotApplicable("the tensors of a batch have no common leading axis of samples")
    if has_list_of_samples(batch, length):
        raise NotApplicable("a batch has a list with an item for each sample; make a tensor of it")
    return length


def _taken(batch: _Args, rows: Tensor) -> _Args:
    tensors, restore = tree.tensors_and_rest(batch)
    taken: _Args = restore([tensor[rows.to(tensor.device)] for tensor in tensors])
    return taken
