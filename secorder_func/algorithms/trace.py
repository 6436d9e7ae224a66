"""Traces of operators: estimated by Hutchinson's method, and exact."""

from __future__ import annotations

import math

import torch

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.group_sums import exact_forms, group_sums, mean_and_error
from secorder_func.algorithms.probes import Distribution, check_distribution, draw_seed, rademacher
from secorder_func.checks import check_count
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.typing import ChunkSize, Tree

__all__ = ["exact_trace", "hutchinson_trace"]


def hutchinson_trace(
    op: LinearOperator,
    num_matvecs: int,
    /,
    *,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
    distribution: Distribution = rademacher,
) -> Estimate:
    r"""Estimate the trace as the mean of `v . A v` over random probes.

    The forms of a Hessian or Gauss-Newton operator come by forward propagation through the loss, without products,
    where it has rules for every function; `by_propagation` of the result says so.

    Parameters
    ----------
    op
        A real operator, symmetric or not.
    num_matvecs
        How many probes, one product each.
    generator
        Its next value seeds the probes; torch's global generator if None. Equal seeds give equal numbers up to
        rounding, whatever the chunk.
    chunk_size, memory_budget
        How many probes to take at once: for products as for `LinearOperator.mm`; for a propagation as many as keep the
        largest term that a function makes within 16 MiB on a CPU, 256 MiB elsewhere, counted in the first chunk, or
        what of all this fits `memory_budget`. Memory grows with the chunk only.
    distribution
        One of `rademacher`, `normal`, `sphere`, `sparse_rademacher(density)`, or your own.

    Returns
    -------
    Estimate
        Value and standard error are 0-dim tensors; unbiased. `chunk_size` is what was taken. By propagation forms are
        summed over groups of probes, at least eight of them from 16 probes on, whose spread gives the standard error;
        `Estimate.interval` takes Student's t with as many degrees of freedom.

    Raises
    ------
    ValueError
        `num_matvecs`, `chunk_size` or `memory_budget` is below one.
    TypeError
        The operator acts on complex vectors.

    Notes
    -----
    With Rademacher probes the variance of one probe is twice the sum of squares off the diagonal of the symmetric part:
    a diagonal matrix is traced exactly by one probe.

    References
    ----------
    M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines,
    Communications in Statistics 19(2), 1990. https://doi.org/10.1080/03610919008812866

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, hutchinson_trace
    >>> op = hessian_operator(lambda p: (p**2).sum(), torch.zeros(5))
    >>> print(hutchinson_trace(op, 4, generator=torch.Generator().manual_seed(0)))
    10 ± 0 (4 propagated forms)
    """
    check_count(num_matvecs, "hutchinson_trace", name="num_matvecs")
    check_distribution(distribution, "hutchinson_trace")
    check_real_operator(op, "hutchinson_trace")
    chunks = op.chunks(chunk_size, memory_budget, "hutchinson_trace")
    seed = draw_seed(generator)
    found = group_sums(op, num_matvecs, seed, distribution, chunk_size, memory_budget)
    if found is not None:
        mean, error = mean_and_error(found.sums, found.sizes)
        return Estimate(
            mean, error, num_matvecs, found.largest, len(found.sizes) - 1, by_propagation=True
        )

    def probes(rows: slice) -> Tree:
        return distribution(seed, range(rows.start, rows.stop), op.like)

    def forms_of(vectors: Tree, rows: slice) -> torch.Tensor:
        return op.quadratic_forms(vectors)

    forms = torch.cat(list(chunks.map(probes, forms_of, num_matvecs)))
    error = forms.new_tensor(math.inf)
    if num_matvecs > 1:
        error = forms.detach().std() / math.sqrt(num_matvecs)
    return Estimate(forms.mean(), error, num_matvecs, chunks.largest, num_matvecs - 1)


def exact_trace(
    op: LinearOperator,
    /,
    *,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    """Return the trace by one form or product for every entry of the space, in chunks.

    `chunk_size` and `memory_budget` as for `hutchinson_trace`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_trace, hessian_operator
    >>> exact_trace(hessian_operator(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0])))
    tensor(18.)
    """
    check_real_operator(op, "exact_trace")
    chunks = op.chunks(chunk_size, memory_budget, "exact_trace")
    forms = exact_forms(op, chunk_size, memory_budget)
    if forms is not None:
        leaves = tree.flatten(forms)[0]
        return torch.stack([leaf.sum().to(op.device, op.dtype) for leaf in leaves]).sum()

    def entries(vectors: Tree, rows: slice) -> torch.Tensor:
        return op.quadratic_forms(vectors).sum()

    parts = list(chunks.map(op.basis, entries, op.shape[0]))
    if not parts:
        return torch.zeros((), dtype=op.dtype, device=op.device)
    return torch.stack(parts).sum()
