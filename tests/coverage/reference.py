"""The truth about one product of one problem, by plain autograd and by differences of its gradients.

Double backward, with attention on the math kernel, is exact where torch's formulas are right. Central differences know
nothing of these formulas but have an error of their own, which the spread over several steps shows. Where the
differences have converged they decide; at kinks and where numbers are rounded they have not, and double backward does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.coverage.problems import Problem

SEED = 3
STEPS = (1e-4, 1e-5, 1e-6)
CONVERGED = 1e-6
"""Relative change from one step to the next below which differences count as converged."""
EXACT, SINGLE, DIFFERENCE, SECOND_DIFFERENCE = 1e-8, 1e-5, 1e-5, 1e-4
"""How far a right answer may be from double backward (with a float32 number among the parameters, too), and from
converged differences of gradients and of values."""


@dataclass(frozen=True)
class Truth:
    """`value` is the product, `tolerance` how far an answer may be from it; without a value `why` says what failed."""

    value: Tensor | None
    tolerance: float = EXACT
    double_backward: Tensor | None = None
    why: str = ""

    def accepts(self, answer: Any) -> bool:
        """Say whether a tree of products is right."""
        assert self.value is not None
        return distance(flat(answer), self.value) <= self.tolerance

    @property
    def double_backward_is_right(self) -> bool:
        """Whether plain autograd answers at all, and rightly."""
        return self.double_backward is not None and self.accepts(self.double_backward)


def flat(tree: Any) -> Tensor:
    """Return all entries as one float64 vector, complex ones as two, sparse ones dense."""
    parts = []
    for leaf in optree.tree_leaves(tree):
        leaf = leaf.detach()
        leaf = leaf.to_dense() if leaf.layout != torch.strided else leaf
        leaf = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        parts.append(leaf.reshape(-1).to(torch.float64))
    return torch.cat(parts)


def distance(answer: Tensor, truth: Tensor) -> float:
    """Return the relative distance; NaN and infinities must stand in the same places."""
    if answer.shape != truth.shape:
        return float("inf")
    same = (answer == truth) | (answer.isnan() & truth.isnan())
    gap = torch.where(same, torch.zeros_like(truth), answer - truth).norm()
    size = torch.where(truth.isfinite(), truth, torch.zeros_like(truth)).norm()
    ratio = float(gap / size) if float(size) > 1e-9 else float(gap)
    return float("inf") if ratio != ratio else ratio


def direction(problem: Problem, seed: int) -> Any:
    """Return a random vector of the space of a problem's parameters."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(
        lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator),
        problem.params,
    )


NO_DIFFERENCES = {
    **dict.fromkeys(("bfloat16", "half", "float", "chalf", "cfloat"), "rounds what is moved"),
    "as_strided.partial_views": "reads memory that does not belong to its argument",
    "nn.functional.gumbel_softmax": "straight through: holds constant by detach what a difference moves",
}
"""Operators of which no difference can be taken, and why."""

WRONG_GRADIENT = {
    "as_strided_scatter": "torch's gradient in the input is not zero where it is overwritten",
}
"""Operators whose gradient in torch is not that of their value, which alone tells the truth."""


def truth_of(problem: Problem, v: Any) -> Truth:
    """Return the product of a problem's Hessian with `v`."""
    exact, why = _attempt(lambda: _double_backward(problem, v))
    double = all(leaf.dtype.itemsize >= 8 for leaf in optree.tree_leaves(problem.params))
    tolerance = EXACT if double else SINGLE
    if problem.subject in NO_DIFFERENCES:
        return Truth(exact, tolerance, exact, why)
    if problem.subject in WRONG_GRADIENT:
        value, why = _attempt(lambda: _second_difference(problem, v))
        return Truth(value, SECOND_DIFFERENCE, exact, why)
    rows, why_not = _attempt(lambda: [_difference(problem, v, step) for step in STEPS])
    if rows is None:
        return Truth(exact, tolerance, exact, why or why_not)
    gaps = [distance(a, b) for a, b in zip(rows[1:], rows, strict=False)]
    best = gaps.index(min(gaps))
    near = exact is not None and distance(exact, rows[best]) <= DIFFERENCE
    if gaps[best] <= CONVERGED and not near:
        return Truth(rows[best], DIFFERENCE, exact)
    # What a difference of the smallest step carries of the gradient's own rounding; an answer has as much.
    rounding = 10 * gaps[-1] * STEPS[-1]
    return Truth(exact, max(tolerance, min(rounding, 1e-6 if double else 1e-3)), exact, why)


def _attempt(compute: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return compute(), ""
    except Exception as error:  # whatever torch says
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _gradient(problem: Problem, at: list[Tensor], spec: Any, **options: Any) -> list[Tensor | None]:
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        loss = problem.f(spec.unflatten(at))
        return list(torch.autograd.grad(loss, at, allow_unused=True, **options))


def _double_backward(problem: Problem, v: Any) -> Tensor:
    leaves, spec = optree.tree_flatten(problem.params)
    at = [leaf.detach().requires_grad_() for leaf in leaves]
    gradient = _gradient(problem, at, spec, create_graph=True)
    pairs = [
        (g, d)
        for g, d in zip(gradient, optree.tree_leaves(v), strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:
        return flat([torch.zeros_like(leaf) for leaf in at])
    outputs, cotangents = zip(*pairs, strict=True)
    product = torch.autograd.grad(outputs, at, cotangents, allow_unused=True)
    return flat([torch.zeros_like(p) if h is None else h for h, p in zip(product, at, strict=True)])


def _difference(problem: Problem, v: Any, step: float) -> Tensor:
    """Move what has a gradient: the other tensors may be targets, which are compared with and not computed with."""
    leaves, spec = optree.tree_flatten(problem.params)
    at = [leaf.detach().requires_grad_() for leaf in leaves]
    smooth = [g is not None for g in _gradient(problem, at, spec)]

    def end(signed: float) -> list[Tensor]:
        moved = [
            (leaf.detach() + signed * d if moves else leaf.detach()).requires_grad_()
            for leaf, d, moves in zip(leaves, optree.tree_leaves(v), smooth, strict=True)
        ]
        found = _gradient(problem, moved, spec)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, moved, strict=True)]

    return (flat(end(step)) - flat(end(-step))) / (2 * step)


def _second_difference(problem: Problem, v: Any) -> Tensor:
    """Return mixed second differences of the loss along `v` and every entry."""
    step = 1e-3
    start, unravel = _raveled(problem.params)
    along = flat(v)

    def value(point: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        with torch.no_grad():
            return problem.f(unravel(point))

    entries = []
    for unit in torch.eye(start.numel(), dtype=start.dtype):
        ends = [
            value(start + step * (along + unit)) - value(start + step * (along - unit)),
            value(start - step * (along - unit)) - value(start - step * (along + unit)),
        ]
        entries.append((ends[0] - ends[1]) / (4 * step * step))
    return torch.stack(entries)


def _raveled(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    leaves, spec = optree.tree_flatten(tree)
    sizes = [leaf.numel() for leaf in leaves]

    def unravel(point: Tensor) -> Any:
        pieces = point.split(sizes)
        return spec.unflatten([p.reshape(q.shape) for p, q in zip(pieces, leaves, strict=True)])

    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves]), unravel
