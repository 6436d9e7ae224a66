"""Conjugate gradients: linear equations with a symmetric positive definite operator."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func.algorithms.iteration import Direction, End, Iteration
from secorder_func.algorithms.krylov_solver import solve
from secorder_func.algorithms.linear_system import LinearSystem
from secorder_func.algorithms.solution import Solution
from secorder_func.operators import LinearOperator
from secorder_func.typing import Tree

__all__ = ["cg"]


def cg(
    op: LinearOperator,
    b: Tree,
    /,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    preconditioner: LinearOperator | None = None,
    x0: Tree | None = None,
) -> Solution:
    r"""Solve `A x = b` for a symmetric positive definite operator by conjugate gradients.

    Parameters
    ----------
    op
        `A`, real. A Hessian is rarely positive definite: damp it, `op.damped(damping)`, or take `minres`.
    b
        A tree like `op.like`, or `k` stacked ones, with one more leading axis on every leaf. Several are solved side by
        side, with products through `op.mm`; one that has converged takes part no longer.
    rtol, atol
        It has converged when `|b - A x| <= max(rtol |b|, atol)`, of the true residual: where the recurrence says so and
        a product does not, the iteration starts from the true residual again, as long as that halves it.
    max_matvecs
        The most products for one right-hand side, that of the residual at the end included; `20 n`, at most 10,000, if
        None.
    preconditioner
        An approximate inverse of `A`, symmetric positive definite: `diagonal_preconditioner`,
        `nystrom_preconditioner`, or your own operator.
    x0
        Where to start, like `b`; zero if None.

    Returns
    -------
    Solution
        `x`, its true `residual_norm`, whether it `converged`. `x` is differentiable with respect to `b` and to whatever
        the products depend on.

    Raises
    ------
    ValueError, TypeError
        `b` or `x0` is not like `op.like`, a tolerance is negative, or the operator is complex or not symmetric. A
        preconditioner is not positive definite.
    NonFiniteError
        A product has NaN or infinite entries.

    Warns
    -----
    ConvergenceWarning
        It did not converge: the curvature `p . A p` along a search direction was not positive to rounding, in which
        case it stops where it is and returns the direction (`negative_curvature`, `curvature`); `max_matvecs` were
        spent; or rounding allows no smaller residual.

    Notes
    -----
    One product and one application of the preconditioner a step, and memory for about seven vectors. The error falls as
    `((sqrt(c) - 1) / (sqrt(c) + 1))^m` with the condition number `c`, and faster where eigenvalues are clustered. The
    iteration works in float32 for half precision, with products in the operator's dtype. Where a look at the residual
    would wait for a device, it is taken every 8 steps, so that up to 7 products may be made in vain; `x` is the same.

    Gradients are those of the exact solution, by the implicit function theorem: backward solves with the same matrix,
    tolerance and preconditioner, and may warn. Where something is differentiated, the forward pass makes one product
    more. A direction of negative curvature carries no gradient.

    References
    ----------
    M. R. Hestenes, E. Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. Nat. Bur. Standards
    49, 1952. https://doi.org/10.6028/jres.049.044

    Examples
    --------
    >>> import torch
    >>> from secorder_func import cg, hessian_operator
    >>> op = hessian_operator(lambda p: (p**4).sum(), torch.tensor([1.0, 2.0]))
    >>> solution = cg(op, torch.tensor([12.0, 12.0]))
    >>> solution.x, bool(solution.converged)
    (tensor([1.0000, 0.2500]), True)
    """
    return solve(
        ConjugateGradients,
        op,
        b,
        rtol=rtol,
        atol=atol,
        max_matvecs=max_matvecs,
        preconditioner=preconditioner,
        x0=x0,
        where="cg",
    )


class ConjugateGradients(Iteration):
    """One step minimises the error in the norm of `A` along one more direction."""

    def __init__(self, system: LinearSystem, r: Tensor, goal: Tensor) -> None:
        super().__init__(system, r, goal)
        self.r = r
        z = system.preconditioned(r)
        self.p = z.clone()
        self.rz = self.dots(r, z)
        self.pp = self.rz  # p . M^-1 p
        self.curvature = torch.zeros_like(goal)  # p . A p
        self.largest = torch.zeros_like(goal)  # Rayleigh quotient so far
        self.mark(~(self.rz > 0), End.BAD_PRECONDITIONER)

    def step(self) -> None:
        Ap = self.system.product(self.p)
        self.curvature = self.dots(self.p, Ap)
        self.largest = torch.maximum(self.largest, self.curvature / self.pp)
        noise = torch.finfo(self.p.dtype).eps * self.largest * self.pp
        self.mark(~self.curvature.isfinite(), End.NOT_FINITE)
        self.mark(self.curvature <= noise, End.CURVATURE)
        alpha = (self.rz / self.curvature).masked_fill_(self.end != 0, 0.0)[:, None]
        self.x.addcmul_(alpha, self.p)
        self.r.addcmul_(alpha, Ap, value=-1)

        z = self.system.preconditioned(self.r)
        rz = self.dots(self.r, z)
        left = rz if z is self.r else self.dots(self.r, self.r)
        self.mark(left.sqrt() <= self.goal, End.CONVERGED)
        self.mark(~(rz > 0), End.BAD_PRECONDITIONER)
        over = self.end != 0
        beta = (rz / self.rz).masked_fill_(over, 1.0)
        self.p.mul_(beta[:, None]).addcmul_((~over).to(z.dtype)[:, None], z)
        # z and the last p are orthogonal in the norm of M^-1, so that no product with it is needed.
        self.pp = torch.where(over, self.pp, rz + beta * beta * self.pp)
        self.rz = torch.where(over, self.rz, rz)

    def direction(self, row: int) -> Direction:
        p = self.p[row].clone()
        return p, float(self.curvature[row] / (p * p).sum())
