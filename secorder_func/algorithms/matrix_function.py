"""Products with functions of a symmetric operator."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.density import Function, applied
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.krylov_spaces import KrylovSpaces
from secorder_func.checks import check_callable, check_count, check_like
from secorder_func.errors import ArgumentError, ConvergenceWarning, message, warn_user
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.operators.outside import refuse_transforms
from secorder_func.typing import Tree

__all__ = ["matrix_function"]


def matrix_function(
    op: LinearOperator, f: Function, b: Tree, /, *, num_steps: int = 64
) -> Estimate:
    r"""Return `f(A) b`, for `f` as `torch.sqrt`, `torch.rsqrt` or `torch.exp`.

    Parameters
    ----------
    op
        A real symmetric operator.
    f
        What to do with the eigenvalues; acts on each entry of a float64 tensor, and must be finite on the spectrum.
    b
        A vector like `op.like`.
    num_steps
        How many products, at most `n`; so many vectors are kept.

    Returns
    -------
    Estimate
        `value` is a tree like `b`. `standard_error` is not of chance: what the last eighth of the steps changed, entry
        by entry, which is usually more than what is missing, and what rounding of the largest eigenvalue makes of `f`
        at the small ones; infinite where that leaves nothing.

    Raises
    ------
    TypeError, ValueError
        The operator is complex or not symmetric; `b` is not like `op.like`; `f` is not finite at a Ritz value, as a
        square root of an indefinite operator.
    NonFiniteError
        A product has NaN or infinite entries.

    Notes
    -----
    The Lanczos approximation `|b| Q f(T) e_1`, with full reorthogonalisation. Its error falls at least as that of the
    best polynomial of degree `num_steps - 1` for `f` on the spectrum.

    References
    ----------
    N. J. Higham, Functions of Matrices, SIAM 2008, chapter 13. https://doi.org/10.1137/1.9780898717778

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, matrix_function
    >>> d = torch.tensor([1.0, 4.0, 9.0])
    >>> op = LinearOperator(lambda v: d * v, d)
    >>> matrix_function(op, torch.sqrt, torch.ones(3)).value.round(decimals=4)
    tensor([1., 2., 3.])
    """
    where = "matrix_function"
    check_real_operator(op, where)
    check_callable(f, where)
    check_like(b, op.like, where, name="b")
    check_count(num_steps, where, name="num_steps")
    check_symmetric(op, where)
    refuse_transforms(where)
    flat, unravel = tree.ravel(b)
    start = flat.detach().to(torch.promote_types(op.dtype, torch.float32))
    if not start.numel():
        return Estimate(b, b, 0)
    largest = start.abs().amax()
    start = start / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(start)
    steps = min(num_steps, op.shape[0])
    unit = start / length.clamp(min=torch.finfo(start.dtype).tiny)
    spaces = KrylovSpaces(op, unit.unsqueeze(0), steps, where)
    with running.task(where, steps, "products", together=op.ranks is not None):
        try:
            spaces.run()
        except running.Cancelled:
            if not spaces.done or not running.only_outermost():
                raise
            problem = f"cancelled after {spaces.done} of {steps} products"
            mend = "The error says how far off it is"
            warn_user(message(where, problem, mend), ConvergenceWarning)
            steps = spaces.done
    T, Q = spaces.projected(), spaces.Q[:, :steps]
    eps = torch.finfo(start.dtype).eps
    fewer = max(1, steps - max(1, steps // 8))
    (value, rounding), (before, _) = (_applied(f, T[0, :m, :m], eps, where) for m in (steps, fewer))
    x = value.to(start) @ Q[0]
    change = (x - before.to(start) @ Q[0, :fewer]).abs()
    if fewer == steps:
        change = torch.zeros_like(x) if op.shape[0] == 1 else torch.full_like(x, torch.inf)
    error = change + rounding / op.shape[0] ** 0.5
    size = length * largest
    return Estimate(unravel(size * x), unravel(size * error), steps)


def _applied(f: Function, T: Tensor, eps: float, where: str) -> tuple[Tensor, float]:
    """Return the first column of `f(T)`, and how much rounding of `T` may change it.

    What the first vector does not see is left out. Eigenvalues are known within some roundings of the largest: what `f`
    makes of that, as of a small eigenvalue beside a large one, is part of the error.
    """
    values, vectors = torch.linalg.eigh(T)
    blur = 10 * eps * float(values.abs().max())
    seen = vectors[0].abs() > torch.finfo(T.dtype).eps
    at = torch.where(seen, values, values[seen][:1].expand_as(values))
    found = applied(f, at, where)
    found = torch.where(found.isfinite() | (at.abs() > blur), found, applied(f, at.abs(), where))
    if not bool(found.isfinite().all()):
        worst = float(at[~found.isfinite()][0])
        problem = f"f is not finite at the Ritz value {worst:.4g} of the operator"
        raise ArgumentError(message(where, problem, "Damp the operator: op.damped(...)"))
    weights = torch.where(seen, vectors[0], torch.zeros_like(vectors[0]))
    moved = applied(f, at + blur, where) - applied(f, at - blur, where)
    rounding = float(torch.linalg.vector_norm(torch.where(seen, moved * weights, 0.0)))
    column: Tensor = vectors @ (found * weights)
    return column, rounding if rounding == rounding else float("inf")
