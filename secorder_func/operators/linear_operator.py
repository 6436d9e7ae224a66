"""The one operator class: a square matrix known by its products with vectors of a pytree's space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import (
    check_callable,
    check_like,
    check_number,
    check_params,
    refuse_sharded,
)
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.blocks import Selection, block_diagonal_of, block_of
from secorder_func.operators.chunks import Chunks, default_memory_budget
from secorder_func.operators.forms import FormsLike
from secorder_func.operators.per_sample_operator import PerSampleOperator
from secorder_func.operators.ranks import Ranks, agreed
from secorder_func.operators.rows import RowsLike
from secorder_func.operators.scipy_form import scipy_form
from secorder_func.seeds import draw_seed
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import ChunkSize, MatVec, Tree

if TYPE_CHECKING:
    import scipy.sparse.linalg

__all__ = ["LinearOperator", "check_real_operator", "check_symmetric"]


_IN_A_PASS = 8
"""How many times the usual budget the vectors may take that share a pass over the data."""


@dataclass(frozen=True, repr=False, eq=False)
class LinearOperator:
    """A square linear map from the space of a pytree to itself, given by its product.

    Parameters
    ----------
    matvec
        The product with one vector, a tree like `like`.
    like
        A member of the space: structure, shapes, dtypes and devices are read off it, its values are not used.
    matmat
        The product with several vectors at once: a tree with one more leading axis on every leaf, to the same. Without
        it `mm` multiplies one by one.
    quadratic
        The numbers `v_k . A v_k` of such a stack, shape `(k,)`, if they can be had for less than products.
    forms
        The same without products, summed over groups of vectors, where a propagation through the loss gives them.
    rows
        The matrix as a sum of few outer products, where it is that.
    symmetric
        Whether the matrix is symmetric. Algorithms that need symmetry check this.
    mode
        By which exact route the products are computed; None where that has no meaning.
    compile_seconds
        How long `torch.compile` took for the product; None if it was not asked.
    passes
        Whether every call of `matvec`, `matmat` or `quadratic` is a pass over much data, so that it pays to take as
        many vectors at once as memory holds.
    witness
        An operator that is cheaper, and another one where this is another one, by which a checkpoint knows it again.
    ranks
        The processes that make the product together, if they are several.
    learned
        What chunks of vectors took, in bytes, by kind of work; filled in by use.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator
    >>> double = LinearOperator(lambda v: {"a": 2 * v["a"]}, like={"a": torch.zeros(2)})
    >>> (double + 3 * double.damped(1.0)) @ {"a": torch.tensor([1.0, 0.0])}
    {'a': tensor([11.,  0.])}
    >>> double.dense()
    tensor([[2., 0.],
            [0., 2.]])
    """

    matvec: MatVec
    like: Tree
    matmat: MatVec | None = None
    quadratic: Callable[[Tree], Tensor] | None = None
    forms: FormsLike | None = None
    rows: RowsLike | None = None
    symmetric: bool = True
    mode: str | None = None
    compile_seconds: float | None = None
    passes: bool = False
    witness: LinearOperator | None = None
    ranks: Ranks | None = None
    learned: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_callable(self.matvec, "LinearOperator", name="matvec")
        check_params(self.like, "LinearOperator", name="like")

    # ------------------------------------------------------------------------------ what it is

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        n = tree.numel(self.like)
        return (n, n)

    @property
    def batch_shape(self) -> torch.Size:
        """The axes of samples: none, there is one matrix."""
        return torch.Size()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which all leaves promote, that of `dense()` and `flat()`."""
        return tree.common_dtype(self.like)

    @property
    def device(self) -> torch.device:
        """The device of the first leaf, that of `dense()` and `flat()`."""
        device: torch.device = tree.flatten(self.like)[0][0].device
        return device

    def __repr__(self) -> str:
        n = self.shape[0]
        leaves = len(tree.flatten(self.like)[0])
        mode = "" if self.mode is None else f", mode={self.mode!r}"
        return f"LinearOperator({n} x {n}, {leaves} leaves, {self.dtype}, {self.device}{mode})"

    # -------------------------------------------------------------------------------- products

    def __matmul__(self, v: Tree) -> Tree:
        """Return the product with one vector."""
        check_like(v, self.like, "LinearOperator @ v")
        product = self.matvec(v)
        check_like(product, self.like, "LinearOperator @ v", name="the product")
        return product

    def mm(
        self,
        vectors: Tree,
        /,
        *,
        chunk_size: ChunkSize = "auto",
        memory_budget: int | None = None,
    ) -> Tree:
        """Return the products with `k` stacked vectors.

        Parameters
        ----------
        vectors
            Every leaf has a leading axis of length `k`, as have those of the result.
        chunk_size
            How many to multiply at once: a number; None for all; or `"auto"`, as many as fit the budget. Then the bytes
            of the first product are counted, so that the same call takes the same chunks on every machine, and a chunk
            is halved when memory runs out. Inside a transform, where nothing can be counted, 4 million entries are
            taken at once, at most 64 vectors.
        memory_budget
            How many bytes a chunk may take beside `vectors` and the result, copies inside of kernels included; 128 MiB
            on a CPU, else 1 GiB by default.
        """
        where = "LinearOperator.mm"
        check_like(vectors, self.like, where, name="vectors", batched=True)
        chunks = self.chunks(chunk_size, memory_budget, where)
        count = tree.flatten(vectors)[0][0].shape[0]
        if count == 0:
            return vectors
        parts = chunks.map(
            lambda rows: tree.map(lambda leaf: leaf[rows], vectors),
            lambda taken, rows: self._mm(taken),
            count,
        )
        return _joined(parts, count)

    def basis(self, rows: slice) -> Tree:
        """Return some rows of the identity, stacked."""
        return tree.basis(self.like, rows.start, rows.stop)

    def chunks(self, chunk_size: ChunkSize, memory_budget: int | None, where: str) -> Chunks:
        """Return the chunks in which an algorithm works on vectors of this space; arguments as for `mm`."""
        known = self.learned
        if (
            self.passes
        ):  # nothing is to be counted: of a vector and its product, two each may be there
            one = sum(leaf.numel() * leaf.element_size() for leaf in tree.flatten(self.like)[0])
            known = {where: 2 * one}
            memory_budget = memory_budget or _IN_A_PASS * default_memory_budget(self.device)
        return Chunks(
            chunk_size,
            memory_budget,
            where,
            device=self.device,
            entries=self.shape[0],
            known=known,
        )

    def draw_seed(self, generator: torch.Generator | None) -> int:
        """Return the next value of a generator, torch's global one if None; the same in all processes."""
        return agreed(self.ranks, draw_seed(generator))

    def _mm(self, vectors: Tree) -> Tree:
        if self.matmat is not None:
            return self.matmat(vectors)
        return tree.stack([self.matvec(v) for v in tree.unstack(vectors)])

    def quadratic_forms(self, vectors: Tree, /) -> Tensor:
        """Return `v_k . A v_k` of `k` stacked vectors, shape `(k,)`, real."""
        check_like(
            vectors, self.like, "LinearOperator.quadratic_forms", name="vectors", batched=True
        )
        if self.quadratic is not None:
            return self.quadratic(vectors)
        found = None if self.forms is None else self.forms.of(vectors)
        if found is not None:
            return found
        return tree.batched_dot(vectors, self._mm(vectors))

    # ------------------------------------------------------------------------------ arithmetic

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Return the sum with another operator on the same space."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        check_like(other.like, self.like, "LinearOperator + other", name="other")
        both = None
        if self.matmat is not None and other.matmat is not None:
            both = _sum_of(self.matmat, other.matmat)
        any_witness = self.witness is not None or other.witness is not None
        return LinearOperator(
            matvec=_sum_of(self.matvec, other.matvec),
            like=self.like,
            matmat=both,
            symmetric=self.symmetric and other.symmetric,
            mode=self.mode if self.mode == other.mode else None,
            passes=self.passes or other.passes,
            witness=(self.witness or self) + (other.witness or other) if any_witness else None,
            ranks=self.ranks.around(other.ranks) if self.ranks is not None else other.ranks,
        )

    def __mul__(self, factor: Any) -> LinearOperator:
        """Return the operator scaled by a real number or 0-dim tensor."""
        if not isinstance(factor, (int, float)) and not (
            isinstance(factor, Tensor) and not factor.ndim
        ):
            return NotImplemented
        return replace(
            self,
            matvec=_scaled(self.matvec, factor),
            matmat=None if self.matmat is None else _scaled(self.matmat, factor),
            quadratic=lambda vectors: self.quadratic_forms(vectors) * factor,
            forms=None,
            rows=None,
            witness=None if self.witness is None else self.witness * factor,
        )

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        """Return the negative."""
        return self * -1.0

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """Return the difference to another operator on the same space."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return self + (-other)

    def damped(self, damping: float | Tensor) -> LinearOperator:
        """Return `A + damping * I`."""
        check_number(damping, "LinearOperator.damped", name="damping")

        def quadratic(vectors: Tree) -> Tensor:
            return self.quadratic_forms(vectors) + damping * tree.batched_dot(vectors, vectors)

        return replace(
            self,
            matvec=_shifted(self.matvec, damping),
            matmat=None if self.matmat is None else _shifted(self.matmat, damping),
            quadratic=quadratic,
            forms=None,
            rows=None,
            witness=None if self.witness is None else self.witness.damped(damping),
        )

    # -------------------------------------------------------------------------- representations

    def flat(self) -> LinearOperator:
        """Return the same matrix on 1-D vectors, entries in the order of `tree.ravel(like)`."""
        _, unravel = tree.ravel(self.like)
        matvec, matmat = self.matvec, self.matmat

        def flat_matmat(vectors: Tensor) -> Tensor:
            assert matmat is not None
            return tree.ravel(matmat(unravel(vectors)), batch_dims=1)[0]

        return LinearOperator(
            matvec=lambda vector: tree.ravel(matvec(unravel(vector)))[0],
            like=torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape[0]),
            matmat=None if matmat is None else flat_matmat,
            quadratic=lambda vectors: self.quadratic_forms(unravel(vectors)),
            symmetric=self.symmetric,
            mode=self.mode,
            passes=self.passes,
            witness=None if self.witness is None else self.witness.flat(),
            ranks=self.ranks,
        )

    def block(self, selection: Selection) -> LinearOperator:
        """Return the diagonal block of some leaves, on dicts of these leaves by name.

        Parameters
        ----------
        selection
            A name, names, or a function that says yes to the names that are wanted. The name of a leaf joins the keys
            on the way to it by dots, as `named_parameters` does; the name of what holds leaves stands for all of them.

        Returns
        -------
        LinearOperator
            Its forms and exact traces are as cheap as those of the whole.

        Examples
        --------
        >>> import torch
        >>> from secorder_func import LinearOperator
        >>> like = {"a": torch.zeros(1), "b": torch.zeros(1)}
        >>> op = LinearOperator(lambda v: {"a": v["b"], "b": v["a"] + 2 * v["b"]}, like)
        >>> op.block("b").dense()
        tensor([[2.]])
        """
        return LinearOperator(**block_of(self, selection, "LinearOperator.block"))

    def block_diagonal(self, groups: Mapping[str, Selection] | None = None) -> LinearOperator:
        """Return the operator that keeps the diagonal blocks of groups of leaves and is zero between them.

        `groups` are selections by name, as for `block`; without them the leaves of each module, the name up to the last
        dot, are a group. Leaves in no group are zero. A product costs one product for each group.
        """
        return LinearOperator(**block_diagonal_of(self, groups, "LinearOperator.block_diagonal"))

    def dense(self, *, chunk_size: ChunkSize = "auto", memory_budget: int | None = None) -> Tensor:
        """Return the matrix itself, `(n, n)`, at the cost of `n` products in chunks as for `mm`.

        Raises
        ------
        TypeError
            The space is complex: a Hessian is linear over the reals only, so that no complex matrix represents it.
        """
        self.require_real("LinearOperator.dense")

        def columns(vectors: Tree, rows: slice) -> Tensor:
            flat: Tensor = tree.ravel(self._mm(vectors), batch_dims=1)[0]
            return flat

        chunks = self.chunks(chunk_size, memory_budget, "LinearOperator.dense")
        parts = list(chunks.map(self.basis, columns, self.shape[0]))
        return (
            torch.cat(parts).T if parts else torch.zeros(0, 0, dtype=self.dtype, device=self.device)
        )

    def scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return the matrix as a `scipy.sparse.linalg.LinearOperator` on float arrays.

        Vectors are moved to the operator's device and dtype and back; half precision is seen as float32 by SciPy.

        Raises
        ------
        MissingExtraError
            SciPy is not installed.
        TypeError
            The space is complex.
        """
        return scipy_form(self)

    def require_real(self, where: str) -> None:
        """Refuse a complex space."""
        if self.dtype.is_complex:
            raise TypeError(
                message(
                    where,
                    f"the space must be real, got {self.dtype}",
                    "Make the real and imaginary parts the parameters (torch.view_as_real)",
                )
            )


