"""Traces of operators: estimated by Hutchinson's method, and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func.algorithms.checkpoint import CheckpointLike
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import (
    GroupSums,
    Operator,
    Sampling,
    exact_forms,
    settings_of,
)
from secorder_func.algorithms.probes import Distribution, check_distribution, rademacher
from secorder_func.algorithms.stopping import Target, estimated
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.typing import ChunkSize, Tree

__all__ = ["exact_trace", "hutchinson_trace"]


def hutchinson_trace(
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
    r"""Estimate the trace as the mean of `v . A v` over random probes.

    The forms of a Hessian or Gauss-Newton operator come by forward propagation through the loss, without products,
    where it has rules for every function; `by_propagation` of the result says so.

    Parameters
    ----------
    op
        A real operator, symmetric or not; a per-sample operator gives a trace a sample.
    num_matvecs
        How many probes, one product each.
    rtol, atol
        Instead of a count: probes are added until the 95 % interval reaches no further than `rtol` times the estimate,
        or `atol`, on either side (of several values, in the Euclidean norm). The error is looked at after 16 products
        and then seldom, each time with a smaller risk, so that the interval at which it stops holds with 95 %, however
        often it was looked at.
    max_matvecs
        Where to stop all the same, with a `ConvergenceWarning`; the number of entries of the space if None.
    resume
        An earlier estimate of the same operator by this function, to be continued: `num_matvecs` counts from the
        beginning, and the numbers are those of one run. Its seed is used, not the generator. No derivative is recorded.
    checkpoint
        A file in which it is kept while it runs, and from which it goes on if it was interrupted; see `Checkpoint`.
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
        Value and standard error are 0-dim tensors, or `(samples,)`; unbiased. `chunk_size` is what was taken. By
        propagation forms are summed over groups of probes, at least eight of them from 16 probes on, whose spread gives
        the standard error; `Estimate.interval` takes Student's t with as many degrees of freedom.

    Raises
    ------
    ValueError
        A count, `chunk_size` or `memory_budget` is below one; `resume` was made with other probes.
    TypeError
        The operator acts on complex vectors; neither a count nor a tolerance was given.

    Warns
    -----
    ConvergenceWarning
        `max_matvecs` were spent before the tolerance was met.

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
    where = "hutchinson_trace"
    check_real_operator(op, where, per_sample=True)
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)
    check_distribution(distribution, where)

    def begin(seed: int, state: State | None) -> GroupSums:
        sampling = Sampling(op, seed, distribution, chunk_size, memory_budget, where)
        return GroupSums(sampling, op.quadratic_forms, op.forms, state)

    settings = settings_of(chunk_size, memory_budget, distribution)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def exact_trace(
    op: Operator,
    /,
    *,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Return the trace by one form or product for every entry of the space, in chunks.

    Of a Gauss-Newton or Fisher operator with fewer outputs than parameters it takes one backward pass for every output.

    Parameters
    ----------
    op
        A real operator, symmetric or not; or a per-sample operator.
    chunk_size, memory_budget
        As for `hutchinson_trace`.

    Returns
    -------
    Tensor
        Of shape `()`, of a per-sample operator `(samples,)`.

    Raises
    ------
    TypeError, ValueError
        The operator acts on complex vectors; `chunk_size` or `memory_budget` is below one.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_trace, hessian_operator
    >>> exact_trace(hessian_operator(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0])))
    tensor(18.)
    """
    check_real_operator(op, "exact_trace", per_sample=True)
    chunks = op.chunks(chunk_size, memory_budget, "exact_trace")
    if op.rows is not None and op.rows.cheaper():
        traces = op.rows.traces(memory_budget)
        return (traces if op.batch_shape else traces.sum()).to(op.dtype)
    forms = exact_forms(op, chunk_size, memory_budget)
    if forms is not None:
        return torch.stack([leaf.sum(0).to(op.device, op.dtype) for leaf in forms]).sum(0)

    def entries(vectors: Tree, rows: slice) -> Tensor:
        return op.quadratic_forms(vectors).sum(0)

    parts = list(chunks.map(op.basis, entries, op.shape[0]))
    if not parts:
        return torch.zeros(op.batch_shape, dtype=op.dtype, device=op.device)
    return torch.stack(parts).sum(0)
