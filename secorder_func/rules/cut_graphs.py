"""Functions whose declared backward cannot be differentiated, and which torch differentiates wrongly all the same.

A backward marked `once_differentiable` returns constants: what depends on saved tensors is silently missing from a
second derivative. Reentrant checkpointing hides the graph of its segment. Neither has an exact second derivative.
A hook that changes a gradient is another backward that belongs to no function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.autograd.function import once_differentiable

from secorder_func.errors import ArgumentError, NoExactRouteError
from secorder_func.rules.registry import Rules, repairs

__all__ = [
    "History",
    "UnrecordedBackwardError",
    "history",
    "may_fail",
    "refuse_cut_history",
    "refuse_unrecorded_backwards",
]


class UnrecordedBackwardError(NoExactRouteError):
    """A backward of the user's own hides what it computes: torch's transforms would not see it and be wrong."""


_ONCE = once_differentiable(lambda ctx: None).__code__


def _is_once_differentiable(function: Any) -> bool:
    return getattr(getattr(function, "backward", None), "__code__", None) is _ONCE


@repairs(
    custom_function_call, because="once_differentiable backwards give partial second derivatives"
)
def _custom_function_call(rules: Rules, function: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_once_differentiable(function):
        raise NoExactRouteError(_no_second_derivative(function.__name__))
    return custom_function_call(function, *args, **kwargs)


@repairs(
    torch.Tensor.register_hook,
    because="a hook that changes a gradient leaves no function to differentiate: every route gives another number",
)
def _register_hook(rules: Rules, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    def watching(gradient: Tensor) -> None:
        changed = hook(gradient)
        if changed is not None and changed is not gradient:
            raise ArgumentError(
                "A hook in the loss changes a gradient, so that this is the gradient of no function, and no Hessian "
                "exists. Let the hook return None, or write what it does into the loss."
            )

    return tensor.register_hook(hook if torch.compiler.is_compiling() else watching)


def _no_second_derivative(name: str) -> str:
    return f"the backward of {name} is marked once_differentiable, so it has no second derivative"


class History:
    """What the plain autograd history below some nodes is made of, from one walk through it.

    Attributes
    ----------
    custom
        The nodes of functions written in Python, whose backward may call anything.
    kinds
        The names of all nodes.
    oldest
        The lowest sequence number, which nodes are given as they are made.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self.custom: list[Any] = []
        self.kinds: set[str] = set()
        self.oldest = _NEWEST
        self._ends: list[Any] = []
        self._odd: list[Any] = []
        types: set[type] = set()
        seen, stack = set(roots), list(roots)
        while stack:  # as `history` does, in line: it is walked for every product
            node = stack.pop()
            self.oldest = min(self.oldest, node._sequence_nr())
            types.add(type(node))
            if type(node) not in _ORDINARY:
                self._sort_out(node)
            parents = node.next_functions
            if not parents:
                self._ends.append(node)
            for parent, _ in parents:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        self.kinds.update(kind.__name__ for kind in types)

    def _sort_out(self, node: Any) -> None:
        if isinstance(node, _CUSTOM):
            self.custom.append(node)
        elif not _is_ordinary(node):
            self._odd.append(node)
        elif type(node).__name__ != "CppFunction":  # that of all which torch has not registered
            _ORDINARY.add(type(node))

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that no function made."""
        return [node.variable for node in self._ends if hasattr(node, "variable")]

    def refuse_cuts(self) -> None:
        """Raise if a node cannot be differentiated twice."""
        for node in self.custom:
            function = getattr(node, "_forward_cls", None)
            if function is not None and _is_once_differentiable(function):
                raise NoExactRouteError(_no_second_derivative(function.__name__))
            if node.name() == "CheckpointFunctionBackward":
                raise NoExactRouteError(
                    "reentrant activation checkpointing hides the graph of its segment; "
                    "call torch.utils.checkpoint.checkpoint with use_reentrant=False"
                )
            if node.name() == "CompiledFunctionBackward":
                raise NoExactRouteError(
                    "a part of the loss is compiled by torch.compile, whose gradient has no derivative (some backends "
                    "give partial sums, silently). Use the function or module that it was made from"
                )
        if self._odd:
            raise NoExactRouteError("a function of the loss cannot be differentiated twice")


_CUSTOM: Any = torch.autograd.function.BackwardCFunction
_NEWEST = 2**64 - 1
_ORDINARY: set[type] = set()
"""Types of nodes met before that torch differentiates twice, as almost all are."""


def _is_ordinary(node: Any) -> bool:
    return node.name() not in ("torch::autograd::Error", "DelayedErrorBackward", "Error")


def refuse_cut_history(roots: Sequence[Any]) -> None:
    """Raise if a plain autograd history passes a node that cannot be differentiated twice."""
    History(roots).refuse_cuts()


@contextmanager
def refuse_unrecorded_backwards(nodes: Sequence[Any]) -> Iterator[bool]:
    """Raise if a backward of the user's own returns a constant for a cotangent that is to be differentiated.

    It computes with detached tensors or outside of torch, so that a second derivative would silently miss it. Yields
    whether there are such functions at all: their cotangents must then be nonzero and require gradients.
    """

    def check(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        if not any(g is not None and g.requires_grad for g in outputs):
            return
        if any(g is not None and not g.requires_grad and bool(g.any()) for g in inputs):
            raise UnrecordedBackwardError(
                "the backward of a custom autograd.Function is not recorded by autograd (it detaches what it is given, "
                "or computes outside of torch), so it has no second derivative"
            )

    handles = [node.register_hook(check) for node in nodes]
    try:
        yield bool(nodes)
    finally:
        for handle in handles:
            handle.remove()


def may_fail(roots: Sequence[Any]) -> bool:
    """Say whether a backward pass from here may raise: it meets a node without a derivative, or one of the user's."""
    return any(
        "NotImplemented" in node.name()
        or "Error" in node.name()
        or isinstance(node, torch.autograd.function.BackwardCFunction)
        for node in history(roots)
    )


def history(roots: Sequence[Any]) -> Iterator[torch.autograd.graph.Node]:
    """Yield every node of the autograd history below `roots` once."""
    seen, stack = set(roots), list(roots)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
