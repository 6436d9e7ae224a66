"""Passes over a data set: sums over its batches, weighted by what each loss was averaged over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import RLock
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, CheckpointError, message
from secorder_func.operators.ranks import Ranks, agreed, marks_of
from secorder_func.operators.versions import Versions
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.policy import in_transform

__all__ = ["Add", "Args", "Batch", "BatchSums", "Source"]

Args: TypeAlias = tuple[Any, ...]
"""What a loss takes after the parameters."""


@dataclass(frozen=True)
class Batch:
    """A batch and its number."""

    index: int
    args: Args
    number: int
    """The same as the index, but counted over all processes that have a share of the data, as if dealt out in turn."""


class Source(Protocol):
    """Where batches come from."""

    def read(self, device: torch.device | None, /) -> Iterator[Args]:
        """Yield the batches, the same at every call."""

    @property
    def length(self) -> int | None:
        """How many there are, None if that is not known before."""


class Add(Protocol):
    """Adds what a batch contributes to the sums: whole, or to some rows of them."""

    def __call__(self, tensors: Sequence[Tensor], at: slice | Tensor | None = None, /) -> None:
        """Add tensors, one to each sum."""


@dataclass
class BatchSums:
    """Sums over the batches of a source, at some parameters.

    Every batch draws random numbers (dropout) from a state of its own, the same at every pass.

    Parameters
    ----------
    source
        The batches.
    leaves
        Of the parameters; they say on which devices random numbers are drawn, and whither batches are moved.
    weight_of
        What the loss of a batch was averaged over; None for sums.
    multiplies
        Whether a batch counts by its weight. Else the sum of what batches contribute is divided by all weights.
    ranks
        The processes that have a share of the data each, if they are shared.
    check, passed
        The first is given some batches of the first pass, and refuses weights that their losses contradict; the second
        is called when none was refused.
    where
        The public function, for messages.

    Attributes
    ----------
    known
        What a chunk of vectors takes, in bytes, by the shapes of a batch and the kind of work.
    """

    source: Source
    leaves: Leaves
    weight_of: Callable[[Args], float] | None
    multiplies: bool = True
    ranks: Ranks | None = None
    check: Callable[[Batch], None] | None = None
    passed: Callable[[], None] | None = None
    where: str = "Batches"
    known: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        devices = {leaf.device for leaf in self.leaves}
        self.device = devices.pop() if len(devices) == 1 else None
        # From the state of the global generator, without drawing, which vmap does not allow.
        own = int(digest(bytes(RandomState.now(()).cpu.tolist())), 16) % 2**62
        self._seed = agreed(self.ranks, own)
        if self.ranks is not None:
            self.ranks.sum("the parameters", [], marks=marks_of(self.leaves), same="the parameters")
        self._versions = Versions(self.leaves)
        self._whole: tuple[int, float] | None = None

    def first(self) -> Batch | None:
        """Return a batch that counts, read anew; None if there is none."""
        with _ALONE:
            return next((batch for batch in self._read() if self._weight(batch)), None)

    def sizes(self, batch: Batch) -> dict[str, int]:
        """Return what is known of batches of these shapes; to be added to."""
        shapes = str([tuple(t.shape) for t in tree.tensors_in(batch.args)])
        return self.known.setdefault(shapes, {})

    def randomness(self, batch: Batch) -> RandomState:
        """Return the random state of a batch."""
        return RandomState.seeded(self._seed + batch.number, self.leaves)

    def over(
        self,
        what: str,
        sums: Sequence[Tensor],
        of_batch: Callable[[Batch, Add], None],
        *,
        vectors: Callable[[], Sequence[Tensor]] = tuple,
    ) -> list[Tensor]:
        """Return the weighted sums, or means, of what each batch adds.

        Parameters
        ----------
        what
            By which an interrupted pass is known again.
        sums
            Zeros of the shapes, dtypes and devices of the sums.
        of_batch
            Is given a batch, and a function that adds.
        vectors
            Gives what is multiplied, or some of it: the same in every process.
        """
        ranks = self.ranks
        if ranks is None:
            totals, divisor = self._own(what, sums, of_batch)
        else:
            none = list(sums), 0.0, [0.0]
            (totals, divisor, marks), failure = ranks.attempt(
                lambda: (*self._own(what, sums, of_batch), marks_of(vectors())), none
            )
            totals, divisor = ranks.sum(what, totals, failure, number=divisor, marks=marks)
        if not divisor:
            problem = "there is nothing to sum: no batch has samples and a weight above zero"
            mend = "Pass data with samples; they must be there whenever they are read"
            raise ArgumentError(message(self.where, problem, mend))
        if self.weight_of is None:
            return totals
        return [total / divisor for total in totals]

    def _own(
        self, what: str, sums: Sequence[Tensor], of_batch: Callable[[Batch, Add], None]
    ) -> tuple[list[Tensor], float]:
        """Return the weighted sums over the batches of this process, and their weight."""
        self._versions.require_unchanged()
        totals = list(sums)
        divisor, done = 0.0, 0
        digests: list[str] = []

        def state() -> dict[str, Any]:
            return {
                "done": done,
                "divisor": divisor,
                "totals": totals,
                "digests": digests,
            }

        length = self.source.length
        with (
            _ALONE,
            running.task("pass over the data", length, "batches", state, detail=what) as task,
        ):
            resumed = task.resumed
            skipped = 0
            if resumed is not None:
                totals = [old.to(new) for old, new in zip(resumed["totals"], totals, strict=True)]
                divisor, skipped = resumed["divisor"], resumed["done"]
            read = 0
            for batch in self._read():
                read += 1
                if task.kept:
                    digests.append(digest(tree.flatten_fully(batch.args)[0]))
                if resumed is not None and read <= skipped:
                    same = digests[-1] == resumed["digests"][batch.index]
                    self._require(same, f"batch {batch.index} is another one than before")
                    continue
                weight = self._weight(batch)
                if weight:
                    factor = weight if self.multiplies else 1.0
                    if self._whole is None and self.check and _is_looked_at(batch.index):
                        self.check(batch)
                    with self.randomness(batch).replayed():
                        of_batch(batch, _adding(totals, factor))
                divisor += weight
                done = read
                running.advance(done)
            self._require(read >= skipped, f"of {skipped} batches that were done there are {read}")
            self._require_whole(read, divisor)
        return totals, divisor

    def _read(self) -> Iterator[Batch]:
        step, rank = (1, 0) if self.ranks is None else (self.ranks.size, self.ranks.rank)
        return map(Batch, count(), self.source.read(self.device), count(rank, step))

    def _weight(self, batch: Batch) -> float:
        """Return the weight of a batch; zero for one without samples."""
        tensors = tree.tensors_in(batch.args)
        if tensors and all(t.ndim and not t.shape[0] for t in tensors):
            return 0.0
        if self.weight_of is None:
            return 1.0
        with self.randomness(batch).replayed():
            return self.weight_of(batch.args)

    def _require_whole(self, read: int, divisor: float) -> None:
        """Refuse a pass over more or less than the first."""
        if self._whole is None:
            self._whole = read, divisor
            if self.passed is not None:
                self.passed()
        before, weight = self._whole
        if read != before or abs(divisor - weight) > _CLOSE * weight:
            problem = (
                f"this pass read {read} batches of weight {divisor:g}, the first one {before} of "
                f"weight {weight:g}"
            )
            mend = "Pass data that are the same whenever they are read: a list, or a DataLoader"
            raise RuntimeError(message(self.where, problem, mend))

    def _require(self, same: bool, problem: str) -> None:
        if not same:
            mend = "Give it the same data in the same order, or remove the checkpoint to begin anew"
            problem = f"the interrupted run cannot go on: {problem}"
            raise CheckpointError(message(self.where, problem, mend))


_ALONE = RLock()
"""One thread at a time: the random state of the process is exchanged while data are read and losses computed."""
_CLOSE = 1e-9


def _is_looked_at(index: int) -> bool:
    """Say whether a batch is among the few whose weights are checked: the first, and every power of two."""
    return index & (index - 1) == 0


def _adding(totals: list[Tensor], factor: float) -> Add:
    def add(tensors: Sequence[Tensor], at: slice | Tensor | None = None, /) -> None:
        for place, (total, tensor) in enumerate(zip(totals, tensors, strict=True)):
            part = tensor.to(total)
            if in_transform() or part.requires_grad or total.requires_grad:
                assert at is None
                totals[place] = total + factor * part
            elif isinstance(at, Tensor):
                total.index_add_(0, at.to(total.device), part, alpha=factor)
            else:
                (total if at is None else total[at]).add_(part, alpha=factor)

    return add