def _joined(parts: Iterator[Tree], count: int) -> Tree:
    """Return one tree of `count` rows out of chunks; written into place, so that no row exists twice."""
    first = next(parts)
    leaves, unflatten = tree.flatten(first)
    if leaves[0].shape[0] == count:
        return first
    if in_transform() or any(t.requires_grad or t.layout != torch.strided for t in leaves):
        return tree.map(lambda *rows: torch.cat(rows), first, *parts)
    whole = [leaf.new_empty((count, *leaf.shape[1:])) for leaf in leaves]
    done = 0
    for part in chain([first], parts):
        pieces, _ = tree.flatten(part)
        for leaf, piece in zip(whole, pieces, strict=True):
            leaf[done : done + piece.shape[0]] = piece
        done += pieces[0].shape[0]
    return unflatten(whole)


def check_real_operator(op: Any, where: str, *, per_sample: bool = False) -> None:
    """Refuse what is no operator on a real space, and one with a matrix a sample unless that is allowed."""
    if isinstance(op, PerSampleOperator) and not per_sample:
        problem = "the first argument must be one matrix, got an operator with a matrix a sample"
        mend = "Take hutchinson_trace, hutchinson_diagonal, exact_trace or exact_diagonal"
        raise ArgumentTypeError(message(where, problem, mend))
    if not isinstance(op, (LinearOperator, PerSampleOperator)):
        raise ArgumentTypeError(
            message(
                where,
                f"the first argument must be a LinearOperator, got {type(op).__name__}",
                "Make one with hessian_operator(f, params), or LinearOperator(product, like=params)",
            )
        )
    op.require_real(where)
    refuse_sharded(op.like, where, name="the operator's space")


def check_symmetric(op: LinearOperator, where: str, mend: str = "") -> None:
    """Refuse an operator that is not symmetric."""
    if not op.symmetric:
        raise ArgumentError(message(where, "the operator is not symmetric", mend))


def _sum_of(first: MatVec, second: MatVec) -> MatVec:
    return lambda v: tree.add(first(v), second(v))


def _scaled(product: MatVec, factor: float | Tensor) -> MatVec:
    return lambda v: tree.scale(factor, product(v))


def _shifted(product: MatVec, damping: float | Tensor) -> MatVec:
    return lambda v: tree.axpy(damping, v, product(v))
