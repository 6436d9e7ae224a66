"""Quadratic forms of a function in its inputs, one of every value that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from secorder_func.operators.forms import Draw, Forms
from secorder_func.transforms.forms import (
    checked_value,
    propagated_to_second_order,
    quadratic_form,
)
from secorder_func.transforms.laplacian import plan_for, refuse_dependence, require_samples
from secorder_func.transforms.loss import flat_loss
from secorder_func.transforms.plan import Plan
from secorder_func.transforms.policy import differentiated_outside
from secorder_func.typing import Tree

__all__ = ["InputForms", "input_forms"]


@dataclass(frozen=True)
class InputForms:
    """Forms `v . H v` in the inputs, by propagation or by products."""

    forms: Forms
    product: Callable[[Tree], Tensor]
    plan: Callable[[int], Plan]


def input_forms(
    f: Callable[..., Tensor],
    x: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    per_sample: bool,
    where: str,
) -> InputForms:
    """Return the forms of `f` at `x`; of independent samples, if that is said."""
    loss = flat_loss(f, x, args, kwargs, has_aux=False, where=where)
    outside = differentiated_outside(x, args, tuple(kwargs.values()))
    if per_sample:
        require_samples(loss)
        refuse_dependence(loss)

    def compute(draws: Sequence[Draw | None], count: int, groups: int) -> tuple[Tensor, int]:
        return propagated_to_second_order(
            loss.leaves,
            draws,
            lambda terms, at: checked_value(loss.evaluate(at), where),
            count=count,
            groups=groups,
        )

    def product(probe: Tree) -> Tensor:
        return quadratic_form(f)(x, probe, *args, **kwargs)

    return InputForms(Forms(compute, loss.leaves, outside), product, partial(plan_for, loss))
