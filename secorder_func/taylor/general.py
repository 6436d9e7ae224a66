"""Functions that the terms pass by torch's own forward rule, which a sweep proved right when it is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.rules.mode import SecondOrderRules
from secorder_func.rules.torch_func import forward_mode_lock, jvp_aux
from secorder_func.taylor.proven import NAMES

__all__ = ["PROVEN", "exchanged", "named", "pushed_by_torch"]


def named(name: str) -> list[Any]:
    """Return the function of torch with a dotted name, and the method of tensors that is the same."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    method = None if "." in name else getattr(Tensor, name, None)
    return [function for function in (found, method) if function is not None]


PROVEN: frozenset[Any] = frozenset(chain.from_iterable(map(named, NAMES)))
"""The functions that a sweep proved right."""


def exchanged(value: Any, places: dict[int, int], tensors: Sequence[Tensor]) -> Any:
    """Return an argument with tensors exchanged, whose ids have places among the others."""
    if isinstance(value, Tensor):
        return tensors[places[id(value)]] if id(value) in places else value
    if isinstance(value, (tuple, list)):
        return type(value)(exchanged(item, places, tensors) for item in value)
    if isinstance(value, dict):
        return {key: exchanged(item, places, tensors) for key, item in value.items()}
    return value


def pushed_by_torch(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    carried: Sequence[Tensor],
    terms: tuple[Tensor, ...],
) -> tuple[Any, Any]:
    """Return the value of a function and its term, None where an output has none."""
    places = {id(x): index for index, x in enumerate(carried)}
    restore: Any = None

    def evaluate(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        nonlocal restore
        with SecondOrderRules(forward=True, higher=True):
            out = func(*exchanged(args, places, tensors), **exchanged(kwargs, places, tensors))
        found, restore = tree.tensors_and_rest(out)
        return tuple(x for x in found if _is_smooth(x)), found

    with forward_mode_lock():
        smooth, moved, found = jvp_aux(evaluate, tuple(carried), terms)
    values, pushed = iter(smooth), iter(moved)
    pairs = [(next(values), next(pushed)) if _is_smooth(x) else (x, None) for x in found]
    return restore([value for value, _ in pairs]), restore([term for _, term in pairs])


def _is_smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
