"""Writes to intermediates: what a writing function computes, and where its term goes.

The term of a view is the same view of a term, so that a write through one name is seen through the others. That
holds only while the terms lie in memory as their values do, which is looked at before each write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.state import storage_of
from secorder_func.rules.writes import asks_in_place, not_in_place
from secorder_func.taylor.registry import IN_PLACE, RULES, NotPropagatedError, Rule

__all__ = ["as_out_of_place", "rebind"]


def as_out_of_place(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Rule | None, Any, tuple[Any, ...], dict[str, Any]]:
    """Return the rule, the function that does not write, and its arguments."""
    if func in RULES and not asks_in_place(func, args, kwargs):
        return RULES[func], None, args, kwargs
    if asks_in_place(func, args, kwargs):
        return RULES.get(func), func, *not_in_place(func, args, kwargs)
    pure = IN_PLACE.get(func)
    if pure is None:
        name = getattr(func, "__name__", str(func))
        pure = getattr(Tensor, name.removesuffix("_"), None)
        if pure is None:
            raise NotPropagatedError(f"there is no rule for {name}")
    return RULES.get(pure), pure, args, kwargs


def rebind(t: Any, target: Tensor, term: Any) -> None:
    """Make `term` the term of a tensor that was written to, and of what shares its memory."""
    known = t.known
    here = storage_of(target)
    others = [
        (tensor, its)
        for reference, its in list(known.values())
        if (tensor := reference()) is not None
        and tensor is not target
        and storage_of(tensor) == here
    ]
    base = target._base
    if base is None and not others:
        t.set(target, term)
        return
    old = known[id(target)][1] if id(target) in known else None
    if old is None:
        old = _zeros_of(t, target, others)
    if not _mirrors(t, target, old, others):
        raise NotPropagatedError("a tensor with several names is written to")
    with torch.set_grad_enabled(t.records):
        if term is None:
            old.zero_()
        else:
            old.copy_(term)
    t.set(target, old)


def _zeros_of(t: Any, target: Tensor, others: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return zeros that lie in memory as a tensor without a term does, part of those of its base."""
    base = target._base
    if (
        t.several
        or any(term is not None for _, term in others)
        or any(o is not base for o, _ in others)
    ):
        raise NotPropagatedError("a tensor with several names is written to")
    if base is None:
        return torch.zeros_like(target)
    zeros = torch.zeros_like(base, memory_format=torch.preserve_format)
    if zeros.stride() != base.stride():
        raise NotPropagatedError("a view of overlapping memory is written to")
    t.set(base, zeros)
    offset = target.storage_offset() - base.storage_offset()
    return zeros.as_strided(target.size(), target.stride(), offset)


def _mirrors(
    t: Any, target: Tensor, term: Tensor, others: list[tuple[Tensor, Tensor | None]]
) -> bool:
    """Say whether exactly the terms of what shares the memory of a tensor share that of its term, alike."""
    if t.several or _place(term) != _place(target):
        return False
    here, shift = storage_of(term), term.storage_offset() - target.storage_offset()
    same = {id(tensor) for tensor, _ in others}
    for reference, its in list(t.known.values()):
        tensor = reference()
        if tensor is None or tensor is target:
            continue
        shares = its is not None and storage_of(its) == here
        if shares != (id(tensor) in same):
            return False
        if shares and (
            _place(its) != _place(tensor) or its.storage_offset() - tensor.storage_offset() != shift
        ):
            return False
    return True


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.size()), tuple(tensor.stride())
