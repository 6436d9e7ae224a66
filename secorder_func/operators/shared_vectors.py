"""Several vectors shared out among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import refuse_sharded
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.forms import Draw, Draws, FormsLike, Part, Plan
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.ranks import NoFormsError, Ranks, marks_of
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import Tree

__all__ = ["share_vectors"]


def share_vectors(op: LinearOperator, group: Any = True) -> LinearOperator:
    """Return the same operator, of which each process of a group multiplies its share of several vectors.

    Parameters
    ----------
    op
        The operator, the same in every process: with all the data, or with data that other groups of processes share.
    group
        A `torch.distributed` process group; True for that of all processes.

    Returns
    -------
    LinearOperator
        All processes make the same calls and get the same results. Estimates by `K` probes take the time of `K / P` of
        `P` processes, and exchange numbers only; stacked products exchange the products. A single product is made by
        the first process and sent to the others. No derivative is recorded.

    Raises
    ------
    ValueError
        torch.distributed is not initialized.
    RankError
        The parameters differ between the processes; at a call, another process failed, is gone, or multiplies other
        vectors.

    Examples
    --------
    >>> import tempfile, torch
    >>> from secorder_func import LinearOperator, hutchinson_trace, share_vectors
    >>> store = f"file://{tempfile.mkdtemp()}/store"
    >>> torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    >>> op = share_vectors(LinearOperator(lambda v: 2 * v, like=torch.zeros(3)))
    >>> print(hutchinson_trace(op, 8))
    6 ± 0 (8 products)
    >>> torch.distributed.destroy_process_group()
    """
    where = "share_vectors"
    given: Any = op
    if not isinstance(given, LinearOperator):
        problem = f"op must be a LinearOperator, got {type(given).__name__}"
        raise ArgumentTypeError(message(where, problem))
    if in_transform():
        raise ArgumentError(message(where, "it cannot be called inside of a transform"))
    refuse_sharded(op.like, where, name="the operator's space")
    ranks = Ranks(group, where)
    leaves, unflatten = tree.flatten(op.like)
    ranks.sum("the parameters", [], marks=marks_of(leaves), same="the parameters")
    shared = None if op.forms is None else _SharedForms(op.forms, ranks, op.device)

    def matvec(v: Tree) -> Tree:
        def product() -> list[Tensor]:
            return tree.flatten(op @ v)[0] if ranks.rank == 0 else _zeros(leaves)

        return unflatten(_summed(ranks, "a product", leaves, product, tree.flatten(v)[0]))

    def matmat(vectors: Tree) -> Tree:
        stacks = tree.flatten(vectors)[0]

        def products(rows: slice) -> list[Tensor]:
            some: list[Tensor] = tree.flatten(op.mm(_rows(vectors, rows)))[0]
            return some

        what = f"products with {len(stacks[0])} vectors"
        return unflatten(_shared(ranks, what, _zeros(stacks), products, stacks))

    def quadratic(vectors: Tree) -> Tensor:
        number = torch.promote_types(op.dtype, torch.float32)
        forms = None if shared is None else shared.of(vectors)
        if forms is not None:
            return forms.to(number)
        stacks = tree.flatten(vectors)[0]

        def own_forms(rows: slice) -> list[Tensor]:
            some = _rows(vectors, rows)
            chunks = op.chunks("auto", None, "LinearOperator.quadratic_forms")
            parts = chunks.map(
                lambda chunk: _rows(some, chunk),
                lambda taken, chunk: op.quadratic_forms(taken),
                rows.stop - rows.start,
            )
            return [torch.cat(list(parts))]

        zeros = torch.zeros(len(stacks[0]), dtype=number, device=op.device)
        return _shared(ranks, f"{len(zeros)} forms", [zeros], own_forms, stacks)[0]

    return replace(
        op,
        matvec=matvec,
        matmat=matmat,
        quadratic=quadratic,
        forms=shared,
        passes=True,
        witness=op if op.witness is None else op.witness,
        ranks=ranks.around(op.ranks),
    )


@dataclass
class _SharedForms:
    """Forms of which each process has its share."""

    forms: FormsLike
    ranks: Ranks
    device: torch.device
    missing: str | None = None

    @property
    def largest(self) -> int | None:
        """Bytes of the largest term of one vector."""
        return self.forms.largest

    @largest.setter
    def largest(self, value: int | None) -> None:
        self.forms.largest = value

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of all vectors of a span at once; nothing where a process has none."""
        if self.missing is not None or in_transform() or not len(span):
            return
        each = plan.group
        first, last = span.start // each, (span.stop - 1) // each + 1
        edges = range(first, last + 1)

        def forms(rows: slice) -> list[Tensor]:
            own = range(
                max(span.start, edges[rows.start] * each), min(span.stop, edges[rows.stop] * each)
            )
            found = torch.zeros(rows.stop - rows.start, dtype=torch.float64, device=self.device)
            start = own.start
            for part in self.forms.in_groups(draws, own, plan):
                places = []
                for size in part.sizes:
                    places.append(start // each - edges[rows.start])
                    start += size
                found.index_add_(0, torch.tensor(places, device=self.device), part.sums.to(found))
            if start < own.stop:
                raise NoFormsError(self.forms.missing or "the operator has no forms")
            return [found]

        zeros = torch.zeros(last - first, dtype=torch.float64, device=self.device)
        vector = [draw() for draw in draws(range(span.start, span.start + 1)) if draw is not None]
        try:
            (sums,) = _shared(self.ranks, f"forms of {len(span)} vectors", [zeros], forms, vector)
        except NoFormsError as reason:
            self.missing = str(reason)  # in every process
            return
        sizes = [
            min(span.stop, (group + 1) * each) - max(span.start, group * each)
            for group in range(first, last)
        ]
        yield Part(sums, sizes)

    def of(self, vectors: Tree, /) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""
        stacks = tree.flatten(vectors)[0]
        if self.missing is not None or not len(stacks[0]):
            return None

        def forms(rows: slice) -> list[Tensor]:
            found = self.forms.of(_rows(vectors, rows))
            if found is None:
                raise NoFormsError(self.forms.missing or "the operator has no forms")
            return [found]

        zeros = torch.zeros(len(stacks[0]), dtype=torch.float64, device=self.device)
        try:
            return _shared(self.ranks, f"{len(zeros)} forms", [zeros], forms, stacks)[0]
        except NoFormsError as reason:
            self.missing = str(reason)
            return None

    def moved(
        self, leaves: Leaves, draws: Callable[[Sequence[Draw | None]], Sequence[Draw | None]]
    ) -> _SharedForms:
        """Return the forms of other vectors, of a space with other leaves, that stand for vectors of this one."""
        return _SharedForms(self.forms.moved(leaves, draws), self.ranks, self.device)


def _shared(
    ranks: Ranks,
    what: str,
    zeros: list[Tensor],
    of_rows: Callable[[slice], list[Tensor]],
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """Return what all processes compute together: each some rows, of like numbers, in order."""
    count = len(zeros[0])
    own = slice(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)

    def rows() -> list[Tensor]:
        found = [torch.zeros_like(zero) for zero in zeros]
        if own.start < own.stop:
            for whole, part in zip(found, of_rows(own), strict=True):
                whole[own] = part.to(whole)
        return found

    return _summed(ranks, what, zeros, rows, vectors)


def _summed(
    ranks: Ranks,
    what: str,
    like: Sequence[Tensor],
    compute: Callable[[], list[Tensor]],
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """Return the sum over the processes of what each computes with the same vectors."""

    def marked() -> tuple[list[Tensor], list[float]]:
        return compute(), marks_of(vectors)

    (found, marks), failure = ranks.attempt(marked, (_zeros(like), [0.0]))
    sums, _ = ranks.sum(what, found, failure, marks=marks)
    return sums


def _zeros(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in like]


def _rows(vectors: Tree, rows: slice) -> Tree:
    return tree.map(lambda leaf: leaf[rows], vectors)
