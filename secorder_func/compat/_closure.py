"""The exact products of a zero-argument closure.

A single product is double backward on the parameters where they are. For several with one matrix the closure becomes a
pure function: it runs under the library's rules with every parameter exchanged, by identity, for the value at which it
is differentiated. A parameter that hides from the exchange leads back to double backward; never to zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secorder_func.algorithms.diagonal import exact_diagonal
from secorder_func.compat._arguments import Leaves
from secorder_func.compat._gradient import traceable
from secorder_func.compat._visibility import (
    Unused,
    no_dependence,
    refuse_hidden,
    with_unused_known,
)
from secorder_func.errors import ArgumentError, message
from secorder_func.operators import LinearOperator
from secorder_func.operators.chunks import default_chunk_size
from secorder_func.operators.curvature import operator_on_leaves, pulled_back
from secorder_func.operators.forms import Forms
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.randomness import RandomState
from secorder_func.taylor import NotPropagatedError
from secorder_func.transforms.double_backward import DoubleBackward
from secorder_func.transforms.forms import forms_of_loss
from secorder_func.transforms.gauss_newton import (
    FlatModel,
    ggn_forward,
    ggn_propagated,
    ggn_pullbacks,
)
from secorder_func.transforms.loss import FlatLoss, checked_scalar
from secorder_func.transforms.plain_autograd import recording
from secorder_func.transforms.plain_jacobian import GGNDoubleBackward
from secorder_func.transforms.policy import first_exact, in_transform
from secorder_func.transforms.propagated import by_propagation

__all__ = [
    "forms_operator_of",
    "gauss_newton",
    "hessian_diagonal_of",
    "hessian_operator_of",
    "hessian_product",
    "plain_product",
]

Func = Callable[[], Tensor]


def _bound(func: Func, params: Leaves, unused: Unused, where: str) -> FlatLoss:
    """Bind a closure, so that it can be evaluated at other values of `params`."""
    refuse = refuse_hidden(params, unused)

    def verify(rules: SecondOrderRules, loss: Tensor) -> None:
        refuse(rules, loss)
        if not loss.requires_grad:  # at the level that takes the gradient
            raise no_dependence(where)

    return FlatLoss(
        evaluate=lambda leaves: func(),
        leaves=tuple(p.detach() for p in params),
        unflatten=tuple,
        has_aux=False,
        where=where,
        originals=params,
        verify=verify,
    )


def hessian_product(
    func: Func, params: Leaves, vector: Leaves, *, create_graph: bool, where: str
) -> Leaves:
    """Return the exact product `H v`.

    By a backward pass over our own forward propagation where it covers the loss, else by double backward, which is also
    the faster where overhead is all. What torch.compile made has no second derivative there, and is seen through by
    the pullback of the gradient.
    """
    if create_graph:
        return plain_product(func, params, where, create_graph=True)(vector)
    vector = tuple(leaf.detach() for leaf in vector)
    routes = [
        ("double_backward", lambda: plain_product(func, params, where)(vector)),
        ("reverse_over_reverse", lambda: _pullback_of(func, params, where)(vector)),
    ]
    if sum(p.numel() for p in params) >= _LARGE and not in_transform():
        routes.insert(0, ("reverse_over_forward", lambda: _propagated(func, params, vector, where)))
    _, product = first_exact(
        routes,
        where=where,
        tensors=params,
        eager=_eagerly(func, params),
    )
    return tuple(leaf.detach() for leaf in product)


_LARGE = 4096
"""Parameters from which on a product is bound by arithmetic: below, a double backward has the least overhead."""


def _propagated(func: Func, params: Leaves, vector: Leaves, where: str) -> Leaves:
    """Return the product by our own forward propagation and one backward pass."""

    def verify(rules: SecondOrderRules, loss: Tensor) -> None:
        if not (rules.seen and loss.requires_grad):
            raise NotPropagatedError("the loss does not depend on what is exchanged")

    loss = replace(_bound(func, params, frozenset(), where), verify=verify)
    return by_propagation(loss, vector, closed=True, differentiable=False)[0]


def hessian_operator_of(
    func: Func, params: Leaves, *, create_graph: bool, where: str
) -> LinearOperator:
    """Return the Hessian of a closure as an operator on tuples of tensors; it is evaluated once."""
    if create_graph:
        return _double_backward_operator(func, params, where, create_graph=True)

    def reverse() -> LinearOperator:
        product = _pullback_of(func, params, where)
        at = tuple(p.detach() for p in params)
        return operator_on_leaves(product, at, mode="reverse_over_reverse")

    def plain() -> LinearOperator:
        op = _double_backward_operator(func, params, where, create_graph=False)
        op @ tuple(torch.zeros_like(p) for p in params)  # fails here if it fails at all
        return op

    _, op = first_exact(
        [("reverse_over_reverse", reverse), ("double_backward", plain)],
        where=where,
        tensors=params,
        eager=_eagerly(func, params),
    )
    return op


def forms_operator_of(
    func: Func, params: Leaves, *, create_graph: bool, where: str
) -> LinearOperator:
    """Return the same operator, whose product is not made until it is asked for: its forms may need none."""
    if create_graph or in_transform():
        return hessian_operator_of(func, params, create_graph=create_graph, where=where)
    at = tuple(p.detach() for p in params)

    def compute(draws: Any, count: int, groups: int) -> tuple[Tensor, int]:
        def attempt(unused: Unused) -> tuple[Tensor, int]:
            return forms_of_loss(_bound(func, params, unused, where), draws, count, groups)

        return with_unused_known(func, params, attempt, where)

    made: list[LinearOperator] = []

    def op() -> LinearOperator:
        if not made:
            made.append(hessian_operator_of(func, params, create_graph=False, where=where))
        return made[0]

    return LinearOperator(
        matvec=lambda v: op() @ v,
        like=at,
        matmat=lambda vectors: op().mm(vectors, chunk_size=None),
        forms=Forms(compute, at),
    )


def hessian_diagonal_of(
    func: Func, params: Leaves, *, create_graph: bool, where: str, strict: bool = False
) -> Leaves:
    """Return the diagonal of the Hessian of a closure, which is evaluated once; zeros for unused parameters.

    By double backward block by block: a product with the block of one parameter leaves out all the others.
    """

    def blocks() -> Leaves:
        product = plain_product(func, params, where, create_graph=create_graph)
        if strict:
            _refuse_unused(product, where)
        return tuple(_block_diagonal(product, index) for index in range(len(params)))

    def whole() -> Leaves:
        op = hessian_operator_of(func, params, create_graph=False, where=where)
        return exact_diagonal(op)  # type: ignore[no-any-return]

    routes = [("double_backward", blocks)]
    if not (create_graph or strict):
        routes.append(("reverse_over_reverse", whole))
    _, found = first_exact(routes, where=where, tensors=params, eager=_eagerly(func, params))
    if create_graph:
        return tuple(traceable(h, p) for h, p in zip(found, params, strict=True))
    return found


def _block_diagonal(product: DoubleBackward, index: int) -> Tensor:
    like = product.params[index]
    op = LinearOperator(
        matvec=lambda v: product.block(index, v[None])[0],
        like=like.detach(),
        matmat=lambda vectors: product.block(index, vectors),
    )
    entries: Tensor = exact_diagonal(op, chunk_size=default_chunk_size(like.numel(), at_most=128))
    return entries


def _refuse_unused(product: DoubleBackward, where: str) -> None:
    for index, gradient in enumerate(product.gradient):
        if gradient is None:
            raise ArgumentError(
                message(
                    where,
                    f"strict=True, and the loss does not use params[{index}]",
                    "Leave it out of params, or pass strict=False",
                )
            )


def _pullback_of(func: Func, params: Leaves, where: str) -> Callable[[Leaves], Leaves]:
    """Return the product as the pullback of the gradient, made once."""

    def attempt(unused: Unused) -> Callable[[Leaves], Leaves]:
        loss = _bound(func, params, unused, where)
        return pulled_back(loss.at(forward=False, higher=False), loss.leaves, False)

    with torch.enable_grad():  # a hidden parameter shows in the history of the loss
        return with_unused_known(func, params, attempt, where)


def _eagerly(func: Func, params: Leaves) -> Callable[[], object]:
    """Return the plain evaluation of a closure, for the errors of the user's own functions."""
    return lambda: evaluated(lambda rules: func(), forward=False, higher=False, protect=params)


