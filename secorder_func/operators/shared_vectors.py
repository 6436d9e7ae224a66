"""Several vectors shared out among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.forms import Draw, Draws, FormsLike, Part, Plan
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.ranks import NoFormsError, Ranks, mark_of
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
        the first process and sent to the others.

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
    ranks = Ranks(group, where)
    leaves, unflatten = tree.flatten(op.like)
    ranks.require_same(digest([leaf.detach() for leaf in leaves]), "the parameters")

    def matvec(v: Tree) -> Tree:
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        found, failure = _tried(lambda: tree.flatten(op @ v)[0], zeros, ranks.rank == 0)
        return unflatten(ranks.sum(found, failure, mark=mark_of(tree.flatten(v)[0])))

    def matmat(vectors: Tree) -> Tree:
        stacks = tree.flatten(vectors)[0]
        rows = _share(range(stacks[0].shape[0]), ranks)
        own = slice(rows.start, rows.stop)

        def products() -> list[Tensor]:
            found = [torch.zeros_like(stack) for stack in stacks]
            some = tree.map(lambda leaf: leaf[own], vectors)
            for whole, part in zip(found, tree.flatten(op.mm(some))[0], strict=True):
                whole[own] = part
            return found

        zeros = [torch.zeros_like(stack) for stack in stacks]
        found, failure = _tried(products, zeros, len(rows) > 0)
        return unflatten(ranks.sum(found, failure, mark=mark_of(stacks)))

    shared = None if op.forms is None else _SharedForms(op.forms, ranks, op.device)

    def quadratic(vectors: Tree) -> Tensor:
        forms = None if shared is None else shared.of(vectors)
        if forms is not None:
            return forms.to(torch.promote_types(op.dtype, torch.float32))
        stacks = tree.flatten(vectors)[0]
        count = stacks[0].shape[0]
        rows = _share(range(count), ranks)
        number = torch.promote_types(op.dtype, torch.float32)
        zeros = torch.zeros(count, dtype=number, device=op.device)

        def own_forms() -> list[Tensor]:
            some = tree.map(lambda leaf: leaf[rows.start : rows.stop], vectors)
            found = torch.zeros_like(zeros)
            chunks = op.chunks("auto", None, "LinearOperator.quadratic_forms")
            parts = chunks.map(
                lambda chunk: tree.map(lambda leaf: leaf[chunk], some),
                lambda taken, chunk: op.quadratic_forms(taken),
                len(rows),
            )
            found[rows.start : rows.stop] = torch.cat([part.detach() for part in parts]).to(found)
            return [found]

        found, failure = _tried(own_forms, [zeros], len(rows) > 0)
        return ranks.sum(found, failure, mark=mark_of(stacks))[0]

    return replace(
        op,
        matvec=matvec,
        matmat=matmat,
        quadratic=quadratic,
        forms=shared,
        passes=True,
        witness=None,
        ranks=ranks,
    )


@dataclass
class _SharedForms:
    """Forms of which each process has its share."""

    forms: FormsLike
    ranks: Ranks
    device: torch.device

    @property
    def missing(self) -> str | None:
        """Why there are none."""
        return self.forms.missing

    @property
    def largest(self) -> int | None:
        """Bytes of the largest term of one vector."""
        return self.forms.largest

    @largest.setter
    def largest(self, value: int | None) -> None:
        self.forms.largest = value

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of all vectors of a span at once; nothing where a process has none."""
        if in_transform() or not len(span):
            return
        each = plan.group
        first, last = span.start // each, (span.stop - 1) // each + 1
        groups = _share(range(first, last), self.ranks)
        own = range(max(span.start, groups.start * each), min(span.stop, groups.stop * each))
        zeros = torch.zeros(last - first, dtype=torch.float64, device=self.device)

        def computed() -> list[Tensor]:
            found, start = torch.zeros_like(zeros), own.start
            for part in self.forms.in_groups(draws, own, plan):
                places = []
                for size in part.sizes:
                    places.append(start // each - first)
                    start += size
                found.index_add_(0, torch.tensor(places, device=self.device), part.sums.to(found))
            if start < own.stop:
                raise NoFormsError(self.forms.missing or "the operator has no forms")
            return [found]

        found, failure = _tried(computed, [zeros], len(own) > 0)
        try:
            (sums,) = self.ranks.sum(found, failure)
        except NoFormsError:
            return
        sizes = [
            min(span.stop, (group + 1) * each) - max(span.start, group * each)
            for group in range(first, last)
        ]
        yield Part(sums, sizes)

    def of(self, vectors: Tree, /) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""
        stacks = tree.flatten(vectors)[0]
        if self.missing is not None or not stacks[0].shape[0]:
            return None
        rows = _share(range(stacks[0].shape[0]), self.ranks)
        zeros = torch.zeros(stacks[0].shape[0], dtype=torch.float64, device=self.device)

        def computed() -> list[Tensor]:
            own = slice(rows.start, rows.stop)
            forms = self.forms.of(tree.map(lambda leaf: leaf[own], vectors))
            if forms is None:
                raise NoFormsError(self.forms.missing or "the operator has no forms")
            found = torch.zeros_like(zeros)
            found[own] = forms.to(found)
            return [found]

        found, failure = _tried(computed, [zeros], len(rows) > 0)
        try:
            return self.ranks.sum(found, failure, mark=mark_of(stacks))[0]
        except NoFormsError:
            return None

    def moved(
        self, leaves: Leaves, draws: Callable[[Sequence[Draw | None]], Sequence[Draw | None]]
    ) -> _SharedForms:
        """Return the forms of other vectors, of a space with other leaves, that stand for vectors of this one."""
        return _SharedForms(self.forms.moved(leaves, draws), self.ranks, self.device)


def _share(span: range, ranks: Ranks) -> range:
    """Return the part of a range that is this process's: like sizes, in order."""
    edges = [span.start + len(span) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)]
    return range(*edges)


def _tried(
    compute: Callable[[], list[Tensor]], zeros: list[Tensor], takes_part: bool
) -> tuple[list[Tensor], BaseException | None]:
    """Return what is computed, or zeros and why it is not: nobody may be left waiting."""
    if not takes_part:
        return zeros, None
    try:
        return compute(), None
    except (Exception, KeyboardInterrupt) as error:
        return zeros, error
