"""When an estimator has enough products: a count, or an interval that is narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate, State, student
from secorder_func.algorithms.wide import wide
from secorder_func.checks import check_count, check_tolerance
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    message,
    warn_user,
)
from secorder_func.seeds import draw_seed
from secorder_func.typing import Tree

__all__ = ["Target", "estimated"]

_FIRST_LOOK = 16
"""Products before the error is looked at for the first time."""
_RISK = 0.05


class Accumulated(Protocol):
    """What an estimator has gathered; it grows to any total, and how it got there does not show in it."""

    def extend(self, total: int) -> None:
        """Make what is missing to a total of so many products."""

    def estimate(self, total: int) -> Estimate:
        """Return the estimate from what was gathered."""

    def state(self) -> State:
        """Return all that it needs to go on: numbers, strings and tensors."""


@dataclass(frozen=True)
class Target:
    """How many products, or how narrow an interval."""

    num_matvecs: int | None
    rtol: float | None
    atol: float
    max_matvecs: int | None

    @staticmethod
    def checked(
        num_matvecs: Any, rtol: Any, atol: Any, max_matvecs: Any, default_most: int, where: str
    ) -> Target:
        """Refuse what is not either a count or a tolerance."""
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None or name == "atol":
                check_tolerance(tolerance, where, name=name)
        wanted = rtol is not None or atol > 0
        if num_matvecs is None and not wanted:
            problem = "neither num_matvecs nor a tolerance was given"
            raise ArgumentTypeError(
                message(where, problem, "Pass a count of products, or rtol=0.01")
            )
        if num_matvecs is not None:
            if wanted or max_matvecs is not None:
                problem = (
                    f"num_matvecs={num_matvecs} and a tolerance or max_matvecs exclude one another"
                )
                raise ArgumentError(message(where, problem, "Pass one of them"))
            check_count(num_matvecs, where, name="num_matvecs")
        if max_matvecs is not None:
            check_count(max_matvecs, where, name="max_matvecs")
        most = max(_FIRST_LOOK, default_most) if max_matvecs is None else max_matvecs
        return Target(num_matvecs, rtol, atol, most)


def estimated(
    target: Target,
    resume: Any,
    generator: torch.Generator | None,
    begin: Callable[[int, State | None], Accumulated],
    where: str,
) -> Estimate:
    """Return the estimate that meets a target, from the beginning or from where another one stopped.

    `begin(seed, state)` is given the generator's next value, or the seed and the state of an estimate to be continued.

    Looking at an error that is itself estimated and stopping when it happens to be small would stop too early. So it
    is looked at seldom, first after 16 products, and each time with a risk of its own: `1/(j (j + 1))` of 5 % at look
    `j`. These add up to 5 % at most, however often one looks.
    """
    state = None if resume is None else _state_of(resume, where)
    seed = draw_seed(generator) if state is None else state["seed"]
    gathered = begin(seed, state)
    done, looks = (0, 0) if state is None else (int(state["total"]), int(state["looks"]))
    if target.num_matvecs is not None:
        if target.num_matvecs < done:
            problem = (
                f"num_matvecs counts from the beginning; {done} are done, got {target.num_matvecs}"
            )
            raise ArgumentError(message(where, problem, f"Pass at least {done}"))
        total = target.num_matvecs
        gathered.extend(total)
        estimate = gathered.estimate(total)
        return estimate.with_state(_whole(gathered, total, looks, where), None)
    most = target.max_matvecs
    assert most is not None
    total = max(done, min(_FIRST_LOOK, most))
    while True:
        gathered.extend(total)
        estimate = gathered.estimate(total)
        looks += 1
        within, needed = _compared(estimate, target, looks)
        if within or total >= most:
            break
        total = min(most, 2 * total, max(math.ceil(1.25 * total), needed))
    if not within:
        problem = f"the interval was not within the tolerance after {total} products"
        warn_user(
            message(where, problem, "Raise max_matvecs, or the tolerance"), ConvergenceWarning
        )
    return estimate.with_state(_whole(gathered, total, looks, where), within)


def _compared(estimate: Estimate, target: Target, looks: int) -> tuple[bool, int]:
    """Return whether the interval is narrow enough, and how many products would make it so; one synchronisation."""
    degrees = estimate.degrees_of_freedom or 0
    if not degrees:
        return False, 0
    width = student(1 - _RISK / (looks * (looks + 1)), degrees)
    half = width * _norm(estimate.standard_error)
    wanted = max(float(target.atol), float(target.rtol or 0.0) * _norm(estimate.value))
    if half <= wanted:
        return True, 0
    if not (wanted > 0 and math.isfinite(half) and math.isfinite(wanted)):
        return False, 2 * estimate.num_matvecs
    return False, math.ceil(min(1.1 * (half / wanted) ** 2, 4.0) * estimate.num_matvecs)


def _norm(value: Tree) -> float:
    """Return the norm; in float64, in which squares of small numbers are not zero."""
    return float(
        torch.stack([torch.linalg.vector_norm(wide(t)) for t in tree.flatten(value)[0]]).norm()
    )


def _whole(gathered: Accumulated, total: int, looks: int, where: str) -> State:
    return {"function": where, "total": total, "looks": looks, **gathered.state()}


def _state_of(resume: Any, where: str) -> State:
    if not isinstance(resume, Estimate) or resume.state is None:
        given = "one without a state" if isinstance(resume, Estimate) else type(resume).__name__
        problem = f"resume must be an Estimate that {where} returned, got {given}"
        raise ArgumentTypeError(message(where, problem))
    if resume.state["function"] != where:
        problem = f"resume must be an Estimate of {where}, got one of {resume.state['function']}"
        raise ArgumentError(message(where, problem, f"Call {resume.state['function']}"))
    return resume.state
