"""The table of closed second-order rules: how first- and second-order terms pass through a torch function.

A rule is `(t, out, *args, **kwargs) -> (first, second)`. `t(x)` is the stack of first-order terms of `x`, one for each
of K vectors, shape `(K, *x.shape)`; `t.second(x)` the sums of second-order terms over each of J groups of vectors,
shape `(J, *x.shape)`. None is zero, and with `t.only_first` the second may be left out. For `y = f(x)` and the vectors
of one group

    first_k = f'(x) x1_k            second = f'(x) x2 + sum over k of f''(x)[x1_k, x1_k].

A function without a closed rule has both terms derived from its first-order rule, see `derived`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

__all__ = ["CLOSED", "WRITTEN", "Jets", "aligned", "closed", "curved", "rewritten"]

_F = TypeVar("_F", bound=Callable[..., Any])
Pair = tuple[Any, Any]


class Jets(Protocol):
    """What a second-order rule may know."""

    groups: int
    only_first: bool

    def __call__(self, x: Any, /) -> Any:
        """Return the first-order terms of `x`, None where they are zero."""

    def second(self, x: Any, /) -> Any:
        """Return the second-order terms of `x`, None where they are zero."""

    def partner(self, first: Tensor, /) -> Tensor:
        """Return what each first-order term is multiplied with: itself, but for forms of two vectors the other's."""

    def gathered(self, each: Tensor, /) -> Tensor:
        """Return the sums over the groups of something with one place a vector."""

    def products(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Return the sums over the groups of `a_k * partner(b)_k`."""

    def contracted(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Return the sums over the groups of the matrix products `a_k @ partner(b)_k`."""


CLOSED: dict[Any, Callable[..., Pair]] = {}
"""Torch function -> its closed rule."""

WRITTEN: dict[Any, Callable[..., Any]] = {}
"""Torch function -> the same out of functions with rules; None from it says that it does not cover the arguments."""


def closed(*functions: Any) -> Callable[[_F], _F]:
    """Register the decorated closed rule for torch `functions`."""

    def register(rule: _F) -> _F:
        for function in dict.fromkeys(functions):
            if function in CLOSED or function in WRITTEN:
                raise ValueError(f"{function} would have two second-order rules")
            CLOSED[function] = rule
        return rule

    return register


def rewritten(*functions: Any) -> Callable[[_F], _F]:
    """Register the decorated function, which is evaluated under the propagation in place of `functions`."""

    def register(body: _F) -> _F:
        for function in dict.fromkeys(functions):
            if function in CLOSED or function in WRITTEN:
                raise ValueError(f"{function} would have two second-order rules")
            WRITTEN[function] = body
        return body

    return register


def curved(t: Jets, input: Tensor, slope: Tensor, curve: Tensor | float | None) -> Pair:
    """Return the terms of a function of each entry, given its first and second derivative."""
    first, second = t(input), t.second(input)
    if second is not None:
        second = second * slope
    if curve is not None and not t.only_first:
        bend = t.products(first, first)
        bend = bend.mul_(curve)
        second = bend if second is None else second.add_(bend)
    return first * slope, second


def aligned(term: Any, x: Any, out: Tensor) -> Any:
    """Return a stack of terms so that it broadcasts as its value does against an output."""
    if term is None:
        return None
    missing = out.ndim - x.ndim
    return term.reshape(term.shape[0], *[1] * missing, *x.shape) if missing > 0 else term
