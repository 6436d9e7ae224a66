"""One matrix a sample, all of the same space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_like
from secorder_func.errors import ArgumentError, message
from secorder_func.operators.chunks import Chunks
from secorder_func.operators.forms import Forms
from secorder_func.operators.rows import Rows
from secorder_func.seeds import draw_seed
from secorder_func.typing import ChunkSize, MatVec, Tree

__all__ = ["PerSampleOperator"]


@dataclass(frozen=True, repr=False, eq=False)
class PerSampleOperator:
    """Square symmetric matrices on the space of a pytree, one for every sample of a batch, given by their products.

    Algorithms give a number, a tree or a pair for every sample, along a leading axis.

    Parameters
    ----------
    several
        The products of every matrix with the same `k` vectors, stacked: `(k, ...)` to `(k, samples, ...)`.
    each
        The products of some matrices, given as a slice, with a vector of each one's own: `(samples, ...)` to the same.
    like
        A member of the space.
    num_samples
        How many matrices.
    quadratic
        The numbers `v_k . A_n v_k` of stacked vectors, `(k, samples)`, if they take less memory than products.
    forms
        The same by forward propagation, summed over groups of vectors, where there is that.
    rows
        The matrices as sums of few outer products, where they are that.
    mode
        How products are differentiated, as it was asked for.
    learned
        What chunks of vectors took, in bytes, by kind of work; filled in by use.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import per_sample_hessian_operator
    >>> squares = lambda p, x: (x @ p) ** 2  # one loss a sample
    >>> op = per_sample_hessian_operator(squares, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> op @ torch.tensor([1.0, 0.0])
    tensor([[2., 0.],
            [2., 4.]])
    """

    several: MatVec
    each: Callable[[Tree, slice], Tree]
    like: Tree
    num_samples: int
    quadratic: Callable[[Tree], Tensor] | None = None
    forms: Forms | None = None
    rows: Rows | None = None
    mode: str | None = None
    learned: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        n = tree.numel(self.like)
        return (n, n)

    @property
    def ranks(self) -> None:
        """The processes that make products together: one alone."""

    @property
    def batch_shape(self) -> torch.Size:
        """The axes of samples."""
        return torch.Size([self.num_samples])

    @property
    def symmetric(self) -> bool:
        """Whether the matrices are symmetric."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which all leaves promote."""
        return tree.common_dtype(self.like)

    @property
    def device(self) -> torch.device:
        """The device of the first leaf."""
        device: torch.device = tree.flatten(self.like)[0][0].device
        return device

    def __repr__(self) -> str:
        n = self.shape[0]
        return f"PerSampleOperator({self.num_samples} x {n} x {n}, {self.dtype}, {self.device})"

    def __matmul__(self, v: Tree) -> Tree:
        """Return the products of all matrices with one vector, with a leading axis of samples."""
        check_like(v, self.like, "PerSampleOperator @ v")
        products = self.several(tree.map(lambda leaf: leaf.unsqueeze(0), v))
        return tree.map(lambda leaf: leaf[0], products)

    def mm(
        self,
        vectors: Tree,
        /,
        *,
        chunk_size: ChunkSize = "auto",
        memory_budget: int | None = None,
    ) -> Tree:
        """Return the products of all matrices with `k` stacked vectors, `(k, samples, ...)`.

        Arguments as for `LinearOperator.mm`.
        """
        where = "PerSampleOperator.mm"
        check_like(vectors, self.like, where, name="vectors", batched=True)
        chunks = self.chunks(chunk_size, memory_budget, where)
        count = tree.flatten(vectors)[0][0].shape[0]
        parts = chunks.map(
            lambda rows: tree.map(lambda leaf: leaf[rows], vectors),
            lambda taken, rows: self.several(taken),
            count,
        )
        found = list(parts)
        if not found:
            shape = (0, self.num_samples)
            return tree.map(lambda leaf: leaf.new_zeros(*shape, *leaf.shape), self.like)
        return tree.map(lambda *rows: torch.cat(rows), *found)

    def with_own(self, vectors: Tree, /, *, samples: slice = slice(None)) -> Tree:
        """Return the product of every sample's matrix with its own vector, `(samples, ...)` to the same.

        `samples` are those that the vectors belong to: all, or a slice.
        """
        where = "PerSampleOperator.with_own"
        check_like(vectors, self.like, where, name="vectors", batched=True)
        count = tree.flatten(vectors)[0][0].shape[0]
        expected = len(range(self.num_samples)[samples])
        if count != expected:
            problem = f"expected a vector for each of {expected} samples, got {count}"
            raise ArgumentError(message(where, problem))
        return self.each(vectors, samples)

    def quadratic_forms(self, vectors: Tree, /) -> Tensor:
        """Return `v_k . A_n v_k` of `k` stacked vectors, `(k, samples)`."""
        where = "PerSampleOperator.quadratic_forms"
        check_like(vectors, self.like, where, name="vectors", batched=True)
        found = None if self.forms is None else self.forms.of(vectors)
        if found is not None:
            return found
        if self.quadratic is not None:
            return self.quadratic(vectors)
        products = tree.flatten(self.several(vectors))[0]
        pairs = zip(tree.flatten(vectors)[0], products, strict=True)
        parts = [(v.unsqueeze(1) * av).flatten(2).sum(2) for v, av in pairs]
        return torch.stack([part.to(parts[0]) for part in parts]).sum(0)

    def basis(self, rows: slice) -> Tree:
        """Return some rows of the identity, stacked."""
        return tree.basis(self.like, rows.start, rows.stop)

    def chunks(self, chunk_size: ChunkSize, memory_budget: int | None, where: str) -> Chunks:
        """Return the chunks in which an algorithm works on vectors of this space; arguments as for `mm`."""
        return Chunks(
            chunk_size,
            memory_budget,
            where,
            device=self.device,
            entries=self.shape[0] * self.num_samples,
            known=self.learned,
        )

    def draw_seed(self, generator: torch.Generator | None) -> int:
        """Return the next value of a generator, torch's global one if None."""
        return draw_seed(generator)

    def require_real(self, where: str) -> None:
        """Refuse a complex space."""
        if self.dtype.is_complex:
            problem = f"the space must be real, got {self.dtype}"
            mend = "Make the real and imaginary parts the parameters (torch.view_as_real)"
            raise TypeError(message(where, problem, mend))
