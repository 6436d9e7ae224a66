"""The table of rules: how the first-order term passes through a torch function.

A rule is of a kind. What is linear passes the term through the function itself; for the rest the rule is a few lines
that return the term of the output from those of the arguments:

    @tangent(torch.exp, torch.Tensor.exp, kind="elementwise")
    def _exp(t, out, input):
        return t(input) * out

`t(x)` is the term of `x`, None where it is zero. The term of an output has its shape and dtype; a rule may leave
broadcasting and casting to the propagation. Rules see one vector: for a chunk they are mapped over its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.errors import ArgumentTypeError, NoExactRouteError, message
from secorder_func.rules.registry import REPAIRS

__all__ = [
    "IN_PLACE",
    "RULES",
    "Kind",
    "NotCoveredError",
    "NotPropagatedError",
    "Rule",
    "Terms",
    "forms",
    "jointly_linear",
    "linear",
    "repaired",
    "tangent",
    "together",
    "written",
    "written_by_repair",
]

Kind = Literal[
    "linear",
    "selection",
    "bilinear",
    "elementwise",
    "symmetric",
    "closed",
    "written",
    "constant",
    "general",
]
_F = TypeVar("_F", bound=Callable[..., Any])


class NotPropagatedError(NoExactRouteError):
    """A function of the loss has no rule, or hides its tensors from them."""


class NotCoveredError(NotPropagatedError):
    """A rule does not cover the arguments that it was given."""


def written_by_repair(*args: Any, **kwargs: Any) -> Any:
    """Stand for what the rules of second order write a function out of."""
    raise NotImplementedError


class Terms(Protocol):
    """What a rule may know: the first-order term of a tensor, None where it is zero."""

    def __call__(self, x: Any, /) -> Any:
        """Return the first-order term of `x`."""

    def or_zeros(self, x: Tensor, /) -> Tensor:
        """Return the first-order term of `x`, zeros where it is zero."""

    def summed(self, fresh: Tensor, other: Tensor, /) -> Tensor:
        """Return the sum, in the memory of the first, which nobody else has, where that can be."""


@dataclass(frozen=True)
class Rule:
    """One entry of the table.

    Attributes
    ----------
    kind
        What the function is, as for `tangent`.
    push
        `(t, out, *args, **kwargs) -> term of out`; for what is written out of other functions
        `(*args, **kwargs) -> out`, to be evaluated under the propagation; for what is evaluated together with its term
        `(*args, **kwargs) -> (out, t -> term of out)`.
    by_output
        Whether the rule needs the output and terms only, so that the function may overwrite its argument.
    together
        Whether the function is evaluated by the rule, which needs what comes with the output.
    beyond
        What to evaluate under the propagation where the term is differentiated more than once, if it may not be.
    """

    kind: Kind
    push: Callable[..., Any]
    by_output: bool = False
    together: bool = False
    beyond: Callable[..., Any] | None = None


_C: Any = torch._C
_BELOW = (_C._VariableFunctions, _C._nn, _C._linalg)
"""Where functions written in Python find those that they call."""

RULES: dict[Any, Rule] = {}
"""Torch function -> its rule."""

IN_PLACE: dict[Any, Any] = {}
"""Function that writes its first argument -> the function that it then is of it."""


def forms(*names: str) -> list[Any]:
    """Return all functions of torch with these names: functions, methods and operators that do not write."""
    places = (torch, torch.Tensor, torch.special, torch.linalg, F, *_BELOW)
    found = [
        getattr(place, name)
        for name in names
        for place in places
        if callable(getattr(place, name, None))
    ]
    return list(dict.fromkeys(found))


def _register(functions: Sequence[Any], rule: Rule) -> None:
    if not functions:
        mend = "Name the functions that the rule is for: @taylor.tangent(function)"
        raise ValueError(
            message("taylor", "a rule must be for at least one function, got none", mend)
        )
    if rule.kind not in get_args(Kind):
        known = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(message("taylor", f"kind must be one of {known}, got {rule.kind!r}"))
    for function in dict.fromkeys(functions):
        if not callable(function):
            problem = f"functions must be callable, got {type(function).__name__}"
            raise ArgumentTypeError(message("taylor", problem))
        if function in RULES:
            problem = f"{function} would have two rules"
            raise ValueError(message("taylor", problem, "Give a rule to a function without one"))
        RULES[function] = rule
        name = getattr(function, "__name__", "")
        for place in (torch, torch.Tensor, F):
            writes = getattr(place, name + "_", None)
            if name and not name.startswith("__") and writes is not None:
                IN_PLACE.setdefault(writes, function)


def tangent(*functions: Any, kind: Kind = "closed", by_output: bool = False) -> Callable[[_F], _F]:
    """Register the decorated `(t, out, *args, **kwargs) -> term of out` for torch `functions`.

    Parameters
    ----------
    functions
        What the loss calls: a function of torch, or one of your own that `torch.overrides.wrap_torch_function` shows to
        modes. One that has a rule is refused.
    kind
        What the function is. Second-order terms rely on it: what is `"linear"` or a `"selection"` (piecewise linear)
        has no second derivative, and what is `"elementwise"` in one tensor is differentiated entry by entry.
    by_output
        As for `Rule`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp, taylor
    >>> @torch.overrides.wrap_torch_function(lambda x: (x,))
    ... def cube(x):
    ...     return Cube.apply(x)  # an autograd.Function, whose inside nobody sees
    >>> class Cube(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x**3
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return 3 * ctx.saved_tensors[0] ** 2 * g
    >>> @taylor.tangent(cube, kind="elementwise")
    ... def _cube(t, out, x):
    ...     return 3 * x**2 * t(x)
    >>> p = torch.tensor([1.0, 2.0])
    >>> hvp(lambda p: cube(p).sum(), mode="reverse_over_forward")(p, torch.ones(2))
    tensor([ 6., 12.])
    """

    def register(push: _F) -> _F:
        _register(functions, Rule(kind, push, by_output))
        return push

    return register


def together(
    *functions: Any, kind: Kind = "closed", beyond: Callable[..., Any] | None = None
) -> Callable[[_F], _F]:
    """Register the decorated `(*args, **kwargs) -> (out, t -> term of out)`, which evaluates `functions` as well.

    Parameters
    ----------
    functions, kind
        As for `tangent`.
    beyond
        As for `Rule`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp, taylor
    >>> @torch.overrides.wrap_torch_function(lambda x: (x,))
    ... def grown(x):
    ...     return x.exp()
    >>> @taylor.together(grown, kind="elementwise")
    ... def _grown(x):
    ...     out = x.exp()  # which its term needs, too
    ...     return out, lambda t: out * t(x)
    >>> hvp(lambda p: grown(p).sum(), mode="reverse_over_forward")(torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """

    def register(evaluate: _F) -> _F:
        _register(functions, Rule(kind, evaluate, together=True, beyond=beyond))
        return evaluate

    return register


def written(*functions: Any) -> Callable[[_F], _F]:
    """Register the decorated function, which computes the same as `functions` out of such that have rules.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp, taylor
    >>> @torch.overrides.wrap_torch_function(lambda x: (x,))
    ... def squared(x):
    ...     return x * x
    >>> @taylor.written(squared)
    ... def _squared(x):
    ...     return x**2
    >>> hvp(lambda p: squared(p).sum(), mode="reverse_over_forward")(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    def register(body: _F) -> _F:
        _register(functions, Rule("written", body))
        return body

    return register


def linear(*functions: Any) -> None:
    """Register functions that are linear in their first argument, the others being constants.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp, taylor
    >>> @torch.overrides.wrap_torch_function(lambda x: (x,))
    ... def halved(x):
    ...     return x / 2
    >>> taylor.linear(halved)
    >>> hvp(lambda p: halved(p).square().sum(), mode="reverse_over_forward")(torch.ones(2), torch.ones(2))
    tensor([0.5000, 0.5000])
    """
    for function in functions:
        _register([function], Rule("linear", _through(function), by_output=True))


def _through(function: Any) -> Callable[..., Any]:
    like_another = getattr(function, "__name__", "").endswith("_as")

    def push(t: Terms, out: Any, *args: Any, **kwargs: Any) -> Any:
        if not args:
            raise NotCoveredError("arguments by name only")
        for other in (*args[1:], *kwargs.values()):
            if isinstance(other, Tensor) and not like_another and t(other) is not None:
                raise NotCoveredError("it is not linear in both")
        term = t(args[0])
        return None if term is None else repaired(t, function)(term, *args[1:], **kwargs)

    return push


def jointly_linear(*functions: Any, indexed: bool = False) -> None:
    """Register functions that are linear in all their tensors together, in lists and tuples too.

    With `indexed`, tensors of integers and booleans are indices and masks; else they are numbers, too.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp, taylor
    >>> @torch.overrides.wrap_torch_function(lambda x, y: (x, y))
    ... def joined(x, y):
    ...     return torch.cat([x, y])
    >>> taylor.jointly_linear(joined)
    >>> hvp(lambda p: joined(p, 2 * p).square().sum(), mode="reverse_over_forward")(torch.ones(2), torch.ones(2))
    tensor([10., 10.])
    """
    for function in functions:
        _register([function], Rule("linear", _through_all(function, indexed), by_output=True))


def _through_all(function: Any, indexed: bool) -> Callable[..., Any]:
    def push(t: Terms, out: Any, *args: Any, **kwargs: Any) -> Any:
        terms = {key: _terms_of(t, value, indexed) for key, value in kwargs.items()}
        return repaired(t, function)(*_terms_of(t, args, indexed), **terms)

    return push


def repaired(t: Any, function: Any) -> Any:
    """Return a function as the rules of second order have it."""
    repair = REPAIRS.get(function)
    return function if repair is None else partial(repair.apply, t)


def _terms_of(t: Terms, value: Any, indexed: bool) -> Any:
    """Return an argument with its tensors exchanged for their terms, zeros where these are missing."""
    if isinstance(value, Tensor):
        if indexed and not (value.is_floating_point() or value.is_complex()):
            return value
        return t.or_zeros(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_terms_of(t, item, indexed) for item in value)
    return value
