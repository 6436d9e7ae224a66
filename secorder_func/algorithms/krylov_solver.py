"""What Krylov solvers have in common: tolerances of the true residual, restarts, gradients, warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secorder_func import running
from secorder_func.algorithms.implicit import implicit_solution
from secorder_func.algorithms.iteration import Direction, End, Iteration, run
from secorder_func.algorithms.linear_system import LinearSystem, lengths
from secorder_func.algorithms.solution import Solution
from secorder_func.checks import check_count, check_tolerance
from secorder_func.errors import ArgumentError, ConvergenceWarning, message, warn_user
from secorder_func.operators import LinearOperator
from secorder_func.operators.outside import (
    differentiated_outside,
    refuse_forward_mode,
    refuse_vmap_and_jvp,
)
from secorder_func.typing import Tree

__all__ = ["solve"]

_MOST = 10_000


def solve(
    iteration: type[Iteration],
    op: LinearOperator,
    b: Tree,
    *,
    rtol: float,
    atol: float,
    max_matvecs: int | None,
    preconditioner: LinearOperator | None,
    x0: Tree | None,
    where: str,
) -> Solution:
    """Solve with one kind of iteration; arguments as for `cg`."""
    system = LinearSystem(op, preconditioner, where)
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        check_tolerance(tolerance, where, name=name)
    if max_matvecs is not None:
        check_count(max_matvecs, where, name="max_matvecs")
    rows, batched = system.rows(b, "b")
    start = None if x0 is None else system.rows(x0, "x0", batched=batched)[0].detach()
    if start is not None and len(start) != len(rows):
        problem = f"x0 must be of as many vectors as b, {len(rows)}, got {len(start)}"
        raise ArgumentError(message(where, problem))
    most = max(1, min(20 * rows.shape[1], _MOST)) if max_matvecs is None else max_matvecs
    solver = _Solver(iteration, system, most)
    found = solver.solve(rows, start, [float(rtol)] * len(rows), float(atol))
    return _solution(found, system, batched)


_BACKWARD = 1e-6
"""The relative tolerance of the solve behind a gradient at most."""


@dataclass
class _Found:
    """Solutions as rows, and what became of each."""

    x: Tensor
    residual_norms: list[float]
    goals: list[float]
    ends: list[End]
    directions: dict[int, Direction] = field(default_factory=dict)
    num_matvecs: int = 0


class _Solver:
    """One kind of iteration on one system, with at most so many products for a right-hand side."""

    def __init__(self, iteration: type[Iteration], system: LinearSystem, most: int) -> None:
        self.iteration, self.system, self.most = iteration, system, most

    def solve(self, b: Tensor, start: Tensor | None, rtol: Sequence[float], atol: float) -> _Found:
        """Solve for the rows of `b`; solutions are differentiable in whatever they depend on."""
        system, before = self.system, self.system.num_matvecs
        refuse_vmap_and_jvp(system.where)
        refuse_forward_mode(system.where, b)
        with running.task(system.where, None, "steps", together=system.op.ranks is not None):
            found = self._refined(b.detach(), start, rtol, atol)
        self._warn(found)
        if differentiated_outside(b) or (torch.is_grad_enabled() and system.differentiated):
            # An absolute tolerance means nothing to the scale of a gradient, nor does a loose one.
            relative = [min(r, _BACKWARD) if r else _BACKWARD for r in rtol]
            with running.unwatched() if End.CANCELLED in found.ends else nullcontext():
                rest = b - system.recorded_product(found.x)
            found.x = implicit_solution(
                found.x, rest, lambda grad: self.solve(grad, None, relative, 0.0).x
            )
        found.num_matvecs = system.num_matvecs - before
        return found

    def _refined(
        self, b: Tensor, start: Tensor | None, rtol: Sequence[float], atol: float
    ) -> _Found:
        """Iterate on what is left of `b` until that is small enough, or does not become smaller."""
        x = torch.zeros_like(b) if start is None else start.clone()
        r, spent = (b, 0) if start is None else (b - self._product(x), 1)
        whole, left = torch.stack([lengths(b), lengths(r)]).tolist()
        if not all(map(math.isfinite, whole)):
            raise ArgumentError(message(self.system.where, "b has NaN or infinite entries"))
        self._require_finite(left)
        for row, size in enumerate(whole):
            if not size:
                x[row], left[row] = 0.0, 0.0
        goals = [max(rel * size, atol) for rel, size in zip(rtol, whole, strict=True)]
        found = _Found(x, left, goals, [End.CONVERGED] * len(b))
        pending = [row for row in range(len(b)) if left[row] > goals[row]]
        r = r[pending]
        while pending:
            steps = self.most - spent - 1
            if steps < 1:
                for row in pending:
                    found.ends[row] = End.SPENT
                break
            r, taken, pending = self._cycle(b, r, found, pending, steps)
            spent += taken + 1
        return found

    def _cycle(
        self, b: Tensor, r: Tensor, found: _Found, pending: list[int], steps: int
    ) -> tuple[Tensor, int, list[int]]:
        """Run the iteration on residuals; return the true residuals of what is to be run again, and which that is."""
        x, left = found.x, found.residual_norms
        size = r.new_tensor([left[row] for row in pending])
        goal = r.new_tensor([found.goals[row] for row in pending]) / size
        with torch.no_grad():
            y, ends, directions, taken = run(
                self.iteration(self.system, r / size[:, None], goal), steps
            )
        for place, direction in directions.items():
            found.directions[pending[place]] = direction
        y.mul_(size[:, None]).add_(x[pending])
        with running.unwatched() if End.CANCELLED in ends else nullcontext():
            r = b[pending] - self._product(y)
        rests = lengths(r).tolist()
        self._require_finite(rests)
        again = []
        for place, (row, end, rest) in enumerate(zip(pending, ends, rests, strict=True)):
            found.ends[row] = _judged(end, rest, left[row], found.goals[row])
            if found.ends[row] in (End.ROUNDING, End.SINGULAR) and rest > left[row]:
                continue  # what was there before is better
            x[row], left[row] = y[place], rest
            if found.ends[row] == End.NOT_YET:
                again.append(place)
        return r[again], taken, [pending[place] for place in again]

    def _product(self, x: Tensor) -> Tensor:
        """Return the product that residuals are computed from; it shows whether somebody differentiates."""
        return self.system.recorded_product(x).detach()

    def _require_finite(self, norms: list[float]) -> None:
        if not all(map(math.isfinite, norms)):
            self.system.refuse_values()

    def _warn(self, found: _Found) -> None:
        """Say which right-hand side failed worst, why, and what to do."""
        failed = [row for row, end in enumerate(found.ends) if end != End.CONVERGED]
        if not failed:
            return
        worst = max(failed, key=lambda row: found.residual_norms[row] / (found.goals[row] or 1e-99))
        problem, mend = _reason(found, worst, self.system.op.dtype)
        if len(found.ends) > 1:
            problem = (
                f"{len(failed)} of {len(found.ends)} right-hand sides did not converge; "
                f"of number {worst} {problem}"
            )
        warn_user(message(self.system.where, problem, mend), ConvergenceWarning)


def _judged(end: End, rest: float, before: float, goal: float) -> End:
    """Return why a right-hand side ended, by its true residual; NOT_YET if it is to start from that again."""
    if rest <= goal:
        return End.CONVERGED
    if end == End.NOT_YET:
        return End.SPENT
    if end != End.CONVERGED:
        return end
    return End.NOT_YET if rest <= 0.5 * before else End.ROUNDING


def _reason(found: _Found, row: int, dtype: torch.dtype) -> tuple[str, str]:
    end = found.ends[row]
    left = f"the residual is {found.residual_norms[row]:.3g}, not within {found.goals[row]:.3g}"
    if end == End.CURVATURE:
        return (
            f"{left}: along a direction the curvature is {found.directions[row][1]:.3g}, so that the matrix is "
            "not positive definite",
            "Take minres, or damp the operator, op.damped(damping)",
        )
    if end == End.SINGULAR:
        return (
            f"{left}: the matrix is singular, or all but singular, and does not reach all of b; x is near a "
            "least-squares solution",
            "Damp the operator, op.damped(damping)",
        )
    if end == End.ROUNDING:
        return (
            f"{left}: rounding in {dtype} allows no less",
            "Raise rtol, damp the operator, or take a wider dtype",
        )
    if end == End.CANCELLED:
        return f"{left}: it was cancelled", "Pass the solution as x0= to go on"
    return (
        f"{left}, and max_matvecs were spent",
        "Raise max_matvecs or the tolerance, or pass a preconditioner",
    )


def _solution(found: _Found, system: LinearSystem, batched: bool) -> Solution:
    x = found.x
    norms = x.new_tensor(found.residual_norms)
    right = [end == End.CONVERGED for end in found.ends]
    converged = torch.tensor(right, dtype=torch.bool, device=x.device)
    direction = curvature = None
    if found.directions:
        directions, curvature = torch.zeros_like(x), torch.full_like(norms, math.nan)
        for row, (p, quotient) in found.directions.items():
            directions[row], curvature[row] = p, quotient
        direction = system.tree(directions, batched=batched)
    if not batched:
        norms, converged = norms[0], converged[0]
        curvature = None if curvature is None else curvature[0]
    return Solution(
        x=system.tree(x, batched=batched),
        residual_norm=norms,
        converged=converged,
        num_matvecs=found.num_matvecs,
        negative_curvature=direction,
        curvature=curvature,
    )
