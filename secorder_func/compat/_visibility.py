"""Which parameters of a closure can be exchanged for other values, and which hide.

A parameter hides where no torch function of the closure is given it: inside a ScriptModule or a custom
`autograd.Function`, in a loss computed before the closure ran, in another thread. It shows in the loss: the parameter
was never met although the loss depends on it, or the loss has an autograd history that reaches the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.compat._arguments import Leaves
from secorder_func.errors import ArgumentError, HiddenParameterError, message
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.cut_graphs import history
from secorder_func.rules.levels import unwrapped
from secorder_func.rules.randomness import RandomState

__all__ = ["NoDependenceError", "no_dependence", "reached", "refuse_hidden", "with_unused_known"]

T = TypeVar("T")

Unused = frozenset[int] | None
"""Parameters known to be unused, by index; None before that was asked."""


class _UnmetParameters(Exception):  # noqa: N818 - a signal, not an error
    """The closure met no torch function with some parameters: unused or hidden."""


class NoDependenceError(ArgumentError):
    """The loss is a constant in the parameters."""


def with_unused_known(
    evaluate: Callable[[], Any], params: Leaves, attempt: Callable[[Unused], T], where: str
) -> T:
    """Return `attempt(None)`, or, if it meets a parameter nowhere, attempt again with the unused ones named.

    One plain evaluation tells unused from hidden parameters.
    """
    state = RandomState.now(params)
    try:
        return attempt(None)
    except _UnmetParameters:
        state.restore()
        with torch.enable_grad():
            outputs = evaluated(
                lambda rules: tree.tensors_in(evaluate()),
                forward=False,
                higher=False,
                protect=params,
            )
        unused = frozenset(range(len(params))) - reached(outputs, params)
        if len(unused) == len(params):
            raise no_dependence(where) from None
        state.restore()
        return attempt(unused)


def no_dependence(where: str) -> NoDependenceError:
    """Return the error that the loss is a constant."""
    return NoDependenceError(
        message(
            where, "the loss does not depend on any parameter", "Check what the closure returns"
        )
    )


def refuse_hidden(params: Leaves, unused: Unused) -> Callable[..., None]:
    """Return the check of one evaluation: every parameter was met, and no output's history reaches one."""
    dependent = _dependent(params)

    def verify(rules: SecondOrderRules, *outputs: Tensor) -> None:
        if dependent is not None:
            raise HiddenParameterError(
                f"params[{dependent}] is computed from another parameter, with which it cannot be exchanged"
            )
        missed = [i for i, p in enumerate(params) if id(p) not in rules.seen]
        if missed and unused is None:
            raise _UnmetParameters
        hidden = sorted({*missed} - (unused or frozenset())) or sorted(reached(outputs, params))
        if hidden:
            raise HiddenParameterError(
                f"the closure reaches params[{hidden[0]}] by a path on which it cannot be exchanged"
            )

    return verify


def _dependent(params: Leaves) -> int | None:
    """Return a parameter that is computed from another one in the list, by index."""
    for index, leaf in enumerate(params):
        if leaf.grad_fn is not None and reached_from([leaf.grad_fn], params) - {index}:
            return index
    return None


def reached(outputs: Iterable[Tensor], params: Leaves) -> frozenset[int]:
    """Return which parameters are in the plain autograd history of the outputs."""
    bases = [unwrapped(output) for output in outputs]
    return reached_from([base.grad_fn for base in bases if base.grad_fn is not None], params)


def reached_from(roots: Sequence[Any], params: Leaves) -> frozenset[int]:
    """Return which parameters are in the autograd history below these nodes."""
    if not roots:
        return frozenset()
    leaves = {id(p): index for index, p in enumerate(params) if p.grad_fn is None}
    inner = {p.grad_fn: index for index, p in enumerate(params) if p.grad_fn is not None}
    found = set()
    for node in history(roots):
        if node in inner:
            found.add(inner[node])
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            found.add(leaves[id(variable)])
    return frozenset(found)
