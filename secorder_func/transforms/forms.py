"""Second-order terms of a loss by forward propagation: quadratic forms, without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from secorder_func.rules import evaluated
from secorder_func.rules.torch_func import forward_mode_lock
from secorder_func.taylor.second_order import Draw, SecondOrderPropagation
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.plain_autograd import recording, to_differentiate

__all__ = ["evaluated_to_second_order", "second_order"]

T = TypeVar("T")


def evaluated_to_second_order(
    evaluate: Callable[[SecondOrderPropagation, Leaves], T],
    leaves: Leaves,
    draws: Sequence[Draw | None],
    *,
    count: int,
    groups: int,
    originals: Leaves | None = None,
    across: bool = False,
    only_first: bool = False,
) -> T:
    """Return `evaluate(terms, leaves)` under a propagation; arguments as for `SecondOrderPropagation`."""
    at = to_differentiate(leaves, differentiable=False)
    make = partial(
        SecondOrderPropagation,
        at,
        draws,
        count=count,
        groups=groups,
        across=across,
        only_first=only_first,
    )
    exchange = None if originals is None else list(zip(originals, at, strict=True))
    with forward_mode_lock(), recording():
        return evaluated(
            lambda rules: evaluate(rules, at),  # type: ignore[arg-type]
            forward=False,
            higher=False,
            exchange=exchange,
            protect=at,
            make=make,
        )


def second_order(terms: SecondOrderPropagation, value: Tensor) -> Tensor:
    """Return the second-order terms of a value, `(J, *value.shape)`."""
    second: Tensor | None = terms.second(value)
    if second is None:
        return torch.zeros((terms.groups, *value.shape), dtype=value.dtype, device=value.device)
    return second
