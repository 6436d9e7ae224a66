"""Curvature of the loss of each sample: `vmap` of a Hessian-vector product over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import hvp, probes, tree
from secorder_func.report.problem import Params, Problem, relative_difference
from secorder_func.typing import Tree

__all__ = [
    "Ranking",
    "SampleTraces",
    "exact_sample_traces",
    "rank",
    "sample_traces",
    "trace_by_double_backward",
]

SAMPLES_AT_ONCE = 128
PROBES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class SampleTraces:
    """Estimates of the trace of the Hessian of every sample's loss.

    Attributes
    ----------
    values, standard_errors
        `(num_samples,)`.
    num_probes
        The same probes for all samples.
    mismatch
        Relative difference of the mean over samples to the estimate for the Hessian of the mean loss from these
        probes; equal but for rounding.
    """

    values: Tensor
    standard_errors: Tensor
    num_probes: int
    mismatch: float


@dataclass(frozen=True, eq=False)
class Ranking:
    """The samples with the largest and with the smallest exact trace, among those whose estimates stand out.

    Attributes
    ----------
    most, least
        Indices of samples, the most and the least curved first.
    most_traces, least_traces
        Their exact traces.
    """

    most: Tensor
    most_traces: Tensor
    least: Tensor
    least_traces: Tensor


def sample_traces(
    problem: Problem,
    *,
    num_probes: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> SampleTraces:
    """Estimate every sample's trace by Hutchinson's method; `advance` is told how many forms are done."""
    vectors = probes.rademacher(seed, range(num_probes), problem.params)
    forms = _forms(problem, vectors, problem.inputs, problem.targets, advance)
    together = problem.hessian().quadratic_forms(vectors)
    return SampleTraces(
        values=forms.mean(0),
        standard_errors=forms.std(0) / num_probes**0.5,
        num_probes=num_probes,
        mismatch=relative_difference(forms.mean(1), together),
    )


def exact_sample_traces(
    problem: Problem, rows: Tensor, *, advance: Callable[[int], None] = lambda count: None
) -> Tensor:
    """Return the exact traces of the chosen samples, one product for every parameter and sample."""
    size, step = tree.numel(problem.params), PROBES_AT_ONCE
    inputs, targets = problem.inputs[rows], problem.targets[rows]
    traces = torch.zeros(len(rows), dtype=inputs.dtype)
    for start in range(0, size, step):
        vectors = tree.basis(problem.params, start, min(start + step, size))
        traces += _forms(problem, vectors, inputs, targets, advance).sum(0)
    return traces


def _forms(
    problem: Problem,
    vectors: Tree,
    inputs: Tensor,
    targets: Tensor,
    advance: Callable[[int], None],
) -> Tensor:
    """Return `v . H_i v` for every stacked vector and every sample, `(num_vectors, num_samples)`."""
    product = hvp(problem.loss)

    def form(params: Params, v: Params, x: Tensor, y: Tensor) -> Tensor:
        return tree.dot(v, product(params, v, x, y))

    over_samples = vmap(form, in_dims=(None, None, 0, 0))
    over_both: Callable[..., Tensor] = vmap(over_samples, in_dims=(None, 0, None, None))
    leaves, unflatten = tree.flatten(vectors)
    # Vectors and samples are both cut: the products of a piece are alive together.
    pieces = [unflatten(piece) for piece in _pieces(leaves, PROBES_AT_ONCE)]
    rows = []
    for piece in pieces:
        row = []
        for x, y in _pieces([inputs, targets], SAMPLES_AT_ONCE):
            row.append(over_both(problem.params, piece, x, y))
            advance(row[-1].numel())
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def _pieces(tensors: list[Any], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def rank(
    problem: Problem,
    estimates: Tensor,
    *,
    num_shown: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Ranking:
    """Rank samples by exact traces, computed for the twice `num_shown` that stand out at either end."""
    order = estimates.argsort(descending=True)
    high, low = order[: 2 * num_shown], order[-2 * num_shown :]
    traces = exact_sample_traces(problem, torch.cat([high, low]), advance=advance)
    high_traces, low_traces = traces[: len(high)], traces[len(high) :]
    most = high_traces.argsort(descending=True)[:num_shown]
    least = low_traces.argsort()[:num_shown]
    return Ranking(high[most], high_traces[most], low[least], low_traces[least])


def trace_by_double_backward(problem: Problem, row: int) -> float:
    """Return the exact trace for one sample by `torch.autograd.functional.hessian`, without this library's products."""
    flat, unravel = tree.ravel(problem.params)
    x, y = problem.inputs[row], problem.targets[row]
    dense: Any = torch.autograd.functional.hessian(lambda p: problem.loss(unravel(p), x, y), flat)
    return float(dense.trace())
