"""Checks of the loss's value: one finite number, the same number again, and what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secorder_func import tree
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import Leaves
from secorder_func.verify import _causes as causes
from secorder_func.verify import _reach as reach
from secorder_func.verify._evidence import Evidence, evidence, quoted
from secorder_func.verify._lenses import FirstNotFinite, Watch
from secorder_func.verify._problem import Problem
from secorder_func.verify._raised import named, of_the_loss
from secorder_func.verify._result import Check

__all__ = [
    "Surroundings",
    "dependence",
    "finite_number",
    "mode",
    "randomness",
    "repeatability",
    "same_state",
    "shapes",
]

_ROUNDING = 16  # in unit roundoffs, between two evaluations


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a loss reaches beside its arguments, and the states of all generators of random numbers."""

    reached: Callable[[], list[tuple[str, Any]]]
    sources: list[reach.Source]
    before: list[Any]
    plain: dict[str, Any]

    @staticmethod
    def of(problem: Problem) -> Surroundings:
        """Look around before the first evaluation."""
        f = problem.f

        def reached() -> list[tuple[str, Any]]:
            return reach.walk(
                (getattr(f, "__name__", type(f).__name__), f),
                ("args", problem.args),
                ("kwargs", problem.kwargs),
            )

        found = reached()
        sources = reach.random_sources(found)
        return Surroundings(
            reached,
            sources,
            [source.state() for source in sources],
            reach.plain_values(found),
        )

    def states(self) -> list[Any]:
        """Return the present states of all generators but torch's global ones."""
        return [source.state() for source in self.sources]

    def restore(self, states: list[Any]) -> None:
        """Put the generators into these states."""
        for source, state in zip(self.sources, states, strict=True):
            source.restore(state)

    def changed(self) -> list[str]:
        """Return which plain values are others than before the first evaluation."""
        return reach.changes(self.plain, reach.plain_values(self.reached()))


def finite_number(problem: Problem) -> tuple[Check, Tensor | None, Evidence | None]:
    """Evaluate for the first time; with a result that is no finite number there is no evidence."""
    name, means = "loss", "The function returns one finite real number, as a tensor."
    watch = Watch()
    try:
        value, leaves = problem.looked_at(lambda: watch).recorded(problem.leaves)
    except Exception as error:
        cause = of_the_loss(error, problem.f, problem.params, problem.args)
        return Check(name, False, quoted(error), means, causes=cause), None, None
    if not bool(torch.isfinite(value)):
        finding = f"the loss is {float(value)}"
        cause = causes.not_finite(_not_finite_in(problem), function=_first_not_finite(problem))
        return Check(name, False, finding, means, causes=cause), None, None
    dtype = str(value.dtype).removeprefix("torch.")
    finding = f"{float(value):.6g}, one finite {dtype} number"
    return Check(name, True, finding, means), value.detach(), evidence(value, leaves, watch)


def shapes(found: Evidence) -> Check | None:
    """Say which outputs and targets a loss function broadcasts, if it does: more pairs than there are are an error."""
    if not found.broadcast:
        return None
    grown = [pair for pair in found.broadcast if causes.grows(*pair)]
    finding = causes.broadcasts(*(grown or found.broadcast)[0])
    means = "Outputs and targets that are compared have one shape."
    if not grown:
        return Check("shapes", None, finding, means)
    return Check("shapes", False, finding, means, causes=causes.of_shapes(*grown[0]))


def _first_not_finite(problem: Problem) -> str:
    seen = FirstNotFinite()
    with suppress(Exception):
        problem.looked_at(lambda: seen).value(problem.leaves)
    return seen.function


def _not_finite_in(problem: Problem) -> list[str]:
    tensors = [
        *_by_path("params", problem.params),
        *named(problem.f, problem.args),
        *_by_path("kwargs", problem.kwargs),
    ]
    return [name for name, t in tensors if not bool(torch.isfinite(t).all())]


def _by_path(name: str, given: Any) -> Iterator[tuple[str, Tensor]]:
    for path, item in zip(tree.paths(given), tree.flatten(given)[0], strict=True):
        if isinstance(item, Tensor):
            yield f"{name}{path}", item


