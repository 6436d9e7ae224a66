"""Gauss-Newton matrices as sums of few outer products, as many as a sample has outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from secorder_func.operators.chunks import default_memory_budget
from secorder_func.operators.versions import Versions
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.output_space import OutputSpace
from secorder_func.transforms.policy import in_transform

__all__ = ["Rows", "RowsLike"]

_COPIES = 4
"""How much more than the rows themselves making them may take."""


class RowsLike(Protocol):
    """What algorithms ask of outer products: those of one batch, or the sums over many."""

    def cheaper(self) -> bool:
        """Say whether there are fewer rows a sample than entries of the space."""

    def traces(self, budget: int | None) -> Tensor:
        """Return the trace of every matrix, `(matrices,)`."""

    def diagonals(self, budget: int | None, *, summed: bool) -> Leaves:
        """Return the diagonal of every matrix, leaves `(matrices, ...)`, or their sum."""

    def restricted(self, indices: Sequence[int]) -> RowsLike:
        """Return the same of some leaves of the space, by their indices."""


@dataclass
class Rows:
    """Matrices `A_n = sum_c w_nc r_nc r_nc^T`: `r_nc` is the pullback of an eigenvector of the loss's Hessian.

    Parameters
    ----------
    make
        Makes the output space, when it is first asked for; None where there is none.
    leaves
        Of the parameters.
    data
        Further tensors that must not change in place.
    """

    make: Callable[[], OutputSpace | None]
    leaves: Leaves
    data: Leaves = ()

    def __post_init__(self) -> None:
        self._versions = Versions(self.leaves, self.data)
        self._asked = False
        self._space: OutputSpace | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None

    def space(self) -> OutputSpace | None:
        """Return where they act before they are pulled back, None if there is no such space."""
        self._versions.require_unchanged()
        if not self._asked:
            self._asked, self._space = True, self.make()
        return self._space

    def cheaper(self) -> bool:
        """Say whether there are fewer rows a sample than entries of the space."""
        if in_transform():  # what samples are cannot be looked at there
            return False
        space = self.space()
        entries = sum(leaf.numel() for leaf in self.leaves)
        return space is not None and space.hessians.shape[-1] < entries

    @property
    def weights(self) -> Tensor:
        """The eigenvalues of the loss's Hessian in the outputs, `(samples, outputs)`."""
        return self._decomposed()[0]

    def traces(self, budget: int | None) -> Tensor:
        """Return the trace of every matrix, `(samples,)`."""
        wide = self.weights
        found = wide.new_zeros(len(wide))
        for chunk, weights, rows in self.chunks(budget):
            squares = [_flat(leaf).to(wide).square().sum(2) for leaf in rows]
            found[chunk] += (weights * torch.stack(squares).sum(0)).sum(1)
        return found

    def diagonals(self, budget: int | None, *, summed: bool) -> Leaves:
        """Return the diagonal of every matrix, leaves `(samples, ...)`, or their sum."""
        wide = self.weights
        count = () if summed else (len(wide),)
        found = [wide.new_zeros((*count, *leaf.shape)) for leaf in self.leaves]
        for chunk, weights, rows in self.chunks(budget):
            for total, leaf in zip(found, rows, strict=True):
                squares = leaf.to(wide).square()
                if summed:
                    total += torch.einsum("nr,nr...->...", weights, squares)
                else:
                    total[chunk] += torch.einsum("nr,nr...->n...", weights, squares)
        return tuple(total.to(leaf) for total, leaf in zip(found, self.leaves, strict=True))

    def restricted(self, indices: Sequence[int]) -> Rows:
        """Return the same of some leaves of the space, by their indices."""

        def make() -> OutputSpace | None:
            space = self.space()
            if space is None:
                return None
            return OutputSpace(space.hessians, partial(_pulled, space, indices))

        return Rows(make, tuple(self.leaves[index] for index in indices), self.data)

    def chunks(
        self, budget: int | None, *, whole: bool = False
    ) -> Iterator[tuple[slice, Tensor, Leaves]]:
        """Yield some samples, weights `(samples, r)` and rows `(samples, r, ...)`; all rows of a sample if `whole`."""
        self._versions.require_unchanged()
        weights, vectors = self._decomposed()
        assert self._space is not None
        samples, outputs = weights.shape
        budget = default_memory_budget(self.leaves[0].device) if budget is None else budget
        one = _COPIES * sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)
        at_once = max(1, budget // max(1, one))
        step = outputs if whole else min(outputs, at_once)
        together = max(1, at_once // max(1, step))
        for start in range(0, samples, together):
            chunk = slice(start, min(start + together, samples))
            for first in range(0, outputs, step):
                some = slice(first, min(first + step, outputs))
                cotangents = vectors[chunk, :, some].transpose(1, 2).to(self._space.hessians)
                rows = self._space.pull(chunk, cotangents)
                yield chunk, weights[chunk, some], tuple(leaf.detach() for leaf in rows)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        if self._eigen is None:
            assert self._space is not None
            hessians = self._space.hessians.detach()
            work = torch.promote_types(hessians.dtype, torch.float32)
            for leaf in self.leaves:
                work = torch.promote_types(work, leaf.dtype)
            found = torch.linalg.eigh((hessians + hessians.mT).to(work) / 2)
            self._eigen = found.eigenvalues, found.eigenvectors
        return self._eigen


def _pulled(space: OutputSpace, indices: Sequence[int], chunk: slice, cotangents: Tensor) -> Leaves:
    leaves = space.pull(chunk, cotangents)
    return tuple(leaves[index] for index in indices)


def _flat(rows: Tensor) -> Tensor:
    """Return `(samples, r, entries)`."""
    return rows.reshape(*rows.shape[:2], rows.shape[2:].numel())
