"""The Frobenius norm of an operator and the norms of its rows, squared, estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.checkpoint import CheckpointLike
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import GroupSums, Sampling, settings_of
from secorder_func.algorithms.moments import Moments
from secorder_func.algorithms.probes import Distribution, check_distribution, rademacher
from secorder_func.algorithms.stopping import Target, estimated
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.typing import ChunkSize, Tree

__all__ = ["hutchinson_squared_frobenius_norm", "hutchinson_squared_row_norms"]


def hutchinson_squared_frobenius_norm(
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
    distribution: Distribution = rademacher,
) -> Estimate:
    """Estimate the sum of the squares of all entries as the mean of `|A v|²` over random probes.

    It is the trace of `A^T A`, and the sum of the squared eigenvalues of a symmetric matrix. `.sqrt()` of the result is
    the Frobenius norm with its error. Parameters, result and errors are those of `hutchinson_trace`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, hutchinson_squared_frobenius_norm
    >>> op = LinearOperator(lambda v: torch.tensor([3.0, 4.0]) * v, torch.zeros(2))
    >>> print(hutchinson_squared_frobenius_norm(op, 4).sqrt())
    5 ± 0 (4 products)
    """
    where = "hutchinson_squared_frobenius_norm"
    check_real_operator(op, where)
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)
    check_distribution(distribution, where)

    def squares(vectors: Tree) -> Tensor:
        products = op.mm(vectors, chunk_size=None)
        return tree.batched_dot(products, products)

    def begin(seed: int, state: State | None) -> GroupSums:
        sampling = Sampling(op, seed, distribution, chunk_size, memory_budget, where)
        return GroupSums(sampling, squares, None, state)

    settings = settings_of(chunk_size, memory_budget, distribution)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def hutchinson_squared_row_norms(
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
    distribution: Distribution = rademacher,
) -> Estimate:
    """Estimate the squared Euclidean norm of every row as the mean of `(A v)²` over random probes.

    It is the diagonal of `A A^T`, a tree like `op.like`. Parameters, result and errors are those of
    `hutchinson_diagonal`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, hutchinson_squared_row_norms
    >>> op = LinearOperator(lambda v: torch.tensor([3.0, 4.0]) * v, torch.zeros(2))
    >>> hutchinson_squared_row_norms(op, 4).value
    tensor([ 9., 16.])
    """
    where = "hutchinson_squared_row_norms"
    check_real_operator(op, where)
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)
    check_distribution(distribution, where)

    def squares(vectors: Tree) -> Tree:
        return tree.map(torch.square, op.mm(vectors, chunk_size=None))

    def begin(seed: int, state: State | None) -> Moments:
        sampling = Sampling(op, seed, distribution, chunk_size, memory_budget, where)
        return Moments(sampling, squares, state)

    settings = settings_of(chunk_size, memory_budget, distribution)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)
