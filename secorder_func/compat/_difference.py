"""Gradients of a closure at other values of its parameters, for finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from secorder_func.compat._arguments import Leaves
from secorder_func.compat._visibility import (
    Unused,
    no_dependence,
    reached_from,
    refuse_hidden,
    with_unused_known,
)
from secorder_func.errors import (
    CurvatureFallbackWarning,
    HiddenParameterError,
    message,
    warn_user,
)
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.cut_graphs import history
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.finite_difference import central_difference
from secorder_func.transforms.loss import checked_scalar
from secorder_func.transforms.plain_autograd import gradients, or_zeros

__all__ = ["closure_difference", "other_data"]

Func = Callable[[], Tensor]


def closure_difference(
    func: Func, params: Leaves, vector: Leaves, *, num_steps: int, damping: float, where: str
) -> Leaves:
    """Return the central differences of a closure's gradient along `vector`, plus `damping * vector`."""
    point = tuple(p.detach() for p in params)
    vector = tuple(leaf.detach() for leaf in vector)

    def along(gradient: Callable[[Leaves], Leaves]) -> Leaves:
        return central_difference(gradient, point, vector, num_steps=num_steps, damping=damping)

    def exchanging(unused: Unused) -> Leaves:
        return along(lambda at: _gradient_exchanged(func, params, at, unused, where))

    state = RandomState.now(params)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            found = with_unused_known(func, params, exchanging, where)
        except HiddenParameterError as hidden:
            state.restore()
            found = along(lambda at: _gradient_in_place(func, params, at, where))
            warn_user(
                message(
                    where,
                    f"{hidden}. The data of the parameters were set aside during the evaluations instead",
                    "Do not use these parameters in other threads meanwhile",
                ),
                CurvatureFallbackWarning,
            )
    return tuple(leaf.detach() for leaf in found)


def _gradient_exchanged(
    func: Func, params: Leaves, at: Leaves, unused: Unused, where: str
) -> Leaves:
    """Return the gradient with stand-ins in the place of the parameters.

    The backward pass, too, runs under the exchange: activation checkpointing evaluates its segment again in it.
    """
    at = tuple(leaf.detach().requires_grad_() for leaf in at)
    exchange = list(zip(params, at, strict=True))

    def gradient(rules: SecondOrderRules) -> Leaves:
        loss = checked_scalar(func(), where)
        refuse_hidden(params, unused)(rules, loss)
        if not loss.requires_grad:
            raise no_dependence(where)
        return or_zeros(gradients([loss], at), at)

    return evaluated(gradient, forward=False, higher=False, exchange=exchange, protect=at)


def _gradient_in_place(func: Func, params: Leaves, at: Leaves, where: str) -> Leaves:
    """Return the gradient with other data in the parameters themselves, which get their own back."""
    if any(p.grad_fn is not None for p in params):
        raise HiddenParameterError(
            message(
                where,
                "a parameter that is computed from others cannot be moved inside the closure",
                "Pass the tensors that it is computed from, or use exact_hvp",
            )
        )
    mark = torch.zeros((), requires_grad=True).clone().grad_fn

    def gradient(rules: SecondOrderRules) -> Leaves:
        loss = checked_scalar(func(), where)
        if not loss.requires_grad:
            raise no_dependence(where)
        old = [
            node
            for node in history([loss.grad_fn])
            if getattr(node, "variable", None) is None and node._sequence_nr() < mark._sequence_nr()  # type: ignore[union-attr]
        ]
        if reached_from(old, params):
            raise HiddenParameterError(
                message(
                    where,
                    "a part of the loss was computed before the closure ran, so it does not move with params",
                    "Compute the whole loss inside the closure, or use exact_hvp",
                )
            )
        return or_zeros(gradients([loss], params), params)

    with other_data(params, at):
        found = evaluated(gradient, forward=False, higher=False, protect=params)
    return tuple(leaf.clone() for leaf in found)


@contextmanager
def other_data(params: Leaves, at: Leaves) -> Iterator[None]:
    """Let the parameters hold other data inside; their own storage is never written to."""
    own = [p.data for p in params]
    try:
        for p, other in zip(params, at, strict=True):
            p.data = other.detach().clone()
        yield
    finally:
        for p, data in zip(params, own, strict=True):
            p.data = data
