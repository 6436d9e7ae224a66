"""Quadratic forms of an operator without products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError
from secorder_func.operators.memory import is_out_of_memory
from secorder_func.operators.versions import Versions
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.registry import WrongForwardRuleError
from secorder_func.taylor import NotPropagatedError
from secorder_func.transforms.forms import Draw
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.plan import Plan, group_size
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import ChunkSize, Tree

__all__ = [
    "Draw",
    "Draws",
    "Forms",
    "FormsLike",
    "Part",
    "Plan",
    "group_size",
    "plan_of",
    "rows_of",
    "units",
]

Compute = Callable[[Sequence[Draw | None], int, int], tuple[Tensor, int]]
"""(what draws each leaf, vectors, groups) -> (sums over the groups, bytes of the largest term of one vector)."""

Draws = Callable[[range], Sequence[Draw | None]]
"""Numbers of vectors -> what draws each leaf of them; None for a leaf in which they are zero."""


class Part(NamedTuple):
    """Sums of forms over groups, `(groups, ...)`, and of how many vectors each is."""

    sums: Tensor
    sizes: list[int]


class FormsLike(Protocol):
    """What algorithms ask for forms: those of one batch, or the sums over many."""

    largest: int | None

    @property
    def missing(self) -> str | None:
        """Why there are none; None as long as there are."""

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of the vectors of a span, in order; end early where there are none."""

    def of(self, vectors: Tree, /) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""

    def moved(
        self, leaves: Leaves, draws: Callable[[Sequence[Draw | None]], Sequence[Draw | None]]
    ) -> FormsLike:
        """Return the forms of other vectors, of a space with other leaves, that stand for vectors of this one."""


def plan_of(
    like: Tree, device: torch.device, size: ChunkSize, budget: int | None, group: int = 1
) -> Plan:
    """Return the plan for vectors of a space."""
    leaves, _ = tree.flatten(like)
    largest = max((leaf.numel() * leaf.element_size() for leaf in leaves), default=0)
    return Plan(size, budget, device, largest, group=group)


def rows_of(stack: Tensor, rows: range) -> Tensor:
    """Return some of several stacked vectors, which need not be drawn."""
    return stack[rows.start : rows.stop]


def units(leaf: Tensor, index: int, count: int, entries: range) -> list[Draw | None]:
    """Return what draws unit vectors of the leaf of an index of so many; the others have no terms."""
    draw = partial(tree.basis, leaf, entries.start, entries.stop)
    return [draw if place == index else None for place in range(count)]


@dataclass
class Forms:
    """The forms `v . A v` of several vectors, summed over groups, if a propagation gives them.

    Parameters
    ----------
    compute
        As `forms_of_loss` with its loss bound.
    leaves
        Of the parameters.
    outside
        Whether someone differentiates what is computed from them; then there are no forms.
    data
        Further tensors that must not change in place.

    Attributes
    ----------
    missing
        Why there are none; None as long as there are.
    largest
        Bytes of the largest term of one vector, known after the first call.
    """

    compute: Compute
    leaves: Leaves
    outside: bool = False
    data: Leaves = ()
    missing: str | None = None
    largest: int | None = None
    _state: RandomState = field(init=False)
    _versions: Versions = field(init=False)

    def __post_init__(self) -> None:
        self._state = RandomState.now(self.leaves)
        self._versions = Versions(self.leaves, self.data)

    def __call__(self, draws: Sequence[Draw | None], count: int, groups: int) -> Tensor | None:
        """Return the sums, `(groups,)`, None where there are none."""
        if self.outside or self.missing is not None or in_transform():
            return None
        self._versions.require_unchanged()
        try:
            with self._state.replayed():
                sums, largest = self.compute(draws, count, groups)
        except (ArgumentError, torch.OutOfMemoryError):
            raise
        except (NotPropagatedError, WrongForwardRuleError, RuntimeError) as error:
            self.missing = str(error)  # products say whether it is the user's own
            return None
        self.largest = max(largest, self.largest or 0)
        return sums.detach()

    def in_groups(self, draws: Draws, span: range, plan: Plan, /) -> Iterator[Part]:
        """Yield the sums of the vectors of a span, chunk by chunk; end early where there are none."""
        start = span.start
        while start < span.stop:
            for count, each in plan.pieces(start, span.stop, self.largest):
                try:
                    sums = self(draws(range(start, start + count)), count, count // each)
                except RuntimeError as error:
                    if not plan.adapts or count == 1 or not is_out_of_memory(error):
                        raise
                    plan.halve(count)
                    break
                if sums is None:
                    return
                plan.largest = max(plan.largest, count)
                start += count
                yield Part(sums, [each] * (count // each))

    def moved(
        self, leaves: Leaves, draws: Callable[[Sequence[Draw | None]], Sequence[Draw | None]]
    ) -> Forms:
        """Return the forms of other vectors, of a space with other leaves, that stand for vectors of this one."""

        def compute(given: Sequence[Draw | None], count: int, groups: int) -> tuple[Tensor, int]:
            found = self(draws(given), count, groups)
            if found is None:
                raise NotPropagatedError(self.missing or "the operator has no forms")
            return found, self.largest or 0

        return Forms(compute, leaves, self.outside, data=self.data)

    def of(self, vectors: Tree) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""
        stacks, _ = tree.flatten(vectors)
        count = stacks[0].shape[0]
        if not count or (torch.is_grad_enabled() and differentiated_outside(vectors)):
            return None
        return self([lambda stack=stack: stack for stack in stacks], count, count)  # type: ignore[misc]
