"""A derivative against differences at several steps, whose own error shows in how they differ from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import torch

from secorder_func import tree
from secorder_func.transforms.finite_difference import base_step
from secorder_func.transforms.loss import Leaves

__all__ = ["NOTHING", "Comparison", "Precision", "Verdict", "compare", "finite", "size"]

Verdict: TypeAlias = Literal["agrees", "differs", "jumps", "undecided"]

_FIRST = (1.0, 0.25)
_MORE = (16.0, 4.0, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10, 2.0**-12)
_SETTLED = (
    0.1  # differences that differ by so little, relative to the error, have found another value
)
_FINE = 1e-10  # unit roundoffs below leave room to shrink a step
_JUMP = 1e3  # in multiples of rounding


@dataclass(frozen=True)
class Comparison:
    """How a derivative compares with differences.

    Attributes
    ----------
    verdict
        `"agrees"`; `"differs"`: the differences settle on another value; `"jumps"`: they grow without bound as the step
        shrinks, so that what is differenced jumps at the point; `"undecided"`: they do not settle.
    error
        The relative difference at the best step.
    scatter
        By how much the differences differ among themselves, relative to the derivative.
    manner
        Of an agreement: `""` to the tolerance, `"to rounding"`, `"in the limit"` of short steps.
    """

    verdict: Verdict
    error: float
    scatter: float
    manner: Literal["", "to rounding", "in the limit"] = ""

    def undecided(self) -> Comparison:
        """Return the same comparison without a verdict."""
        return replace(self, verdict="undecided")


NOTHING = Comparison("undecided", float("inf"), float("inf"))


@dataclass(frozen=True)
class Precision:
    """How finely is computed and compared.

    Attributes
    ----------
    eps
        The unit roundoff of the evaluations.
    rtol
        The relative difference that is allowed.
    patient
        Whether to go on with more steps where the first ones do not agree.
    """

    eps: float
    rtol: float
    patient: bool = True


@dataclass(frozen=True)
class _At:
    """The difference at one step: the step, the value, its size, its distance from the derivative."""

    step: float
    value: Leaves
    size: float
    error: float


def compare(
    function: Callable[[Leaves], Leaves],
    point: Leaves,
    direction: Leaves,
    derivative: Leaves,
    *,
    precision: Precision,
) -> Comparison:
    """Compare the derivative of `function` along `direction` with central differences.

    Parameters
    ----------
    function
        Leaves -> tensors; the loss or its gradient.
    point, direction
        Where, and along what.
    derivative
        What is to be checked, like what `function` returns.
    precision
        Of the evaluations and of the comparison.
    """
    eps, rtol = precision.eps, precision.rtol
    here = size(function(point))
    exact = size(derivative)
    unit = float(base_step(point, direction))

    def at(multiples: tuple[float, ...]) -> list[_At]:
        tried = [_difference(function, point, direction, derivative, unit * m) for m in multiples]
        return [difference for difference in tried if difference is not None]

    found = at(_FIRST)
    noise = 4 * eps * here
    if len(found) == len(_FIRST) and (agrees := _agreement(found, exact, noise, rtol, unit, eps)):
        return agrees
    if not precision.patient:
        return _conclusion("undecided", found, exact) if len(found) > 1 else NOTHING
    found = sorted(found + at(_MORE), key=lambda difference: -difference.step)
    if len(found) < 4:
        return NOTHING
    if agrees := _agreement(found, exact, noise, rtol, unit, eps) or _limit(found, rtol, eps):
        return agrees
    noise = max(noise, _noise(function, point, direction, unit))
    if _settled(found, noise):
        return _conclusion("differs", found, exact)
    if _grows(found, noise):
        return _conclusion("jumps", found, exact)
    return _conclusion("undecided", found, exact)


def _difference(
    function: Callable[[Leaves], Leaves],
    point: Leaves,
    direction: Leaves,
    derivative: Leaves,
    step: float,
) -> _At | None:
    """Return the difference at one step; None where the function raises or is not finite at one of its points."""
    try:
        ahead, behind = (function(tree.axpy(s, direction, point)) for s in (step, -step))
    except Exception:  # the loss may end there, as a Cholesky factorisation does
        return None
    value = tree.scale(1 / (2 * step), tree.sub(ahead, behind))
    if not finite(value):
        return None
    return _At(step, value, size(value), _distance(value, derivative))


def size(leaves: Leaves) -> float:
    """Return the Euclidean norm."""
    return float(tree.norm(leaves)) if leaves else 0.0


def _distance(x: Leaves, y: Leaves) -> float:
    return size(tree.sub(x, y))


def _noise(
    function: Callable[[Leaves], Leaves], point: Leaves, direction: Leaves, unit: float
) -> float:
    """Return the rounding of `function`, as it shows in a second difference too close for curvature.

    All on one side of the point, so that a jump there does not count.
    """
    near = [function(tree.axpy(k * unit * 2.0**-14, direction, point)) for k in (1, 2, 3)]
    bend = tree.add(tree.sub(near[0], near[1]), tree.sub(near[2], near[1]))
    return size(bend)


def _agreement(
    found: list[_At], exact: float, noise: float, rtol: float, unit: float, eps: float
) -> Comparison | None:
    """Return an agreement to the tolerance, or to rounding, if there is one."""
    best = _conclusion("agrees", found, exact)
    if best.error <= rtol:
        return best
    for difference in found:
        scale, rounding = max(exact, difference.size), noise / difference.step
        # Rounding that could hide a wrong derivative decides nothing, unless there is nothing to hide.
        telling = exact == 0 or rounding <= 0.1 * scale or eps < _FINE
        if telling and difference.error <= rounding and difference.step >= min(_FIRST) * unit:
            return replace(best, manner="to rounding")
    return None


def _limit(found: list[_At], rtol: float, eps: float) -> Comparison | None:
    """Return an agreement in the limit: an error that all but vanishes beside the differences at longer steps."""
    longest = 0.0
    for difference in found if eps < _FINE else []:
        longest = max(longest, difference.size)
        if difference.error <= rtol * longest:
            return Comparison("agrees", difference.error / longest, rtol, "in the limit")
    return None


def _settled(found: list[_At], noise: float) -> bool:
    """Say whether three differences in a row agree on a value that is not the derivative."""
    gaps = [_distance(a.value, b.value) for a, b in pairwise(found)]
    for k in range(len(gaps) - 1):
        three = found[k : k + 3]
        error = min(difference.error for difference in three)
        clear = error > 10 * noise / three[-1].step
        if clear and max(gaps[k], gaps[k + 1]) <= _SETTLED * error:
            return True
    return False


def _grows(found: list[_At], noise: float) -> bool:
    """Say whether the smallest steps show a jump: an error that is inversely proportional to the step."""
    jumps = [difference.error * difference.step for difference in found[-4:]]
    return min(jumps) > 0.7 * max(jumps) and min(jumps) > _JUMP * noise


def _conclusion(verdict: Verdict, found: list[_At], exact: float) -> Comparison:
    def relative(difference: _At) -> float:
        return difference.error / (max(exact, difference.size) or 1.0)

    best = min(found, key=relative)
    scatter = min(_distance(d.value, best.value) for d in found if d is not best)
    return Comparison(verdict, relative(best), scatter / (max(exact, best.size) or 1.0))


def finite(leaves: Leaves) -> bool:
    """Say whether every entry is a number."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves)
