"""The result of a linear solver: a solution that knows its residual."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secorder_func.typing import Tree

__all__ = ["Solution"]


@dataclass(frozen=True, eq=False)
class Solution:
    """An approximate solution of `A x = b`, with the norm of what is left of `b`.

    With `k` stacked right-hand sides all fields but `num_matvecs` have a leading axis of length `k`.

    Attributes
    ----------
    x
        The solution, a tree like `b`.
    residual_norm
        `|b - A x|` in the Euclidean norm, from a product with this `x`; shape `()` or `(k,)`.
    converged
        Whether that is within the tolerance; boolean, shape `()` or `(k,)`.
    num_matvecs
        How many vectors were multiplied, for all right-hand sides together.
    negative_curvature
        From `cg` only: the direction `p` with `p . A p <= 0` that ended it, a tree like `b`; None if none was met. With
        several right-hand sides zero for those that met none.
    curvature
        `p . A p / p . p` of it, shape `()` or `(k,)`; NaN for right-hand sides that met none.

    Examples
    --------
    >>> import torch
    >>> print(Solution(torch.ones(2), torch.tensor(1e-9), torch.tensor(True), num_matvecs=3))
    residual 1e-09 (3 products)
    """

    x: Tree
    residual_norm: Tensor
    converged: Tensor
    num_matvecs: int
    negative_curvature: Tree | None = None
    curvature: Tensor | None = None

    def __str__(self) -> str:
        failed = int((~self.converged).sum())
        state = ", not converged" if failed else ""
        if not self.residual_norm.ndim:
            return f"residual {float(self.residual_norm):.2g} ({self.num_matvecs} products{state})"
        count = len(self.residual_norm)
        if failed:
            state = f", {failed} not converged"
        worst = float(self.residual_norm.max()) if count else 0.0
        return (
            f"{count} solutions, residuals at most {worst:.2g} ({self.num_matvecs} products{state})"
        )
