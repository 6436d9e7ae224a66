"""The result of an eigen-solver: pairs that know their residuals."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secorder_func.typing import Tree

__all__ = ["Eigenpairs"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues and eigenvectors of a symmetric matrix, with the residual of each pair.

    An eigenvalue of the matrix lies within `residual_norms[i]` of `eigenvalues[i]`; where the next one is a gap away,
    the error is about the residual squared over the gap. A residual does not say that no other eigenvalue was missed.

    Attributes
    ----------
    eigenvalues
        Shape `(k,)`, in the order that the solver states.
    eigenvectors
        Orthonormal; from solvers on flat vectors the columns of an `(n, k)` tensor.
    residual_norms
        The norms `|A x - theta x|`, shape `(k,)`.
    num_matvecs
        How many products with one vector were spent.
    converged
        Whether every residual is within the tolerance.

    Examples
    --------
    >>> import torch
    >>> ones = torch.ones(1)
    >>> print(Eigenpairs(2 * ones, ones[:, None], 0 * ones, num_matvecs=3, converged=True))
    1 eigenvalue from 2 to 2, residuals at most 0 (3 products)
    """

    eigenvalues: Tensor
    eigenvectors: Tree
    residual_norms: Tensor
    num_matvecs: int
    converged: bool

    def __str__(self) -> str:
        values, worst = self.eigenvalues.tolist(), float(self.residual_norms.max())
        plural = "" if len(values) == 1 else "s"
        state = "" if self.converged else ", not converged"
        return (
            f"{len(values)} eigenvalue{plural} from {values[0]:.6g} to {values[-1]:.6g}, "
            f"residuals at most {worst:.2g} ({self.num_matvecs} products{state})"
        )