def plain_product(
    func: Func, params: Leaves, where: str, *, create_graph: bool = False
) -> DoubleBackward:
    """Return the product by plain autograd, in the parameters where they are."""

    def evaluate() -> Tensor:
        loss = checked_scalar(func(), where)
        if not loss.requires_grad:
            raise no_dependence(where)
        return loss

    product = DoubleBackward(evaluate, params, create_graph=create_graph)
    if all(g is None for g in product.gradient) and not _are_used(func, params):
        raise no_dependence(where)
    return product


def _are_used(func: Func, params: Leaves) -> bool:
    """Say whether a torch function of the closure is given one of the parameters."""

    def evaluate(rules: SecondOrderRules) -> bool:
        func()
        return bool(rules.seen)

    with RandomState.now(params).replayed(), recording():
        return evaluated(
            evaluate, forward=False, higher=False, exchange=[(p, p) for p in params], protect=params
        )


def _double_backward_operator(
    func: Func, params: Leaves, where: str, *, create_graph: bool
) -> LinearOperator:
    product = plain_product(func, params, where, create_graph=create_graph)
    return LinearOperator(
        matvec=product, like=params, matmat=product.several, mode="double_backward"
    )


def gauss_newton(
    output: Callable[[], Any],
    loss_of: Callable[[Any], Tensor],
    params: Leaves,
    vector: Leaves,
    *,
    create_graph: bool,
    where: str,
) -> Leaves:
    """Return the exact product `J^T H_L J v` for the output of a closure and a loss of it."""
    if create_graph:
        return GGNDoubleBackward(output, loss_of, params, where, create_graph=True)(vector)
    vector = tuple(leaf.detach() for leaf in vector)

    def attempt(unused: Unused) -> Leaves:
        model = FlatModel(
            model=lambda leaves: output(),
            loss=loss_of,
            leaves=tuple(p.detach() for p in params),
            unflatten=tuple,
            where=where,
            originals=params,
            verify=refuse_hidden(params, unused),
        )

        def reverse() -> Leaves:
            apply = ggn_pullbacks(model, higher=False)
            with torch.no_grad():
                return apply(vector)

        def plain() -> Leaves:
            return GGNDoubleBackward(output, loss_of, params, where)(vector)

        _, product = first_exact(
            [
                (
                    "reverse_over_forward",
                    lambda: ggn_propagated(model, vector, closed=True, differentiable=False),
                ),
                ("forward_over_reverse", lambda: ggn_forward(model, vector, higher=False)),
                ("reverse_over_reverse", reverse),
                ("double_backward", plain),
            ],
            where=where,
            tensors=params,
            eager=model.eager,
        )
        return product

    with torch.enable_grad():
        product = with_unused_known(output, params, attempt, where)
    return tuple(leaf.detach() for leaf in product)
