"""The outermost eigenpair of every sample's matrix, all together."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.eigsh import wanted_first
from secorder_func.algorithms.flat_product import least_tolerance
from secorder_func.algorithms.probes import draw_seed, normal
from secorder_func.checks import check_count, check_positive
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    message,
    warn_user,
)
from secorder_func.operators import PerSampleOperator
from secorder_func.operators.chunks import default_memory_budget
from secorder_func.operators.outside import refuse_transforms
from secorder_func.operators.rows import Rows

__all__ = ["top_eigenpairs"]

Which = Literal["LM", "LA", "SA"]

_MOST, _KEPT = 24, 6
"""How many vectors of a sample there are at most, and how many are kept at a restart."""
_LOOKS_EVERY = 8
"""Steps between two looks at the residuals, which wait for the device."""


def top_eigenpairs(
    op: PerSampleOperator,
    /,
    *,
    which: Which = "LM",
    rtol: float = 1e-6,
    max_matvecs: int = 400,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> Eigenpairs:
    """Return the outermost eigenvalue of every sample's matrix with its eigenvector.

    Parameters
    ----------
    op
        A real per-sample operator.
    which
        `"LM"`: the largest in magnitude; `"LA"`: the largest; `"SA"`: the smallest, most negative.
    rtol
        What the residual norm may be beside the largest eigenvalue in magnitude that was seen of the matrix; at least
        50 times the rounding of the dtype is allowed, 4 times in half precision.
    max_matvecs
        How many products a sample takes at most.
    generator
        Its next value seeds the first vector, the same for all samples; torch's global generator if None.
    memory_budget
        Bytes for the vectors of the samples that are worked on together, 48 a sample; by default as for
        `LinearOperator.mm`.

    Returns
    -------
    Eigenpairs
        `eigenvalues` and `residual_norms` are `(samples,)`, the leaves of `eigenvectors` `(samples, ...)`, of norm one.
        `num_matvecs` is of one sample, the most that any took.

    Raises
    ------
    TypeError, ValueError
        The operator is not per sample, or complex; an option is unknown.

    Warns
    -----
    ConvergenceWarning
        Some residual is above the tolerance.

    Notes
    -----
    A Krylov space of every sample grows by the residual of its Ritz pair, orthogonalised twice, and is restarted with
    the best Ritz vectors, as in thick-restart Lanczos. Of a positive semidefinite Gauss-Newton or Fisher operator with
    fewer outputs than parameters the pair is computed directly, in the space of the outputs.

    References
    ----------
    K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM Journal on Matrix
    Analysis and Applications 22(2), 2000. https://doi.org/10.1137/S0895479898334605

    Examples
    --------
    >>> import torch
    >>> from secorder_func import per_sample_hessian_operator, top_eigenpairs
    >>> squares = lambda p, x: (x @ p) ** 2
    >>> op = per_sample_hessian_operator(squares, torch.zeros(2), torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    >>> top_eigenpairs(op).eigenvalues.round(decimals=3)
    tensor([ 2., 50.])
    """
    where = "top_eigenpairs"
    _check_per_sample(op, where)
    op.require_real(where)
    refuse_transforms(where)
    if which not in get_args(Which):
        known = ", ".join(repr(name) for name in get_args(Which))
        raise ArgumentError(message(where, f"which must be one of {known}, got {which!r}"))
    check_positive(rtol, where, name="rtol")
    check_count(max_matvecs, where, name="max_matvecs")
    if memory_budget is not None:
        check_count(memory_budget, where, name="memory_budget")
    work = torch.promote_types(op.dtype, torch.float32)
    tolerance = least_tolerance(float(rtol), op.dtype)
    rows = op.rows if which != "SA" and op.rows is not None and op.rows.cheaper() else None
    if rows is not None and _not_negative(rows.weights):
        values, vectors, residuals = _in_output_space(rows, memory_budget, work)
        scales = values.abs()
        spent = rows.weights.shape[1]
    else:
        seed = draw_seed(generator)
        values, vectors, residuals, scales, spent = _by_iteration(
            op, which, tolerance, max_matvecs, seed, memory_budget, work
        )
    met = residuals <= tolerance * scales.clamp(min=torch.finfo(work).tiny)
    missed = op.num_samples - int(met.sum())
    if missed:
        problem = (
            f"{missed} of {op.num_samples} residuals are above the tolerance {tolerance:.2g}, or NaN, "
            f"after {spent} products"
        )
        mend = "Raise max_matvecs; residual_norms say how far off they are"
        warn_user(message(where, problem, mend), ConvergenceWarning)
    _, unravel = tree.ravel(op.like)
    return Eigenpairs(
        values.to(op.dtype), unravel(vectors), residuals.to(op.dtype), spent, not missed
    )


def _not_negative(weights: Tensor) -> bool:
    """Say whether every sample's eigenvalues in the space of the outputs are at least zero, but for rounding."""
    rounding = 50 * torch.finfo(weights.dtype).eps
    return bool((weights >= -rounding * weights.abs().amax(1, keepdim=True)).all())


def _check_per_sample(op: Any, where: str) -> None:
    if not isinstance(op, PerSampleOperator):
        problem = f"the first argument must be a PerSampleOperator, got {type(op).__name__}"
        mend = "Make one with per_sample_hessian_operator(f, params, *batch)"
        raise ArgumentTypeError(message(where, problem, mend))


def _by_iteration(
    op: PerSampleOperator,
    which: Which,
    tolerance: float,
    most: int,
    seed: int,
    budget: int | None,
    work: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    n = op.shape[0]
    start = tree.ravel(normal(seed, range(1), op.like), batch_dims=1)[0].to(work)
    budget = default_memory_budget(op.device) if budget is None else budget
    together = max(1, budget // (2 * min(_MOST, n) * n * start.element_size()))
    found = []
    for first in range(0, op.num_samples, together):
        samples = slice(first, min(first + together, op.num_samples))
        space = _Krylov(op, samples, start, which)
        while space.spent < min(most, n) if n <= _MOST else space.spent < most:
            space.grow()
            if space.spent % _LOOKS_EVERY == 0 and space.within(tolerance):
                break
        found.append((*space.pair(), space.spent))
    values, vectors, residuals, scales, spent = zip(*found, strict=True)
    return (
        torch.cat(values),
        torch.cat(vectors),
        torch.cat(residuals),
        torch.cat(scales),
        max(spent),
    )


class _Krylov:
    """Orthonormal vectors of some samples, their products, and the best Ritz pair of each."""

    def __init__(self, op: PerSampleOperator, samples: slice, start: Tensor, which: Which) -> None:
        self._op, self._samples, self._which = op, samples, which
        self._unravel = tree.ravel(op.like)[1]
        count = len(range(op.num_samples)[samples])
        n = start.shape[1]
        self._limit = min(_MOST, n)
        self.spent = 0
        self._next = (start / torch.linalg.vector_norm(start)).expand(count, n)
        self._V = start.new_zeros(count, 0, n)
        self._W = self._V
        self._alive = torch.zeros(count, 0, dtype=torch.bool, device=start.device)
        self._values = self._residuals = self._scales = start.new_zeros(count)
        self._y = start.new_zeros(count, 0)

    def grow(self) -> None:
        """Add one vector and find the Ritz pair anew."""
        if self._V.shape[1] == self._limit:
            self._restart()
        v = self._next
        product = self._op.with_own(self._unravel(v), samples=self._samples)
        w = tree.ravel(product, batch_dims=1)[0].detach().to(v)
        self.spent += 1
        alive = torch.linalg.vector_norm(v, dim=1) > 0.5
        self._V = torch.cat([self._V, v.unsqueeze(1)], 1)
        self._W = torch.cat([self._W, w.unsqueeze(1)], 1)
        self._alive = torch.cat([self._alive, alive.unsqueeze(1)], 1)
        order, values, Y = self._ritz()
        self._scales = torch.maximum(self._scales, values.abs().amax(1))
        self._y = Y.gather(2, order[:, :1].unsqueeze(1).expand(-1, Y.shape[1], 1)).squeeze(2)
        x, ax = self._combined(self._y)
        self._values = (x * ax).sum(1) / (x * x).sum(1)
        r = ax - self._values.unsqueeze(1) * x
        self._residuals = torch.linalg.vector_norm(r, dim=1)
        self._next = self._outside(r)

    def within(self, tolerance: float) -> bool:
        """Say whether all residuals are."""
        return bool((self._residuals <= tolerance * self._scales).all())

    def pair(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return values, vectors, residual norms, and how large the matrices are."""
        x, _ = self._combined(self._y)
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return self._values, x, self._residuals, self._scales

    def _combined(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.unsqueeze(1)
        return (y @ self._V).squeeze(1), (y @ self._W).squeeze(1)

    def _ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the order of the Ritz pairs, wanted first, the values and the vectors, `(samples, m, m)`."""
        T = self._V @ self._W.mT
        # A sample with NaN must not keep eigh from the others; its own values come out as NaN below.
        T = torch.nan_to_num((T + T.mT) / 2, posinf=0.0, neginf=0.0)
        # A space that cannot grow has vectors of zeros: their Ritz value must not be taken for one of the matrix.
        far = 1 + 2 * T.abs().sum(2).amax(1, keepdim=True)
        aside = {"LM": 0.0, "LA": -1.0, "SA": 1.0}[self._which] * far * ~self._alive
        values, Y = torch.linalg.eigh(T + torch.diag_embed(aside))
        order = wanted_first(values, self._which).argsort(dim=1, descending=True, stable=True)
        return order, torch.diagonal(Y.mT @ T @ Y, dim1=1, dim2=2), Y

    def _restart(self) -> None:
        """Keep the best Ritz vectors."""
        order, _, Y = self._ritz()
        kept = min(_KEPT, self._limit - 1)
        columns = order[:, :kept].unsqueeze(1).expand(-1, Y.shape[1], -1)
        Y = Y.gather(2, columns).mT
        self._V, self._W = Y @ self._V, Y @ self._W
        self._alive = torch.linalg.vector_norm(self._V, dim=2) > 0.5

    def _outside(self, r: Tensor) -> Tensor:
        """Return the unit vectors of what of `r` is orthogonal to the space; zeros where nothing is but rounding."""
        size = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        r = r / size.clamp(min=torch.finfo(r.dtype).tiny)
        for _ in range(2):
            r = r - ((self._V @ r.unsqueeze(2)).mT @ self._V).squeeze(1)
        length = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        eps = torch.finfo(r.dtype).eps
        floor = eps * self._scales.unsqueeze(1)
        real = (length > 100 * eps) & (size > floor)
        return torch.where(real, r / length.clamp(min=eps), torch.zeros_like(r))


def _in_output_space(
    rows: Rows, budget: int | None, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of `R^T W R`, `W` not negative, from `W^(1/2) R R^T W^(1/2)`."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _, weights, leaves in rows.chunks(budget, whole=True):
        R = torch.cat([leaf.reshape(*leaf.shape[:2], -1).to(work) for leaf in leaves], 2)
        R = weights.clamp(min=0).sqrt().to(work).unsqueeze(2) * R
        _, Y = torch.linalg.eigh(R @ R.mT)
        x = (Y[:, :, -1:].mT @ R).squeeze(1)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = torch.zeros_like(x)
        unit[:, 0] = 1.0
        x = torch.where(length > 0, x / length.clamp(min=torch.finfo(work).tiny), unit)
        ax = ((R @ x.unsqueeze(2)).mT @ R).squeeze(1)
        theta = (x * ax).sum(1)
        found.append((theta, x, torch.linalg.vector_norm(ax - theta.unsqueeze(1) * x, dim=1)))
    values, vectors, residuals = zip(*found, strict=True)
    return torch.cat(values), torch.cat(vectors), torch.cat(residuals)
