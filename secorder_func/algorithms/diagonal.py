"""Diagonals of operators: estimated, and exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.group_sums import exact_forms
from secorder_func.algorithms.probes import Distribution, check_distribution, draw_seed, rademacher
from secorder_func.checks import check_count
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.typing import ChunkSize, Tree

__all__ = ["exact_diagonal", "hutchinson_diagonal"]


def hutchinson_diagonal(
    op: LinearOperator,
    num_matvecs: int,
    /,
    *,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
    distribution: Distribution = rademacher,
) -> Estimate:
    r"""Estimate the diagonal as the mean of `v * A v` over random probes.

    Parameters
    ----------
    op, num_matvecs, generator, chunk_size, memory_budget, distribution
        As for `hutchinson_trace`.

    Returns
    -------
    Estimate
        Value and standard error are trees like `op.like`; unbiased.

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
    check_count(num_matvecs, "hutchinson_diagonal", name="num_matvecs")
    check_distribution(distribution, "hutchinson_diagonal")
    check_real_operator(op, "hutchinson_diagonal")
    chunks = op.chunks(chunk_size, memory_budget, "hutchinson_diagonal")
    seed = draw_seed(generator)

    def probes(rows: slice) -> Tree:
        return distribution(seed, range(rows.start, rows.stop), op.like)

    def moments(vectors: Tree, rows: slice) -> tuple[int, Tree, Tree]:
        samples = tree.map(torch.mul, vectors, op.mm(vectors, chunk_size=None))
        spread = tree.map(lambda x: (x - x.mean(0)).square().sum(0), samples)
        return rows.stop - rows.start, tree.map(lambda x: x.mean(0), samples), spread

    done, mean, spread = 0, None, None  # spread: sum of squared deviations from the mean
    for count, chunk_mean, chunk_spread in chunks.map(probes, moments, num_matvecs):
        if mean is None:
            mean, spread = chunk_mean, chunk_spread
        else:  # Chan, Golub and LeVeque's pairwise update
            apart = tree.sub(chunk_mean, mean)
            mean = tree.axpy(count / (done + count), apart, mean)
            between = tree.scale(done * count / (done + count), tree.map(torch.square, apart))
            spread = tree.add(tree.add(spread, chunk_spread), between)
        done += count
    error = _standard_error(spread, num_matvecs)
    return Estimate(mean, error, num_matvecs, chunks.largest, num_matvecs - 1)


def _standard_error(spread: Tree, count: int) -> Tree:
    if count == 1:
        return tree.map(lambda leaf: torch.full_like(leaf, math.inf), spread)
    return tree.map(lambda leaf: leaf.detach().sqrt() / math.sqrt(count * (count - 1)), spread)


def exact_diagonal(
    op: LinearOperator,
    /,
    *,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Tree:
    """Return the diagonal, a tree like `op.like`, by one form or product for every entry, in chunks.

    `chunk_size` and `memory_budget` as for `hutchinson_trace`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_diagonal, hessian_operator
    >>> exact_diagonal(hessian_operator(lambda p: p["a"] ** 2 * p["b"], {"a": torch.ones(()), "b": torch.ones(())}))
    {'a': tensor(2.), 'b': tensor(0.)}
    """
    check_real_operator(op, "exact_diagonal")
    chunks = op.chunks(chunk_size, memory_budget, "exact_diagonal")
    forms = exact_forms(op, chunk_size, memory_budget)
    if forms is not None:
        return forms

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
