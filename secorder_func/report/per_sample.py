"""Curvature of the loss of each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import (
    Estimate,
    LinearOperator,
    PerSampleOperator,
    exact_trace,
    hutchinson_trace,
    tree,
)
from secorder_func.report.problem import Problem, relative_difference, watched

__all__ = [
    "Ranking",
    "SampleTraces",
    "exact_sample_traces",
    "rank",
    "ranked",
    "sample_traces",
    "trace_by_double_backward",
]


@dataclass(frozen=True, eq=False)
class SampleTraces:
    """Estimates of the trace of the Hessian of every sample's loss.

    Attributes
    ----------
    estimate
        Value and standard error are `(num_samples,)`, from the same probes for all samples.
    mismatch
        Relative difference of the mean over samples to the estimate from products with the Hessian of the mean loss
        and these probes; equal but for rounding.
    """

    estimate: Estimate
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
    """Estimate every sample's trace by Hutchinson's method; `advance` is told the products of the comparison."""

    def traced(op: LinearOperator | PerSampleOperator) -> Estimate:
        return hutchinson_trace(op, num_probes, generator=torch.Generator().manual_seed(seed))

    estimate, together = (
        traced(problem.sample_hessians()),
        traced(watched(problem.hessian(), advance)),
    )
    return SampleTraces(estimate, relative_difference(estimate.value.mean(), together.value))


def exact_sample_traces(problem: Problem, rows: Tensor) -> Tensor:
    """Return the exact traces of the chosen samples."""
    chosen = replace(problem, inputs=problem.inputs[rows], targets=problem.targets[rows])
    return exact_trace(chosen.sample_hessians())


def rank(problem: Problem, estimates: Tensor, *, num_shown: int) -> Ranking:
    """Rank samples by exact traces, computed for the twice `num_shown` that stand out at either end."""
    return ranked(partial(exact_sample_traces, problem), estimates, num_shown=num_shown)


def ranked(again: Callable[[Tensor], Tensor], estimates: Tensor, *, num_shown: int) -> Ranking:
    """Rank samples by `again(rows)`, their traces measured better, for the twice `num_shown` that stand out."""
    order = estimates.argsort(descending=True, stable=True)
    high, low = order[: 2 * num_shown], order[-2 * num_shown :]
    traces = again(torch.cat([high, low]))
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
