"""Trace and largest eigenvalue of every layer's block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.eigsh import Which, eigsh
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import GroupSums, Sampling, settings_of
from secorder_func.algorithms.probes import rademacher
from secorder_func.algorithms.stopping import Target, estimated
from secorder_func.errors import ArgumentError, message
from secorder_func.operators import LinearOperator
from secorder_func.operators.blocks import Selection, groups_of
from secorder_func.operators.linear_operator import check_real_operator
from secorder_func.typing import ChunkSize, Tree

__all__ = ["LayerCurvature", "layer_curvature"]


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """A table of the diagonal blocks of groups of leaves; prints as one.

    Attributes
    ----------
    names
        Of the groups.
    num_parameters
        How many entries each has.
    traces
        An `Estimate` of `(groups,)`: the traces of the blocks. Divided by `num_parameters` they are the mean of the
        diagonal.
    eigenvalues, residual_norms
        `(groups,)`, of the outermost eigenpair of each block; None if they were not asked for.
    converged
        Whether all of these residuals are within the tolerance of `eigsh`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, layer_curvature
    >>> params = {"first.weight": torch.ones(2), "second.weight": torch.ones(1)}
    >>> f = lambda p: p["first.weight"].square().sum() + p["second.weight"].pow(3).sum()
    >>> print(layer_curvature(hessian_operator(f, params), 8))
    group   parameters  trace  ±  mean diagonal  eigenvalue
    first            2      4  0              2           2
    second           1      6  0              6           6
    """

    names: tuple[str, ...]
    num_parameters: tuple[int, ...]
    traces: Estimate
    eigenvalues: Tensor | None
    residual_norms: Tensor | None
    converged: bool = True

    def __str__(self) -> str:
        head = ["group", "parameters", "trace", "±", "mean diagonal"]
        rows = [
            [name, f"{size}", f"{value:.4g}", f"{error:.2g}", f"{value / max(1, size):.3g}"]
            for name, size, value, error in zip(
                self.names,
                self.num_parameters,
                self.traces.value.tolist(),
                self.traces.standard_error.tolist(),
                strict=True,
            )
        ]
        if self.eigenvalues is not None:
            head.append("eigenvalue")
            for row, value in zip(rows, self.eigenvalues.tolist(), strict=True):
                row.append(f"{value:.4g}")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        return "\n".join(lines)


def layer_curvature(
    op: LinearOperator,
    /,
    num_matvecs: int | None = None,
    *,
    groups: Mapping[str, Selection] | None = None,
    which: Which | None = "LM",
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> LayerCurvature:
    """Return trace and outermost eigenvalue of the diagonal block of every layer.

    Parameters
    ----------
    op
        A real symmetric operator.
    num_matvecs, rtol, atol, max_matvecs, generator, chunk_size, memory_budget
        As for `hutchinson_trace`. All traces come from the same products.
    groups
        Selections of leaves by name, as for `LinearOperator.block`; without them the leaves of each module are a group.
    which
        Which eigenvalue of each block, as for `eigsh`; None for none of them.

    Returns
    -------
    LayerCurvature
        Traces with standard errors, eigenvalues with residuals.

    Raises
    ------
    TypeError, ValueError
        As for `hutchinson_trace`, `eigsh` and `LinearOperator.block`.

    Notes
    -----
    The trace of a block is the mean of `v_b . (A v)_b`, unbiased whatever is between the blocks, which adds to its
    error.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, layer_curvature
    >>> f = lambda p: (p["first.w"] ** 2).sum() + 2 * (p["second.w"] ** 2).sum()
    >>> op = hessian_operator(f, {"first.w": torch.ones(3), "second.w": torch.ones(2)})
    >>> print(layer_curvature(op, 4))
    group   parameters  trace  ±  mean diagonal  eigenvalue
    first            3      6  0              2           2
    second           2      8  0              4           4
    """
    where = "layer_curvature"
    check_real_operator(op, where)
    chosen = groups_of(op.like, groups, where)
    if which is not None and which not in get_args(Which):
        known = ", ".join(repr(name) for name in get_args(Which))
        raise ArgumentError(message(where, f"which must be one of {known} or None, got {which!r}"))
    work = torch.promote_types(op.dtype, torch.float32)
    target = Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)

    def parts(vectors: Tree) -> Tensor:
        products = tree.flatten(op.mm(vectors, chunk_size=None))[0]
        forms = [
            (v.to(work) * av.to(work)).reshape(len(v), v.shape[1:].numel()).sum(1).to(op.device)
            for v, av in zip(tree.flatten(vectors)[0], products, strict=True)
        ]
        sums = [torch.stack([forms[i] for i in rows]).sum(0) for rows in chosen.values()]
        return torch.stack(sums, 1)

    def begin(seed: int, state: State | None) -> GroupSums:
        sampling = Sampling(op, seed, rademacher, chunk_size, memory_budget, where)
        return GroupSums(sampling, parts, None, state)

    settings = settings_of(chunk_size, memory_budget)
    traces = estimated(op, target, None, generator, begin, where, None, settings)
    leaves, names = tree.flatten(op.like)[0], tree.names(op.like)
    values = residuals = None
    converged = True
    if which is not None:
        found = [
            eigsh(op.block([names[i] for i in rows]), 1, which=which, generator=generator)
            for rows in chosen.values()
        ]
        values = torch.cat([pair.eigenvalues.to(op.dtype) for pair in found])
        residuals = torch.cat([pair.residual_norms.to(op.dtype) for pair in found])
        converged = all(pair.converged for pair in found)
    sizes = tuple(sum(leaves[i].numel() for i in rows) for rows in chosen.values())
    return LayerCurvature(tuple(chosen), sizes, traces, values, residuals, converged)
