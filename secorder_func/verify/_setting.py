"""What the comparisons share: the problem, the evidence, the tolerances, the directions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.rules.in_double import widened
from secorder_func.transforms.loss import Leaves
from secorder_func.verify._differences import Comparison, Precision, finite
from secorder_func.verify._evidence import Evidence
from secorder_func.verify._problem import Problem

__all__ = ["Decision", "Setting", "places"]

Trial: TypeAlias = Callable[[Problem, Precision], Comparison]

_FINE = 1e-10  # unit roundoffs below need no finer dtype to decide
_ROUGH = 5e-4  # and those above (half precision, autocast) decide little


@dataclass(frozen=True)
class Decision:
    """A comparison, and where it was made."""

    comparison: Comparison
    problem: Problem
    precision: Precision


@dataclass(frozen=True, eq=False)
class Setting:
    """A loss that evaluates to the same number twice, and how to compare.

    Attributes
    ----------
    problem, value, evidence
        The loss, what it evaluates to, and what that showed.
    random
        Whether it draws random numbers.
    v, u
        Two random directions.
    tolerance
        What the user allows, if anything.
    """

    problem: Problem
    value: Tensor
    evidence: Evidence
    random: bool
    v: Leaves
    u: Leaves
    tolerance: float | None

    @property
    def rtol(self) -> float:
        """What exact answers may differ by."""
        return self.tolerance or self.evidence.eps**0.5

    @property
    def by_differences(self) -> float:
        """What differences may be off by: the cube root of the unit roundoff, where `rtol` is its square root."""
        return float(self.rtol ** (2 / 3))

    @cached_property
    def double(self) -> Problem | None:
        """The problem in double precision, if it can be had and is not in it already."""
        if self.evidence.eps < _FINE:
            return None
        try:
            double = self.problem.in_double()
            value = double.value(double.leaves)
        except Exception:  # whatever the loss does not like
            return None
        return double if value.dtype == torch.float64 and finite((value,)) else None

    @property
    def fine(self) -> Precision:
        """The precision of the problem in double."""
        eps = torch.finfo(torch.float64).eps
        return Precision(eps, eps ** (1 / 3) if self.tolerance is None else self.by_differences)

    def decide(self, trial: Trial) -> Decision:
        """Compare; in double precision where a coarse dtype does not agree, or is too coarse to say anything."""
        here = Precision(self.evidence.eps, self.by_differences)
        if self.double is not None:
            if here.eps < _ROUGH:
                comparison = trial(self.problem, replace(here, patient=False))
                if comparison.verdict == "agrees":
                    return Decision(comparison, self.problem, here)
            with suppress(Exception):  # as above
                return Decision(trial(self.double, self.fine), self.double, self.fine)
        comparison = trial(self.problem, here)
        if comparison.verdict == "differs" and (
            here.eps > _ROUGH or (here.eps > _FINE and self.evidence.kinks)
        ):
            # Between the far points of a coarse difference, kinks look like curvature.
            comparison = comparison.undecided()
        return Decision(comparison, self.problem, here)

    def like(self, problem: Problem, vector: Leaves) -> Leaves:
        """Return a vector in the dtypes of a problem."""
        return widened(vector) if problem is self.double else vector


def places(problem: Problem, leaves: Leaves, bad: Callable[[Tensor], bool]) -> list[str]:
    """Return where in the parameters the leaves are that something holds of."""
    paths = tree.paths(problem.params)
    return [path or "params" for path, leaf in zip(paths, leaves, strict=True) if bad(leaf)]
