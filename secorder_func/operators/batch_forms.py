"""Forms and outer products of sums over batches: one pass, and never more memory than those of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.operators.batch_kinds import Kind
from secorder_func.operators.batch_sums import Add, Batch, BatchSums
from secorder_func.operators.forms import Draw, Draws, FormsLike, Part, Plan, plan_of
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.ranks import NoFormsError
from secorder_func.operators.rows import Rows
from secorder_func.operators.versions import Versions
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import Tree

__all__ = ["BatchForms", "BatchRows"]


@dataclass
class BatchForms:
    """The forms of a sum over batches.

    Parameters
    ----------
    sums
        Where the batches come from.
    of_batch
        The forms of one, None where there are none.
    leaves
        Of the space of the vectors.
    outside
        Whether someone differentiates what is computed; then there are no forms.
    """

    sums: BatchSums
    of_batch: Callable[[Batch], FormsLike | None]
    leaves: Leaves
    outside: bool = False
    missing: str | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        self._versions = Versions(self.leaves)

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of all vectors of a span at once, after one pass; nothing where there are none."""
        if self.outside or self.missing is not None or in_transform() or not len(span):
            return
        self._versions.require_unchanged()
        each, memory = plan.group, self.sums.memory
        first = span.start // each

        def add_forms(batch: Batch, add: Add) -> None:
            forms = self.of_batch(batch)
            if forms is None:
                raise NoFormsError("the operator of a batch has no forms")
            if "term" in memory:
                plan.group, forms.largest = memory["group"], memory["term"]
            start = span.start
            for part in forms.in_groups(draws, range(start, span.stop), plan):
                places = []
                for size in part.sizes:
                    places.append(start // each - first)
                    start += size
                add([part.sums], torch.tensor(places))
            if start < span.stop:
                raise NoFormsError(forms.missing or "the operator of a batch has no forms")
            memory["group"] = plan.group
            memory["term"] = self.largest = max(forms.largest or 0, self.largest or 0)

        count = (span.stop - 1) // each - first + 1
        zeros = torch.zeros(count, dtype=torch.float64, device=self.leaves[0].device)
        try:
            (found,) = self.sums.over(
                f"forms of vectors {span.start} to {span.stop}", [zeros], add_forms
            )
        except NoFormsError as reason:
            self.missing = str(reason)  # products say whether it is the user's own
            return
        edges = range(first * each, span.stop + each, each)
        sizes = [min(start + each, span.stop) - max(start, span.start) for start in edges[:count]]
        number = torch.promote_types(tree.common_dtype(self.leaves), torch.float32)
        yield Part(found.to(number), sizes)

    def of(self, vectors: Tree, /) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""
        stacks, _ = tree.flatten(vectors)
        count = stacks[0].shape[0]
        if not count or (torch.is_grad_enabled() and differentiated_outside(vectors)):
            return None

        def draws(rows: range) -> list[Draw | None]:
            return [partial(_rows_of, stack.detach(), rows) for stack in stacks]

        plan = plan_of(self.leaves, self.leaves[0].device, "auto", None)
        for part in self.in_groups(draws, range(count), plan):
            return part.sums
        return None

    def moved(
        self, leaves: Leaves, draws: Callable[[Sequence[Draw | None]], Sequence[Draw | None]]
    ) -> BatchForms:
        """Return the forms of other vectors, of a space with other leaves, that stand for vectors of this one."""

        def of_batch(batch: Batch) -> FormsLike | None:
            forms = self.of_batch(batch)
            return None if forms is None else forms.moved(leaves, draws)

        return BatchForms(self.sums, of_batch, leaves, self.outside)


def _rows_of(stack: Tensor, rows: range) -> Tensor:
    return stack[rows.start : rows.stop]


@dataclass
class BatchRows:
    """The outer products of a sum over batches; where a batch has none that are cheap, its forms take their place.

    `indices` are the leaves of the space that are wanted, None for all.
    """

    sums: BatchSums
    kind: Kind
    like: Tree
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._cheaper: bool | None = None
        self._versions = Versions(tree.flatten(self.like)[0])

    def cheaper(self) -> bool:
        """Say whether the first batch has fewer rows a sample than the space has entries."""
        if in_transform():
            return False
        if self._cheaper is None:
            batch = self.sums.first()
            found = None
            if batch is not None:
                with self.sums.randomness(batch).replayed():
                    rows = self._of(batch)
                    found = rows is not None and rows.cheaper()
            ranks = self.sums.ranks
            self._cheaper = bool(found) if ranks is None else ranks.all(found)
        return self._cheaper

    def traces(self, budget: int | None) -> Tensor:
        """Return the trace, `(1,)`."""
        self._versions.require_unchanged()

        def add_trace(batch: Batch, add: Add) -> None:
            rows = self._of(batch)
            if rows is not None and rows.cheaper():
                add([rows.traces(budget).sum(0, keepdim=True)])
            else:
                entries = [leaf.sum().reshape(1) for leaf in self._by_forms(batch, budget)]
                add([torch.stack([entry.to(entries[0]) for entry in entries]).sum(0)])

        device = tree.flatten(self.like)[0][0].device
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        return self.sums.over("the trace", [zero], add_trace)[0]

    def diagonals(self, budget: int | None, *, summed: bool) -> Leaves:
        """Return the diagonal, leaf by leaf."""
        self._versions.require_unchanged()

        def add_diagonal(batch: Batch, add: Add) -> None:
            rows = self._of(batch)
            if rows is not None and rows.cheaper():
                add(rows.diagonals(budget, summed=True))
            else:
                add(self._by_forms(batch, budget))

        leaves = self._leaves()
        zeros = [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
        found = self.sums.over("the diagonal", zeros, add_diagonal)
        return tuple(total.to(leaf) for total, leaf in zip(found, leaves, strict=True))

    def restricted(self, indices: Sequence[int]) -> BatchRows:
        """Return the same of some leaves of the space, by their indices."""
        before = range(len(self._leaves())) if self.indices is None else self.indices
        return BatchRows(self.sums, self.kind, self.like, [before[index] for index in indices])

    def _leaves(self) -> list[Tensor]:
        leaves, _ = tree.flatten(self.like)
        return leaves if self.indices is None else [leaves[index] for index in self.indices]

    def _of(self, batch: Batch) -> Rows | None:
        rows = self.kind.rows(batch)
        return rows if rows is None or self.indices is None else rows.restricted(self.indices)

    def _by_forms(self, batch: Batch, budget: int | None) -> list[Tensor]:
        """Return the diagonal of a batch by one form for every entry."""
        op: LinearOperator = self.kind.operator(batch)
        chunks = op.chunks("auto", budget, "LinearOperator.quadratic_forms")
        parts = chunks.map(op.basis, lambda vectors, rows: op.quadratic_forms(vectors), op.shape[0])
        leaves, _ = tree.flatten(self.like)
        pieces = torch.cat(list(parts)).split([leaf.numel() for leaf in leaves])
        found = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return found if self.indices is None else [found[index] for index in self.indices]
