"""When an estimator has enough products: a count, or an interval that is narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from secorder_func import running, tree
from secorder_func.algorithms.checkpoint import CheckpointLike, keeping
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
from secorder_func.operators import LinearOperator, PerSampleOperator
from secorder_func.typing import Tree

__all__ = ["Target", "estimated"]

Operator: TypeAlias = LinearOperator | PerSampleOperator

_FIRST_LOOK = 16
"""Products before the error is looked at for the first time."""
_RISK = 0.05


class Accumulated(Protocol):
    """What an estimator has gathered; it grows to any total, and how it got there does not show in it."""

    def extend(self, total: int) -> None:
        """Make what is missing to a total of so many products, and say how far it is when nothing is half done."""

    def cut(self) -> int:
        """Drop what is half done, and return how many products an estimate can be made from."""

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
    op: Operator,
    target: Target,
    resume: Any,
    generator: torch.Generator | None,
    begin: Callable[[int, State | None], Accumulated],
    where: str,
    checkpoint: CheckpointLike,
    settings: State,
) -> Estimate:
    """Return the estimate that meets a target, from the beginning or from where another one stopped.

    `begin(seed, state)` is given the generator's next value, or the seed and the state of an estimate to be continued.
    `settings` are what the numbers depend on beside the target.

    Looking at an error that is itself estimated and stopping when it happens to be small would stop too early. So it
    is looked at seldom, first after 16 products, and each time with a risk of its own: `1/(j (j + 1))` of 5 % at look
    `j`. These add up to 5 % at most, however often one looks.
    """
    before = None if resume is None else _state_of(resume, where)
    seed = op.draw_seed(generator) if before is None else int(before["seed"])
    settings = {
        "seed": None if generator is None and before is None else seed,
        "num_matvecs": target.num_matvecs,
        "rtol": None if target.rtol is None else float(target.rtol),
        "atol": float(target.atol),
        "max_matvecs": target.max_matvecs,
        **settings,
    }
    run = _Run(target, where)
    with (
        keeping(checkpoint, op, where, settings),
        running.task(where, None, "products", run.state, together=op.ranks is not None) as task,
        nullcontext() if before is None else torch.no_grad(),
    ):
        state = before if task.resumed is None else task.resumed
        if state is not None:
            seed = int(state["seed"])
        run.begin(begin, seed, state, again=task.resumed is not None)
        return run.to_the_end(task)


class _Run:
    """What was gathered, and how far it is to go."""

    def __init__(self, target: Target, where: str) -> None:
        self._target, self._where = target, where
        self._gathered: Accumulated | None = None
        self._done = self._looks = self._goal = 0
        self._ended = False

    def begin(
        self,
        begin: Callable[[int, State | None], Accumulated],
        seed: int,
        state: State | None,
        *,
        again: bool,
    ) -> None:
        """Begin, or go on from a state: of the same call if `again`."""
        target = self._target
        self._gathered = begin(seed, state)
        goal = 0
        if state is not None:
            self._done, self._looks = int(state["total"]), int(state["looks"])
            goal = int(state["goal"])
            self._ended = again and bool(state["ended"])
        if target.num_matvecs is not None:
            if target.num_matvecs < self._done:
                problem = f"num_matvecs counts from the beginning; {self._done} are done, got {target.num_matvecs}"
                mend = f"Pass at least {self._done}"
                raise ArgumentError(message(self._where, problem, mend))
            self._goal = target.num_matvecs
        else:
            assert target.max_matvecs is not None
            self._goal = max(goal, self._done, min(_FIRST_LOOK, target.max_matvecs))

    def state(self) -> State:
        """Return what it takes to go on."""
        assert self._gathered is not None
        return {
            "function": self._where,
            "total": self._done,
            "looks": self._looks,
            "goal": self._goal,
            "ended": self._ended,
            **self._gathered.state(),
        }

    def to_the_end(self, task: running.Task) -> Estimate:
        """Return the estimate at the end, or what there is when it is cancelled."""
        gathered, target = self._gathered, self._target
        assert gathered is not None
        estimate, within = None, False
        try:
            while estimate is None or not self._ended:
                task.total = self._goal
                gathered.extend(self._goal)
                self._done = self._goal
                estimate = gathered.estimate(self._done)
                if target.num_matvecs is not None:
                    return estimate.with_state(self.state(), None)
                within = self._looked(estimate)
        except running.Cancelled:
            return self._partial(gathered)
        if not within:
            problem = f"the interval was not within the tolerance after {self._done} products"
            mend = "Raise max_matvecs, or the tolerance"
            warn_user(message(self._where, problem, mend), ConvergenceWarning)
        return estimate.with_state(self.state(), within)

    def _looked(self, estimate: Estimate) -> bool:
        """Look at the error, and say whether it is small enough; set a further goal if it is not."""
        most = self._target.max_matvecs
        assert most is not None
        if not self._ended:
            self._looks += 1
        within, needed = _compared(estimate, self._target, self._looks)
        self._ended = within or self._done >= most
        if not self._ended:
            total = self._done
            self._goal = min(most, 2 * total, max(math.ceil(1.25 * total), needed))
        return within

    def _partial(self, gathered: Accumulated) -> Estimate:
        done = gathered.cut() if running.only_outermost() else 0
        if not done:
            raise
        problem = f"cancelled after {done} of {self._goal} products"
        mend = "The estimate is of those; pass it as resume= to go on"
        self._done = self._goal = done
        estimate = gathered.estimate(done).with_state(self.state(), False)
        warn_user(message(self._where, problem, mend), ConvergenceWarning)
        return estimate


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


def _state_of(resume: Any, where: str) -> State:
    if not isinstance(resume, Estimate) or resume.state is None:
        given = "one without a state" if isinstance(resume, Estimate) else type(resume).__name__
        problem = f"resume must be an Estimate that {where} returned, got {given}"
        raise ArgumentTypeError(message(where, problem))
    if resume.state["function"] != where:
        problem = f"resume must be an Estimate of {where}, got one of {resume.state['function']}"
        raise ArgumentError(message(where, problem, f"Call {resume.state['function']}"))
    return resume.state
