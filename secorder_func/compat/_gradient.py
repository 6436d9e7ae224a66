"""The gradient of a closure in its parameters where they are, with or without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secorder_func.compat._arguments import Leaves
from secorder_func.compat._visibility import no_dependence
from secorder_func.errors import ArgumentError, NoExactRouteError, message
from secorder_func.rules.cut_graphs import refuse_cut_history
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import checked_scalar
from secorder_func.transforms.plain_autograd import PlainEvaluation, gradients, or_zeros, recording

__all__ = [
    "check_real",
    "closure_gradient",
    "closure_gradient_with_graph",
    "dense",
    "freed",
    "traceable",
]

Func = Callable[[], Any]


@contextmanager
def freed(params: Iterable[Tensor]) -> Iterator[None]:
    """Let frozen parameters require gradients inside, so that autograd shows every path to them."""
    frozen = [p for p in params if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def closure_gradient(func: Func, params: Leaves, where: str, *, create_graph: bool) -> Leaves:
    """Return the gradient of a loss in `params`, which require gradients; zeros for those that it does not use.

    With `create_graph` every leaf has a history that reaches its parameter, and derivatives of it are right or refused
    with a `NoExactRouteError`.
    """
    evaluation = PlainEvaluation(
        lambda: (checked_scalar(func(), where),), params, create_graph=create_graph
    )
    (loss,) = evaluation.outputs
    if not loss.requires_grad:
        raise no_dependence(where)
    if create_graph:
        evaluation.history.refuse_cuts()
    with evaluation.differentiating():
        # The graph is kept: a part of it may be the user's.
        found = gradients([loss], params, create_graph=create_graph, retain_graph=True)
        if all(g is None for g in found):
            raise no_dependence(where)
        if not create_graph:
            return dense(found, params)
        refuse_cut_history([g.grad_fn for g in found if g is not None and g.requires_grad])
        pairs = zip(dense(found, params), params, strict=True)
        return tuple(traceable(g, p) for g, p in pairs)


def closure_gradient_with_graph(func: Func, params: Leaves, where: str) -> Leaves:
    """Do the same with a graph, but where no exact derivative exists refuse no sooner than one is taken."""
    state = RandomState.now(params)
    try:
        return closure_gradient(func, params, where, create_graph=True)
    except NoExactRouteError as error:
        cause = str(error)
    state.restore()
    values = closure_gradient(func, params, where, create_graph=False)
    with recording():
        final: Any = _Final.apply
        return tuple(final(cause, g, p) for g, p in zip(values, params, strict=True))


def dense(found: Sequence[Tensor | None], params: Leaves) -> Leaves:
    """Return gradients without gaps: zeros for missing ones, and those of sparse embeddings in full."""
    return tuple(g.to_dense() for g in or_zeros(found, params))


def traceable(value: Tensor, param: Tensor) -> Tensor:
    """Return a constant with a history that reaches `param`, with derivative zero; anything else as it is."""
    if value.requires_grad:
        return value
    never = torch.zeros((), dtype=torch.bool, device=value.device)
    with recording():
        return torch.where(never, param, value)  # 0 * param would be NaN for an infinite parameter


def check_real(params: Leaves, where: str) -> None:
    """Refuse complex parameters, for which the square of a gradient is no curvature."""
    for index, leaf in enumerate(params):
        if leaf.is_complex():
            raise ArgumentError(
                message(
                    where,
                    f"the parameters must be real, params[{index}] is {leaf.dtype}",
                    "Make its real and imaginary part parameters of their own, with torch.view_as_real",
                )
            )


class _Final(torch.autograd.Function):
    """A value whose derivative does not exist: taking it raises the reason."""

    @staticmethod
    def forward(ctx: Any, cause: str, value: Tensor, param: Tensor) -> Tensor:
        ctx.cause = cause
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise NoExactRouteError(ctx.cause)
