"""Second-order terms from a first-order rule: the rule itself is differentiated.

With the first-order rule `push(x, x1) = f'(x) x1` the second-order term is `push(x, x2)` and the derivative of
`push(x, x1_k)` in `x` along `x1_k`. For a function of each entry the rule applied to ones is its slope, of which one
backward pass gives the derivatives of all entries; for any other function the rule is differentiated in forward mode,
mapped over the vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func.rules.mode import SecondOrderRules
from secorder_func.rules.torch_func import forward_mode_lock, jvp, without_vmap_warnings
from secorder_func.taylor.general import exchanged
from secorder_func.taylor.registry import NotCoveredError, Rule
from secorder_func.taylor.second_order.registry import curved

__all__ = ["STRAIGHT", "derived"]

STRAIGHT = frozenset({"linear", "constant", "selection"})
"""Kinds whose second derivative is zero."""


class _Given:
    """The terms of some tensors."""

    def __init__(self, pairs: dict[int, Tensor]) -> None:
        self._pairs = pairs

    def __call__(self, x: Any, /) -> Any:
        return self._pairs.get(id(x))

    def or_zeros(self, x: Tensor, /) -> Tensor:
        term = self(x)
        return torch.zeros_like(x) if term is None else term

    def summed(self, fresh: Tensor, other: Tensor, /) -> Tensor:
        return fresh + other


def derived(
    t: Any, rule: Rule, func: Any, args: Any, kwargs: Any, carried: list[Tensor]
) -> tuple[Any, Any, Any]:
    """Return the value of a function, and its terms of first and second order."""
    if rule.together:
        out, term_of = rule.push(*args, **kwargs)
        push: Callable[[], Any] = lambda: term_of(t)  # noqa: E731
    else:
        out = t.value(func, args, kwargs)
        push = lambda: rule.push(t, out, *args, **kwargs)  # noqa: E731
    if _is_entrywise(rule, out, carried):
        first, second = _entrywise(t, rule, func, args, kwargs, carried[0])
        return out, first, second
    first = t.mapped({id(x): t(x) for x in carried}, push)
    if t.only_first:
        return out, first, None
    seconds = {id(x): second for x in carried if (second := t.second(x)) is not None}
    second = t.mapped(seconds, push) if seconds else None
    if rule.kind not in STRAIGHT:
        if rule.together:
            raise NotCoveredError("it has no second-order rule")
        second = _sum(second, _bent(t, rule, func, args, kwargs, carried))
    return out, first, second


def _is_entrywise(rule: Rule, out: Any, carried: list[Tensor]) -> bool:
    return (
        rule.kind == "elementwise"
        and not rule.together
        and len(carried) == 1
        and isinstance(out, Tensor)
        and out.shape == carried[0].shape
        and out.is_floating_point()
        and carried[0].is_floating_point()
    )


def _entrywise(t: Any, rule: Rule, func: Any, args: Any, kwargs: Any, x: Tensor) -> Any:
    places = {id(x): 0}
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        args, kwargs = exchanged(args, places, (z,)), exchanged(kwargs, places, (z,))
        slope = rule.push(
            _Given({id(z): torch.ones_like(z)}), func(*args, **kwargs), *args, **kwargs
        )
        if slope is None:
            return None, None
        curve = None
        if slope.requires_grad:
            (curve,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
    return curved(t, x, slope.detach(), curve)


def _bent(t: Any, rule: Rule, func: Any, args: Any, kwargs: Any, carried: list[Tensor]) -> Any:
    """Return the sums over the groups of the second derivative along every vector."""
    places = {id(x): index for index, x in enumerate(carried)}
    count = len(carried)
    kept: list[bool] = []
    alone = True

    def one(*terms: Tensor) -> tuple[Tensor, ...]:
        first, along = terms[:count], terms[count:]

        def pushed(*values: Tensor) -> tuple[Tensor, ...]:
            nonlocal kept, alone
            known = _Given({id(value): term for value, term in zip(values, first, strict=True)})
            with SecondOrderRules(forward=True, higher=True):
                given = exchanged(args, places, values), exchanged(kwargs, places, values)
                out = func(*given[0], **given[1])
                found = rule.push(known, out, *given[0], **given[1])
            alone = not isinstance(found, (tuple, list))
            parts = (found,) if alone else found
            kept = [part is not None for part in parts]
            return tuple(part for part in parts if part is not None)

        return jvp(pushed, tuple(carried), along)[1]  # type: ignore[no-any-return]

    firsts = [t(x) for x in carried]
    with forward_mode_lock(), torch.enable_grad(), without_vmap_warnings():
        found = vmap(one, randomness="error")(*firsts, *map(t.partner, firsts))
    sums = iter([t.gathered(part.detach()) for part in found])
    parts = [next(sums) if is_kept else None for is_kept in kept]
    return parts[0] if alone else parts


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, (tuple, list)) or isinstance(second, (tuple, list)):
        firsts = [None] * len(second) if first is None else first
        seconds = [None] * len(firsts) if second is None else second
        return [_sum(a, b) for a, b in zip(firsts, seconds, strict=True)]
    return second if first is None else first if second is None else first + second
