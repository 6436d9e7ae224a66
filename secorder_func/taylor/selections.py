"""Functions that select entries: the term is taken from where the value was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secorder_func.taylor.norms import unreduced
from secorder_func.taylor.products import total
from secorder_func.taylor.registry import Terms, forms, tangent

__all__: list[str] = []


def _selected(name: str, chosen: Callable[[Tensor, Any], Tensor], ties: bool) -> None:
    """Register a function that takes one of two entries, of equal ones half of each as torch does."""

    @tangent(*forms(name), kind="selection")
    def push(t: Terms, out: Tensor, input: Tensor, other: Any) -> Any:
        x, y = t(input), t(other)
        share = chosen(input, other).to(out.dtype)
        if ties:
            share = torch.where(input == other, 0.5, share)
        return total(None if x is None else x * share, None if y is None else y * (1 - share))


_selected("maximum", torch.ge, ties=True)
_selected("minimum", torch.le, ties=True)
_selected("fmax", lambda a, b: (a >= b) | b.isnan(), ties=False)
_selected("fmin", lambda a, b: (a <= b) | b.isnan(), ties=False)


@tangent(*forms("max", "min"), kind="selection")
def _max(t: Terms, out: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        share = torch.where(input == other, 0.5, (out == input).to(out.dtype))
        x, y = t(input), t(other)
        return total(None if x is None else x * share, None if y is None else y * (1 - share))
    if isinstance(out, Tensor):  # of all entries: equal ones share
        return _shared(t, out, input, None, False)
    dim = args[0] if args else kwargs["dim"]
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    return _taken(t(input), out[1], dim, keepdim), None


def _taken(term: Any, indices: Tensor, dim: int, keepdim: bool) -> Any:
    """Return the term at what was chosen along a dimension."""
    if term.ndim == 0:
        return term
    if keepdim:
        return term.gather(dim, indices)
    return term.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


def _shared(t: Terms, out: Tensor, input: Tensor, dim: Any, keepdim: bool) -> Any:
    """Return the mean of the terms of all entries that are the largest, or smallest."""
    if not input.ndim:
        return t(input)
    dims = tuple(range(input.ndim)) if dim is None or dim == () else dim
    hits = (input == unreduced(out, input, dim, keepdim)).to(input.dtype)
    weights = hits / hits.sum(dims, keepdim=True)
    return (t(input) * weights).sum(dims, keepdim)


@tangent(*forms("amax", "amin"), kind="selection")
def _amax(t: Terms, out: Tensor, input: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    return _shared(t, out, input, dim, keepdim)


def _chosen(*names: str) -> None:
    """Register functions that return values and their indices along a dimension, all of one shape."""

    @tangent(*forms(*names), kind="selection")
    def push(t: Terms, out: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        term, indices = t(input), out[1]
        dim = _dim_of(names[0], args, kwargs)
        assert term is not None
        if term.ndim == 0:
            return term, None
        if indices.ndim == term.ndim:
            return term.gather(dim, indices), None
        return term.gather(dim, indices.unsqueeze(dim)).squeeze(dim), None


def _dim_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    place = {"topk": 1, "kthvalue": 1}.get(name, 0)
    if "stable" in kwargs and name == "sort":
        return int(kwargs.get("dim", -1))
    return int(kwargs.get("dim", args[place] if len(args) > place else -1))


_chosen("sort", "cummax", "cummin", "mode")
_chosen("topk")
_chosen("kthvalue")


@tangent(*forms("msort"), kind="selection")
def _msort(t: Terms, out: Tensor, input: Tensor) -> Any:
    term = t(input)
    assert term is not None
    return term if not term.ndim else term.gather(0, input.sort(dim=0, stable=True)[1])


@tangent(*forms("median", "nanmedian"), kind="selection")
def _median(t: Terms, out: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(out, Tensor):
        return _shared(t, out, input, None, False)
    dim = kwargs.get("dim", args[0] if args else -1)
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    return _taken(t(input), out[1], dim, keepdim), None
