"""Quadratic forms of an operator without products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError
from secorder_func.operators.versions import Versions
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.registry import WrongForwardRuleError
from secorder_func.taylor import NotPropagatedError
from secorder_func.transforms.forms import Draw
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.plan import Plan, group_size
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import Tree

__all__ = ["Draw", "Forms", "Plan", "group_size"]

Compute = Callable[[Sequence[Draw | None], int, int], tuple[Tensor, int]]
"""(what draws each leaf, vectors, groups) -> (sums over the groups, bytes of the largest term of one vector)."""


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

    def of(self, vectors: Tree) -> Tensor | None:
        """Return the form of each of several stacked vectors, None where there are none."""
        stacks, _ = tree.flatten(vectors)
        count = stacks[0].shape[0]
        if not count or (torch.is_grad_enabled() and differentiated_outside(vectors)):
            return None
        return self([lambda stack=stack: stack for stack in stacks], count, count)  # type: ignore[misc]