def repeatability(problem: Problem, value: Tensor, eps: float, around: Surroundings) -> Check:
    """Evaluate again from the same random state, and look for the cause if that gives something else."""
    name = "repeatable"
    means = (
        "From one random state the loss is the same number every time: a function of its arguments."
    )
    changed = around.changed()
    try:
        again = problem.value(problem.leaves)
    except Exception as error:
        cause = causes.not_repeatable((), reach.iterators(around.reached()), changed, 1.0)
        finding = f"the second evaluation raises {quoted(error)}"
        return Check(name, False, finding, means, causes=cause)
    if bool(again == value):
        finding = "twice from one random state: the same number, bit for bit"
        return Check(name, True, finding, means, 0.0, 0.0)
    first, second = float(value), float(again)
    relative = abs(first - second) / max(abs(first), abs(second))
    if relative <= _ROUNDING * eps:
        finding = f"twice from one random state: the same number to rounding, {relative:.0e}"
        return Check(name, True, finding, means, relative, _ROUNDING * eps)
    cause = causes.not_repeatable(
        _guilty(problem, value, around), reach.iterators(around.reached()), changed, relative
    )
    finding = f"twice from one random state: {first:.6g}, then {second:.6g}"
    return Check(name, False, finding, means, relative, _ROUNDING * eps, cause)


def _guilty(problem: Problem, value: Tensor, around: Surroundings) -> list[str]:
    """Return the sources of random numbers whose state, put back, brings the first value back."""
    found = []
    for source, state in zip(around.sources, around.before, strict=True):
        source.restore(state)
        try:
            if bool(problem.value(problem.leaves) == value):
                found.append(source.name)
        except Exception:
            continue
    return found


def randomness(problem: Problem, value: Tensor, end: RandomState) -> Check:
    """Say whether the loss draws from torch's generators, by what it leaves them in and by another draw."""
    name, means = (
        "random numbers",
        "Whether the loss draws random numbers by torch's global generators.",
    )
    if same_state(problem.start, end):
        return Check(name, None, "none drawn", means)
    try:
        other = float(problem.started_at(end).value(problem.leaves))
    except Exception as error:
        return Check(
            name, None, f"drawn; from another state the loss raises {quoted(error)}", means
        )
    if other == float(value):
        return Check(name, None, "drawn, and the loss does not depend on them", means)
    finding = (
        f"drawn: {float(value):.6g} from one state, {other:.6g} from another. hvp draws anew at every call, "
        "an operator once"
    )
    return Check(name, None, finding, means)


def mode(modules: list[tuple[str, nn.Module]]) -> Check | None:
    """Say that the model is in training mode, if that makes a difference."""
    effects = reach.training_effects([module for _, module in modules])
    if not effects:
        return None
    finding = f"the model is in training mode: {', '.join(effects)}. model.eval() gives the function that predicts"
    return Check("mode", None, finding, "Whether the model is in training mode.")


def same_state(a: RandomState, b: RandomState) -> bool:
    """Say whether two random states are the same."""
    pairs = [(a.cpu, b.cpu), *((x, y) for (_, x), (_, y) in zip(a.others, b.others, strict=True))]
    return all(torch.equal(x, y) for x, y in pairs)


def dependence(
    problem: Problem, found: Evidence, gradient: Leaves | None, products: list[Leaves]
) -> Check:
    """Say which parameters have no effect: outside of the history, or with zero gradient and product."""
    name = "dependence"
    means = "The loss depends on its parameters."
    if not any(found.reached):
        finding = "the loss does not depend on any parameter"
        return Check(name, False, finding, means, causes=causes.no_dependence(found))
    still = [True] * len(found.reached)
    for leaves in ([gradient] if gradient is not None else []) + products:
        still = [a and not bool(leaf.any()) for a, leaf in zip(still, leaves, strict=True)]
    paths = [path or "params" for path in tree.paths(problem.params)]
    unused = [p for p, reached in zip(paths, found.reached, strict=True) if not reached]
    flat = [
        p
        for p, reached, zero in zip(paths, found.reached, still, strict=True)
        if reached and zero and products
    ]
    parts = []
    if unused:
        parts.append(f"not used: {causes.listed(unused)}")
    if flat:
        parts.append(f"used, with zero gradient and product: {causes.listed(flat)}")
    if parts:
        return Check(name, None, "; ".join(parts), means)
    number = len(paths)
    finding = f"on all {number} leaves of params" if number > 1 else "on params"
    return Check(name, True, finding, means)
