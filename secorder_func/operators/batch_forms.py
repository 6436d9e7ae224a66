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
from secorder_func.operators.forms import (
    Draw,
    Draws,
    FormsLike,
    Part,
    Plan,
    plan_of,
    rows_of,
    units,
)
from secorder_func.operators.ranks import NoFormsError
from secorder_func.operators.rows import RowsLike
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

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of all vectors of a span at once, after one pass; nothing where there are none."""
        if self.outside or self.missing is not None or in_transform() or not len(span):
            return
        each = plan.group
        first = span.start // each

        def add_forms(batch: Batch, add: Add) -> None:
            forms = self.of_batch(batch)
            if forms is None:
                raise NoFormsError("the operator of a batch has no forms")
            # Every batch begins with whole groups, and with what is known of its shapes.
            sizes = self.sums.sizes(batch)
            plan.group, forms.largest = each, sizes.get("term")
            start = span.start
            for part in forms.in_groups(draws, range(start, span.stop), plan):
                places = []
                for size in part.sizes:
                    places.append(start // each - first)
                    start += size
                add([part.sums], torch.tensor(places))
            if start < span.stop:
                raise NoFormsError(forms.missing or "the operator of a batch has no forms")
            if forms.largest is not None:
                sizes["term"] = forms.largest

        count = (span.stop - 1) // each - first + 1
        zeros = torch.zeros(count, dtype=torch.float64, device=self.leaves[0].device)
        try:
            what = f"forms of vectors {span.start} to {span.stop}"
            first_vector = partial(_drawn, draws(range(span.start, span.start + 1)))
            (found,) = self.sums.over(what, [zeros], add_forms, vectors=first_vector)
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
            return [partial(rows_of, stack.detach(), rows) for stack in stacks]

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


def _drawn(draws: Sequence[Draw | None]) -> list[Tensor]:
    return [draw() for draw in draws if draw is not None]


@dataclass
class BatchRows:
    """Traces and diagonals of a sum over batches in one pass: of outer products, or entry by entry.

    `indices` are the leaves of the space that are wanted, None for all.
    """

    sums: BatchSums
    kind: Kind
    like: Tree
    indices: Sequence[int] | None = None

    def cheaper(self) -> bool:
        """Say whether there is a cheaper way than one vector after another: a pass for all is."""
        return not in_transform()

    def traces(self, budget: int | None) -> Tensor:
        """Return the trace, `(1,)`."""
        device = tree.flatten(self.like)[0][0].device
        zero = torch.zeros(1, dtype=torch.float64, device=device)

        def add_trace(batch: Batch, add: Add) -> None:
            rows = self._rows(batch)
            if rows is not None:
                add([rows.traces(budget).sum(0, keepdim=True)])
            else:
                entries = [leaf.sum().to(zero) for leaf in self._entries(batch, budget)]
                add([torch.stack(entries).sum(0, keepdim=True)])

        return self.sums.over("the trace", [zero], add_trace)[0]

    def diagonals(self, budget: int | None, *, summed: bool) -> Leaves:
        """Return the diagonal, leaf by leaf."""

        def add_diagonal(batch: Batch, add: Add) -> None:
            rows = self._rows(batch)
            found = None if rows is None else rows.diagonals(budget, summed=True)
            add(self._entries(batch, budget) if found is None else found)

        leaves = self._leaves()
        zeros = [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
        found = self.sums.over("the diagonal", zeros, add_diagonal)
        return tuple(total.to(leaf) for total, leaf in zip(found, leaves, strict=True))

    def restricted(self, indices: Sequence[int]) -> BatchRows:
        """Return the same of some leaves of the space, by their indices."""
        before = self._wanted()
        return BatchRows(self.sums, self.kind, self.like, [before[index] for index in indices])

    def _wanted(self) -> Sequence[int]:
        count = len(tree.flatten(self.like)[0])
        return range(count) if self.indices is None else self.indices

    def _leaves(self) -> list[Tensor]:
        leaves, _ = tree.flatten(self.like)
        return [leaves[index] for index in self._wanted()]

    def _rows(self, batch: Batch) -> RowsLike | None:
        """Return the outer products of a batch, None where they are not cheaper."""
        rows = self.kind.rows(batch)
        if rows is not None and self.indices is not None:
            rows = rows.restricted(self.indices)
        return rows if rows is not None and rows.cheaper() else None

    def _entries(self, batch: Batch, budget: int | None) -> list[Tensor]:
        """Return the diagonal of a batch, entry by entry: by forms, or by products where it has none."""
        leaves, _ = tree.flatten(self.like)
        forms = self.kind.forms(batch)
        found = []
        for index in self._wanted():
            leaf = leaves[index]
            parts: list[Part] = []
            if forms is not None:
                plan = plan_of(self.like, leaf.device, "auto", budget)
                draws = partial(units, leaf, index, len(leaves))
                parts = list(forms.in_groups(draws, range(leaf.numel()), plan))
            if sum(len(part.sizes) for part in parts) < leaf.numel():
                return self._entries_by_products(batch, budget)
            sums = [part.sums for part in parts] or [leaf.new_zeros(0)]
            found.append(torch.cat(sums).reshape(leaf.shape))
        return found

    def _entries_by_products(self, batch: Batch, budget: int | None) -> list[Tensor]:
        op = self.kind.operator(batch)
        leaves, _ = tree.flatten(self.like)
        sizes = [leaf.numel() for leaf in leaves]
        found = []
        for index in self._wanted():
            start = sum(sizes[:index])
            chunks = op.chunks("auto", budget, "LinearOperator.quadratic_forms")
            parts = chunks.map(
                lambda rows, start=start: op.basis(slice(start + rows.start, start + rows.stop)),  # type: ignore[misc]
                lambda vectors, rows: op.quadratic_forms(vectors).detach(),
                sizes[index],
            )
            entries = [*parts] or [leaves[index].new_zeros(0)]
            found.append(torch.cat(entries).reshape(leaves[index].shape))
        return found
