"""A symmetric matrix and an approximate inverse of it on flat vectors, the rows of `(k, n)` tensors.

Entries are in the order of `tree.ravel(op.like)`; rows are in the dtype in which solvers work: that of the operator, or
float32 for half precision.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_like
from secorder_func.errors import ArgumentError, NonFiniteError, message
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.operators.outside import differentiated_outside, refuse_forward_mode
from secorder_func.typing import Tree

__all__ = ["LinearSystem", "lengths"]


class LinearSystem:
    """The products that a solver takes, counted.

    Attributes
    ----------
    num_matvecs
        How many vectors were multiplied.
    differentiated
        Whether a recorded product depends on what somebody outside may differentiate.
    """

    def __init__(self, op: Any, preconditioner: Any, where: str) -> None:
        _check_operator(op, "the operator", where)
        if preconditioner is not None:
            _check_operator(preconditioner, "the preconditioner", where)
            check_like(preconditioner.like, op.like, where, name="preconditioner.like")
        self.op: LinearOperator = op
        self.preconditioner: LinearOperator | None = preconditioner
        self.where = where
        self.work = torch.promote_types(op.dtype, torch.float32)
        self.num_matvecs = 0
        self.differentiated = False
        self._unravel = tree.ravel(op.like)[1]

    def rows(self, vectors: Tree, name: str, *, batched: bool | None = None) -> tuple[Tensor, bool]:
        """Return a tree, or a stack of trees, as rows, and whether it is a stack; by its shape if `batched` is None."""
        if batched is None:
            batched = _is_stack(vectors, self.op.like)
        check_like(vectors, self.op.like, self.where, name=name, batched=batched)
        if not batched:
            vectors = tree.map(lambda leaf: leaf.unsqueeze(0), vectors)
        rows: Tensor = tree.ravel(vectors, batch_dims=1)[0]
        return rows.to(self.work), batched

    def tree(self, rows: Tensor, *, batched: bool) -> Tree:
        """Return rows as a stack of trees, or the only row as a tree."""
        return self._unravel(rows if batched else rows[0])

    def product(self, rows: Tensor) -> Tensor:
        """Return `A v` for every row, a new tensor, without a graph."""
        with torch.no_grad():
            return self._multiplied(rows)

    def recorded_product(self, rows: Tensor) -> Tensor:
        """Do as `product`, with a graph where there is something to be differentiated."""
        products = self._multiplied(rows)
        self.differentiated = self.differentiated or differentiated_outside(products)
        return products

    def preconditioned(self, rows: Tensor) -> Tensor:
        """Return `M v` for every row; the rows themselves if there is no preconditioner."""
        if self.preconditioner is None:
            return rows
        with torch.no_grad():
            return self._applied(self.preconditioner, rows)

    def refuse_values(self) -> NoReturn:
        """Raise the error of a product that is not finite."""
        problem = (
            f"a product (of {self.num_matvecs} so far) has NaN or infinite entries, or a norm beyond "
            "its dtype's range"
        )
        mend = "Check the loss and its gradient at these parameters, or scale the matrix"
        raise NonFiniteError(message(self.where, problem, mend))

    def refuse_preconditioner(self) -> NoReturn:
        """Raise the error of a preconditioner that is not positive definite."""
        problem = "the preconditioner is not positive definite: v . M v <= 0 for a residual v"
        mend = "Take diagonal_preconditioner or nystrom_preconditioner, with more damping"
        raise ArgumentError(message(self.where, problem, mend))

    def _multiplied(self, rows: Tensor) -> Tensor:
        self.num_matvecs += len(rows)
        products = self._applied(self.op, rows)
        refuse_forward_mode(self.where, products)
        return products

    def _applied(self, op: LinearOperator, rows: Tensor) -> Tensor:
        if len(rows) == 1:  # what acts on single vectors may be compiled, or cheaper
            flat: Tensor = tree.ravel(op @ self._unravel(rows[0]))[0].unsqueeze(0)
        else:
            flat = tree.ravel(op.mm(self._unravel(rows)), batch_dims=1)[0]
        return flat.to(self.work)


def lengths(rows: Tensor) -> Tensor:
    """Return the norms of rows, `(k,)`, however large or small their entries."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms: Tensor = torch.linalg.vector_norm(rows / scale, dim=1)
    return norms * scale.squeeze(1)


def _is_stack(vectors: Tree, like: Tree) -> bool:
    """Say whether every leaf has one axis more than that of `like`."""
    leaves, expected = tree.flatten(vectors)[0], tree.flatten(like)[0]
    return len(leaves) == len(expected) and all(
        isinstance(leaf, Tensor) and leaf.ndim == one.ndim + 1
        for leaf, one in zip(leaves, expected, strict=True)
    )


def _check_operator(op: Any, name: str, where: str) -> None:
    check_real_operator(op, where)
    if not op.symmetric:
        mend = "Solve with a symmetric matrix, such as that of the normal equations"
        raise ArgumentError(message(where, f"{name} is not symmetric", mend))
