"""Functions that second-order terms pass by torch's own forward rule, differentiated, which a sweep proved right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.rules.mode import SecondOrderRules
from secorder_func.rules.torch_func import forward_mode_lock, jvp, without_vmap_warnings
from secorder_func.taylor.general import exchanged, named
from secorder_func.taylor.second_order.proven import NAMES

__all__ = ["PROVEN_TWICE", "bent_by_torch", "is_smooth"]

PROVEN_TWICE: frozenset[Any] = frozenset(chain.from_iterable(map(named, NAMES)))
"""The functions that a sweep proved right."""


def bent_by_torch(
    t: Any, func: Callable[..., Any], args: Any, kwargs: Any, carried: list[Tensor]
) -> tuple[Any, Any, Any]:
    """Return the value of a function, and its terms of first and second order."""
    places = {id(x): index for index, x in enumerate(carried)}
    count = len(carried)

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        with SecondOrderRules(forward=True, higher=True):
            out = func(*exchanged(args, places, tensors), **exchanged(kwargs, places, tensors))
        return tuple(x for x in tree.tensors_and_rest(out)[0] if is_smooth(x))

    def along(*terms: Tensor) -> Any:
        return jvp(evaluate, tuple(carried), terms)[1]

    def twice(*terms: Tensor) -> Any:
        first, partners = terms[:count], terms[count:]
        return jvp(lambda *at: jvp(evaluate, at, first)[1], tuple(carried), partners)

    with torch.no_grad():
        out = func(*args, **kwargs)
    firsts = [t(x) for x in carried]
    seconds = [t.second(x) for x in carried]
    pushed = None
    with forward_mode_lock(), torch.enable_grad(), without_vmap_warnings():
        first, bend = vmap(twice, randomness="error")(*firsts, *map(t.partner, firsts))
        if any(second is not None for second in seconds):
            filled = [
                x.new_zeros(t.groups, *x.shape) if second is None else second
                for x, second in zip(carried, seconds, strict=True)
            ]
            pushed = vmap(along, randomness="error")(*filled)
    bends = [t.gathered(part.detach()) for part in bend]
    if pushed is not None:
        bends = [a + b.detach() for a, b in zip(bends, pushed, strict=True)]
    found, restore = tree.tensors_and_rest(out)
    return (
        out,
        restore(_placed(found, [part.detach() for part in first])),
        restore(_placed(found, bends)),
    )


def _placed(found: Any, terms: list[Tensor]) -> list[Any]:
    rest = iter(terms)
    return [next(rest) if is_smooth(x) else None for x in found]


def is_smooth(x: Tensor) -> bool:
    """Say whether a tensor can have derivatives."""
    return x.is_floating_point() or x.is_complex()
