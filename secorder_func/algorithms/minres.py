"""Minimal residuals: linear equations with a symmetric operator, indefinite or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secorder_func.algorithms.iteration import End, Iteration
from secorder_func.algorithms.krylov_solver import solve
from secorder_func.algorithms.linear_system import LinearSystem
from secorder_func.algorithms.solution import Solution
from secorder_func.operators import LinearOperator
from secorder_func.typing import Tree

__all__ = ["minres"]


def minres(
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
    r"""Solve `A x = b` for a symmetric operator, indefinite or not, by minimal residuals.

    Parameters
    ----------
    op
        `A`, real. It may be singular if `b` is in its range; then `x`, from `x0=None` and without a preconditioner, is
        the solution of least norm.
    b, rtol, atol, max_matvecs, x0
        As for `cg`.
    preconditioner
        A symmetric positive definite operator, near the inverse of `|A|`.

    Returns
    -------
    Solution
        As for `cg`, differentiable likewise; `negative_curvature` is None.

    Raises
    ------
    ValueError, TypeError, NonFiniteError
        As for `cg`.

    Warns
    -----
    ConvergenceWarning
        It did not converge: the matrix is singular to rounding and `b` is not in its range, in which case `x` is near a
        least-squares solution; `max_matvecs` were spent; or rounding allows no smaller residual.

    Notes
    -----
    One product a step, and memory for about nine vectors. The residual never grows (in the norm of the preconditioner,
    if there is one). It takes about as many products as `cg` where that works, and up to the square of it where
    eigenvalues lie on both sides of zero. Precision, looks at the residual and gradients are as for `cg`; where the
    matrix is singular there are no gradients, and backward warns.

    References
    ----------
    C. C. Paige, M. A. Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12,
    1975. https://doi.org/10.1137/0712047
    S.-C. T. Choi, Iterative methods for singular linear equations and least-squares problems, PhD thesis, Stanford
    University, 2006, for the residual vector.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, minres
    >>> op = hessian_operator(lambda p: p[0] ** 2 - p[1] ** 2, torch.ones(2))
    >>> minres(op, torch.tensor([2.0, 2.0])).x
    tensor([ 1.0000, -1.0000])
    """
    return solve(
        MinimalResiduals,
        op,
        b,
        rtol=rtol,
        atol=atol,
        max_matvecs=max_matvecs,
        preconditioner=preconditioner,
        x0=x0,
        where="minres",
    )


class MinimalResiduals(Iteration):
    """One step of Lanczos's method, and of the QR factorisation of its tridiagonal matrix by reflections `[c s; s -c]`.

    `q` are the Lanczos vectors, orthonormal in the norm of the preconditioner `M`, and `v = M q`: `A V = Q T`.
    """

    def __init__(self, system: LinearSystem, r: Tensor, goal: Tensor) -> None:
        super().__init__(system, r, goal)
        zero = torch.zeros_like(goal)
        z = system.preconditioned(r)
        square = self.dots(r, z)
        self.mark(~(square > 0), End.BAD_PRECONDITIONER)
        length = square.clamp(min=0).sqrt()
        # The residual itself is needed only where its norm is not that which the recurrence knows.
        self.r = None if system.preconditioner is None else r
        inverse = _inverse(length)[:, None]
        self.q, self.q_before = r * inverse, torch.zeros_like(r)
        self.v = self.q if z is r else z * inverse
        self.w, self.w_before = torch.zeros_like(r), torch.zeros_like(r)
        self.beta, self.left = zero, length
        self.cosine, self.sine = zero - 1, zero
        self.bar, self.far = zero, zero  # entries of the next column that reflections have changed
        self.largest, self.scale = zero, zero  # column of T so far; |A v| / |v|
        self.flattest = torch.full_like(goal, math.inf)  # |A r| / |r| so far

    def step(self) -> None:
        system, beta = self.system, self.beta
        u = system.product(self.v)
        gain = None if self.r is None else _norms(u) / _norms(self.v)
        u.addcmul_(beta[:, None], self.q_before, value=-1)
        alpha = self.dots(self.v, u)
        u.addcmul_(alpha[:, None], self.q, value=-1)
        z = system.preconditioned(u)
        square = self.dots(u, z)
        self.mark(~(alpha.isfinite() & square.isfinite()), End.NOT_FINITE)
        self.mark(square < 0, End.BAD_PRECONDITIONER)
        beta_next = square.clamp(min=0).sqrt()

        # Two reflections act on the new column (beta, alpha, beta_next).
        delta = self.cosine * self.bar + self.sine * alpha
        corner = self.sine * self.bar - self.cosine * alpha
        bar = -self.cosine * beta_next
        gamma = torch.hypot(corner, beta_next)
        column = torch.hypot(torch.hypot(alpha, beta), beta_next)
        self.largest = torch.maximum(self.largest, column)
        self.scale = self.largest if gain is None else torch.maximum(self.scale, gain)
        eps = torch.finfo(u.dtype).eps
        self.mark(gamma <= eps * self.largest, End.SINGULAR)
        over = self.end != 0
        inverse = gamma.reciprocal().masked_fill_(over, 0.0)
        w = self.w_before.mul_((-self.far * inverse)[:, None])
        w.addcmul_((-delta * inverse)[:, None], self.w).addcmul_(inverse[:, None], self.v)
        self.w_before, self.w = self.w, w
        move = corner * inverse * self.left

        # What is left is in the null space if A r is next to nothing beside r, and x then only grows along it.
        self.flattest = torch.minimum(self.flattest, torch.hypot(corner, bar))
        singular = self.flattest <= math.sqrt(eps) * self.largest
        size = _norms(self.x) + move.abs() * _norms(w)
        self.mark(singular & (10 * eps * self.scale * size > self.left), End.SINGULAR)
        over = self.end != 0
        self.x.addcmul_(move.masked_fill_(over, 0.0)[:, None], w)
        cosine = (corner * inverse).masked_fill_(over, 0.0)
        sine = (beta_next * inverse).masked_fill_(over, 0.0)

        self.left = torch.where(over, self.left, sine * self.left)
        scaled = _inverse(beta_next).masked_fill_(over, 0.0)[:, None]
        self.q_before, self.q = self.q, u.mul_(scaled)
        self.v = self.q if z is u else z.mul_(scaled)
        self.beta, self.bar, self.far = beta_next, bar, self.sine * beta_next
        self.cosine, self.sine = cosine, sine
        self.mark(self._residual(over) <= self.goal, End.CONVERGED)

    def _residual(self, over: Tensor) -> Tensor:
        """Return the Euclidean norms of the residuals."""
        if self.r is None:
            return self.left
        kept = (self.sine * self.sine).masked_fill_(over, 1.0)
        self.r.mul_(kept[:, None])
        self.r.addcmul_((self.left * self.cosine)[:, None], self.q, value=-1)
        return _norms(self.r)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _inverse(lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, 1 / lengths, 0.0)
