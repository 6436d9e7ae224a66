"""Diagonals of operators: estimated, and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.checkpoint import CheckpointLike
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import Operator, Sampling, exact_forms, settings_of
from secorder_func.algorithms.low_rank import (
    OfRange,
    error_of_mean,
    left_out,
    mean_over_pairs,
)
from secorder_func.algorithms.moments import Moments
from secorder_func.algorithms.probes import Distribution, check_distribution, rademacher
from secorder_func.algorithms.stopping import Accumulated, Target, estimated
from secorder_func.operators import LinearOperator, PerSampleOperator
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.typing import ChunkSize, Tree

__all__ = ["exact_diagonal", "hutchinson_diagonal", "xdiag"]


def hutchinson_diagonal(
    op: Operator,
    /,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    resume: Estimate | None = None,
    checkpoint: CheckpointLike = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
    distribution: Distribution = rademacher,
) -> Estimate:
    r"""Estimate the diagonal as the mean of `v * A v` over random probes.

    Parameters
    ----------
    op, num_matvecs, rtol, atol, max_matvecs, resume, checkpoint, generator, chunk_size, memory_budget, distribution
        As for `hutchinson_trace`.

    Returns
    -------
    Estimate
        Value and standard error are trees like `op.like`, of a per-sample operator with a leading axis of samples;
        unbiased.

    Raises
    ------
    TypeError, ValueError
        As for `hutchinson_trace`.

    Notes
    -----
    With Rademacher probes the variance of entry `i` for one probe is the sum of squares of row `i` off the diagonal.
    Mean and spread are accumulated, so that memory does not grow with the number of probes.

    References
    ----------
    C. Bekas, E. Kokiopoulou, Y. Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57,
    2007. https://doi.org/10.1016/j.apnum.2007.01.003

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, hutchinson_diagonal
    >>> op = hessian_operator(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]))
    >>> hutchinson_diagonal(op, 2).value
    tensor([ 6., 12.])
    """
    where = "hutchinson_diagonal"
    check_real_operator(op, where, per_sample=True)
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)
    check_distribution(distribution, where)

    def samples(vectors: Tree) -> Tree:
        products = op.mm(vectors, chunk_size=None)
        if isinstance(op, PerSampleOperator):
            vectors = tree.map(lambda leaf: leaf.unsqueeze(1), vectors)
        return tree.map(torch.mul, products, vectors)

    def begin(seed: int, state: State | None) -> Moments:
        sampling = Sampling(op, seed, distribution, chunk_size, memory_budget, where)
        return Moments(sampling, samples, state)

    settings = settings_of(chunk_size, memory_budget, distribution)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def xdiag(
    op: LinearOperator,
    /,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    resume: Estimate | None = None,
    checkpoint: CheckpointLike = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Estimate:
    """Estimate the diagonal by XDiag: every probe in turn is left out of a sketch and estimates what that misses.

    Parameters
    ----------
    op
        A real, symmetric operator.
    num_matvecs
        How many products, an even number of them is made: half for the sketch, half for its basis. From the size of
        the space on, the exact diagonal is returned.
    rtol, atol, max_matvecs, resume, checkpoint, generator, chunk_size, memory_budget
        As for `hutchinson_trace`. Two and a half times `num_matvecs` vectors are kept.

    Returns
    -------
    Estimate
        Value and standard error are trees like `op.like`; unbiased.

    Raises
    ------
    TypeError, ValueError
        As for `hutchinson_trace`; also an operator that is not symmetric.

    Notes
    -----
    Exact for a matrix of rank below half of `num_matvecs`; pays where eigenvalues decay. No derivative is recorded.

    References
    ----------
    E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace estimation,
    SIAM Journal on Matrix Analysis and Applications 45(1), 2024. https://doi.org/10.1137/23M1548323

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, xdiag
    >>> ones = LinearOperator(lambda v: v.sum().expand(4), torch.zeros(4))
    >>> xdiag(ones, 4).value.round(decimals=4)
    tensor([1., 1., 1., 1.])
    """
    where = "xdiag"
    check_real_operator(op, where)
    check_symmetric(op, where, "Take hutchinson_diagonal, which needs no symmetry")
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)

    def begin(seed: int, state: State | None) -> Accumulated:
        return _XDiag(op, Sampling(op, seed, rademacher, chunk_size, memory_budget, where), state)

    settings = settings_of(chunk_size, memory_budget)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


class _XDiag(OfRange):
    def values(self, total: int) -> tuple[Tensor, Tensor, int]:
        Q, AQ, R = self.range.basis, self.range.products, self.range.triangle
        probes = self.range.sketch.probes()
        k = len(Q)
        span, _, lost = (t.to(Q) for t in left_out(R))
        Q, AQ = span @ Q, span @ AQ
        F, E = lost.T @ Q, lost.T @ AQ
        lengths = (lost * R).sum(0).unsqueeze(1)  # of (I - Q_i Q_i^T) A w_i, along direction i
        weighted = lengths * probes
        values = (Q * AQ).sum(0) - F * E + weighted * F
        step = max(1, _PAIRS_AT_ONCE // k**2)
        near = (lost.T @ lost).unsqueeze(2)
        some = [slice(start, start + step) for start in range(0, self.n, step)]
        parts = [_covariance(F[:, part], E[:, part], weighted[:, part], near) for part in some]
        return values, error_of_mean(values, torch.cat(parts)), 2 * k

    def whole(self) -> Tensor:
        sampling = self.sampling
        diagonal = exact_diagonal(
            self.op, chunk_size=sampling.chunk_size, memory_budget=sampling.memory_budget
        )
        return tree.ravel(diagonal)[0]

    def shaped(self, value: Tensor) -> Tree:
        return tree.ravel(self.op.like)[1](value)


_PAIRS_AT_ONCE = 2**22


def _covariance(F: Tensor, E: Tensor, weighted: Tensor, near: Tensor) -> Tensor:
    """Return the covariance of the values that two probes give, as `error_of_mean` takes it.

    Without probe `i` the basis has lost `F_i`, and for probe `j` that part of `F_j` which is orthogonal to it.
    """
    apart = (1 - near**2).clamp(min=torch.finfo(F.dtype).eps)
    f_i, e_i = F.unsqueeze(1), E.unsqueeze(1)
    f_j = F - near * f_i
    without = -f_i * e_i + f_j * (weighted - (E - near * e_i)) / apart
    differences = F * (weighted - E) - without  # (i, j, entries)
    return mean_over_pairs(differences)


def exact_diagonal(
    op: Operator,
    /,
    *,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Tree:
    """Return the diagonal, a tree like `op.like`, by one form or product for every entry, in chunks.

    Of a Gauss-Newton or Fisher operator with fewer outputs than parameters it takes one backward pass for every output.

    Parameters
    ----------
    op
        A real operator, symmetric or not; or a per-sample operator.
    chunk_size, memory_budget
        As for `hutchinson_trace`.

    Returns
    -------
    Tree
        Like `op.like`, of a per-sample operator with a leading axis of samples.

    Raises
    ------
    TypeError, ValueError
        The operator acts on complex vectors; `chunk_size` or `memory_budget` is below one.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_diagonal, hessian_operator
    >>> exact_diagonal(hessian_operator(lambda p: p["a"] ** 2 * p["b"], {"a": torch.ones(()), "b": torch.ones(())}))
    {'a': tensor(2.), 'b': tensor(0.)}
    """
    check_real_operator(op, "exact_diagonal", per_sample=True)
    chunks = op.chunks(chunk_size, memory_budget, "exact_diagonal")
    if op.rows is not None and op.rows.cheaper():
        found = op.rows.diagonals(memory_budget, summed=not op.batch_shape)
        return tree.flatten(op.like)[1](found)
    forms = exact_forms(op, chunk_size, memory_budget)
    if forms is not None:
        return _folded(op, forms)
    if isinstance(op, PerSampleOperator):
        parts = list(
            chunks.map(op.basis, lambda vectors, rows: op.quadratic_forms(vectors), op.shape[0])
        )
        sizes = [leaf.numel() for leaf in tree.flatten(op.like)[0]]
        return _folded(op, list(torch.cat(parts).split(sizes)))
    return _diagonal_of_products(op, chunk_size, memory_budget)


def _folded(op: Operator, entries: list[Tensor]) -> Tree:
    """Return the tree of the entries of every leaf, `(entries, ...)`; further axes are samples, and come first."""
    leaves, unflatten = tree.flatten(op.like)
    return unflatten(
        [
            found.movedim(0, -1).reshape(op.batch_shape + leaf.shape).to(leaf)
            for found, leaf in zip(entries, leaves, strict=True)
        ]
    )


def _diagonal_of_products(
    op: LinearOperator, chunk_size: ChunkSize, memory_budget: int | None
) -> Tree:
    """Return the diagonal by picking it out of the products with unit vectors."""

    def pieces(vectors: Tree, rows: slice) -> list[Tensor | None]:
        products, _ = tree.flatten(op.mm(vectors, chunk_size=None))
        found, offset = [], 0
        for product in products:
            entries = product.reshape(product.shape[0], product.shape[1:].numel())
            first, last = max(rows.start, offset), min(rows.stop, offset + entries.shape[1])
            own = slice(first - rows.start, last - rows.start), slice(first - offset, last - offset)
            # A copy: a view would keep all products of the chunk alive.
            found.append(entries[own].diagonal().clone() if first < last else None)
            offset += entries.shape[1]
        return found

    leaves, unflatten = tree.flatten(op.like)
    parts: list[list[Tensor]] = [[] for _ in leaves]
    chunks = op.chunks(chunk_size, memory_budget, "exact_diagonal")
    for found in chunks.map(op.basis, pieces, op.shape[0]):
        for part, piece in zip(parts, found, strict=True):
            if piece is not None:
                part.append(piece)
    return unflatten(
        [
            torch.cat(part).reshape(leaf.shape) if part else torch.zeros_like(leaf)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )
