"""Approximate inverses for linear solvers: of the diagonal, and of a randomised low-rank approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.group_sums import Sampling
from secorder_func.algorithms.low_rank import Products
from secorder_func.algorithms.probes import normal
from secorder_func.algorithms.wide import wide
from secorder_func.checks import check_count, check_number, check_params, check_positive
from secorder_func.errors import ArgumentError, NonFiniteError, message
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.typing import ChunkSize, Tree

__all__ = ["diagonal_preconditioner", "nystrom_preconditioner"]


def diagonal_preconditioner(diagonal: Tree, /, damping: float | Tensor = 0.0) -> LinearOperator:
    """Return the inverse of `diag(diagonal) + damping * I` as an operator (Jacobi).

    Parameters
    ----------
    diagonal
        A tree like the vectors of the space, such as `exact_diagonal(op)` or `hutchinson_diagonal(op, 100).value`.
    damping
        Added to every entry; of a damped operator that of which the diagonal was taken before.

    Raises
    ------
    ValueError
        An entry of the sum is not positive and finite; the leaf is named.

    Notes
    -----
    It helps where the scales of parameters differ. Of a matrix with a constant diagonal it does nothing.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import diagonal_preconditioner
    >>> diagonal_preconditioner({"w": torch.tensor([1.0, 3.0])}, 1.0) @ {"w": torch.ones(2)}
    {'w': tensor([0.5000, 0.2500])}
    """
    where = "diagonal_preconditioner"
    check_params(diagonal, where, name="diagonal")
    check_number(damping, where, name="damping")
    entries = tree.map(lambda leaf: leaf.detach() + damping, diagonal)
    leaves, _ = tree.flatten(entries)
    right = torch.stack(
        [((leaf > 0) & leaf.isfinite()).all().to(leaves[0].device) for leaf in leaves]
    )
    for path, leaf, fine in zip(tree.paths(entries), leaves, right.tolist(), strict=True):
        if not fine:
            worst = float(leaf.min())
            problem = (
                "every entry of diagonal + damping must be positive and finite. "
                f"At {path or 'the root'} got {worst:.3g}"
            )
            mend = "Pass tree.map(torch.abs, diagonal), clamp it, or raise damping"
            raise ArgumentError(message(where, problem, mend))
    inverse = tree.map(torch.reciprocal, entries)

    def scaled(vectors: Tree) -> Tree:
        return tree.map(torch.mul, vectors, inverse)

    return LinearOperator(scaled, like=inverse, matmat=scaled)


def nystrom_preconditioner(
    op: LinearOperator,
    rank: int,
    /,
    *,
    damping: float | Tensor,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> LinearOperator:
    r"""Return an approximate inverse of `A + damping * I`: good where `A` is large, and simple elsewhere.

    With the randomised Nystrom approximation `U diag(l) U^T` of `A`, `l_1 >= ... >= l_r`, it is
    `(l_r + damping) U diag(1 / (l + damping)) U^T + (I - U U^T)`.

    Parameters
    ----------
    op
        `A` without the damping, real, symmetric, with `A + damping * I` positive definite: a Gauss-Newton matrix of a
        convex loss, a Fisher matrix, a Hessian near a minimum.
    rank
        `r`, one product each; best about the number of eigenvalues above `damping`. At most `n` are taken.
    damping
        Positive; that of the system to be solved: `cg(op.damped(d), b, preconditioner=nystrom_preconditioner(op, 50,
        damping=d))`. For another damping `d` it is still a good one while the two are of one size.
    generator, chunk_size, memory_budget
        As for `hutchinson_trace`.

    Returns
    -------
    LinearOperator
        Symmetric positive definite. It keeps `r` vectors, and a product with it reads them twice.

    Raises
    ------
    ValueError
        The products show that `A + damping * I` is not positive definite; `damping` is not positive.
    NonFiniteError
        A product has NaN or infinite entries.

    Notes
    -----
    Beside the products it costs about `6 n r^2` operations. With `r = 2 ceil(1.5 d) + 1`, `d` the effective dimension
    `tr A (A + damping I)^-1`, the condition number of the preconditioned matrix is at most 28 in the mean (theorem 5.1
    of the paper), whatever that of `A + damping * I` is. Negative eigenvalues above `-damping` count as zero.

    References
    ----------
    Z. Frangella, J. A. Tropp, M. Udell, Randomized Nystrom preconditioning, SIAM Journal on Matrix Analysis and
    Applications 44(2), 2023. https://doi.org/10.1137/21M1466244

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, cg, nystrom_preconditioner
    >>> falling = 0.7 ** torch.arange(200.0)
    >>> op, b = LinearOperator(lambda v: falling * v, torch.zeros(200)), torch.ones(200)
    >>> M = nystrom_preconditioner(op, 40, damping=1e-4, generator=torch.Generator().manual_seed(0))
    >>> plain, better = (cg(op.damped(1e-4), b, rtol=1e-3, preconditioner=m) for m in (None, M))
    >>> better.num_matvecs < plain.num_matvecs / 10
    True
    """
    where = "nystrom_preconditioner"
    check_real_operator(op, where)
    check_symmetric(op, where)
    check_count(rank, where, name="rank")
    check_positive(damping, where, name="damping")
    added = float(damping)
    sampling = Sampling(op, op.draw_seed(generator), normal, chunk_size, memory_budget, where)
    values, basis = _nystrom(op, sampling, min(rank, op.shape[0]), added, where)
    weights = (values[-1:] + added) / (values + added) - 1
    unravel = tree.ravel(op.like)[1]

    def apply(vectors: Tree, batch_dims: int) -> Tree:
        rows = tree.ravel(vectors, batch_dims=batch_dims)[0].to(basis.dtype)
        return unravel(rows + ((rows @ basis.T) * weights) @ basis)

    return LinearOperator(lambda v: apply(v, 0), like=op.like, matmat=lambda V: apply(V, 1))


def _nystrom(
    op: LinearOperator, sampling: Sampling, rank: int, damping: float, where: str
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, descending, and eigenvectors as rows `(rank, n)` of the Nystrom approximation.

    With orthonormal probes `W` and `Y = A W` raised by `s W` for a small `s`, that is `Y (W^T Y)^-1 Y^T - s I`.
    """
    products = Products(op, sampling, None)
    dtype = products.images.dtype
    probes = tree.ravel(sampling.probes(0, slice(0, rank)), batch_dims=1)[0].to(dtype)
    probes = torch.linalg.qr(probes.T).Q.T.contiguous()
    unravel = tree.ravel(op.like)[1]

    def some(start: int, rows: slice) -> Tree:
        return unravel(probes[start + rows.start : start + rows.stop])

    products.extend(some, rank)
    images = products.images
    gram = wide(probes @ images.T)  # W^T A W
    if not bool(gram.isfinite().all()):
        mend = "Check the loss and its gradient at these parameters, or scale the matrix"
        raise NonFiniteError(message(where, "a product has NaN or infinite entries", mend))
    own, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    least, largest = float(own[0]), float(own.abs().max())
    noise = torch.finfo(op.dtype).eps * largest
    if least < -100 * noise and least <= -damping:
        problem = (
            f"the operator is not positive semidefinite: its curvature is {least:.3g} along some direction, "
            f"and damping is only {damping:.3g}"
        )
        mend = "Raise the damping above that, take a ggn_operator, or solve by minres without it"
        raise ArgumentError(message(where, problem, mend))
    raised = 2 * max(0.0, -least) + 4 * noise + torch.finfo(dtype).tiny
    columns, R = torch.linalg.qr((images + raised * probes).T)
    root = vectors * (own + raised).rsqrt()
    left, singular, _ = torch.linalg.svd(wide(R) @ root)
    values = (singular.square() - raised).clamp(min=0)
    return values.to(dtype), (columns @ left.to(dtype)).T.contiguous()
