"""A zero-argument closure as a pure function of its parameters, and its exact products.

The closure runs under the library's rules with every parameter exchanged, by identity, for the value at which it is
differentiated. What the exchange cannot see (a ScriptModule's parameters, a loss computed before the closure ran or in
another thread) shows in the loss: a parameter was never met, or the loss has an autograd history that reaches an
original. Both lead to double backward, which differentiates the originals where they are; never to zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from secorder_func.compat._arguments import Leaves
from secorder_func.compat._double_backward import DoubleBackward, ggn_double_backward
from secorder_func.errors import HiddenParameterError
from secorder_func.operators import LinearOperator
from secorder_func.operators.curvature import operator_on_leaves, pulled_back
from secorder_func.rules import SecondOrderRules
from secorder_func.rules.cut_graphs import history
from secorder_func.transforms.gauss_newton import FlatModel, ggn_forward, ggn_pullbacks
from secorder_func.transforms.hessian import forward_over_reverse, reverse_over_reverse
from secorder_func.transforms.loss import FlatLoss
from secorder_func.transforms.policy import first_exact

__all__ = ["closure_loss", "gauss_newton", "hessian_operator_of", "hessian_product"]

Func = Callable[[], Tensor]


def closure_loss(func: Func, params: Leaves, where: str) -> FlatLoss:
    """Bind a closure, so that it can be evaluated at other values of `params`."""
    return FlatLoss(
        evaluate=lambda leaves: func(),
        leaves=tuple(p.detach() for p in params),
        unflatten=tuple,
        has_aux=False,
        where=where,
        originals=params,
        verify=_refuse_hidden(params),
    )


def hessian_product(
    func: Func, params: Leaves, vector: Leaves, *, create_graph: bool, where: str
) -> Leaves:
    """Return the exact product `H v`."""
    if create_graph:
        return DoubleBackward(func, params, where, create_graph=True)(vector)
    loss = closure_loss(func, params, where)
    vector = tuple(leaf.detach() for leaf in vector)

    def forward() -> Leaves:
        return forward_over_reverse(loss.at(forward=True, higher=False), loss.leaves, vector).hv

    def reverse() -> Leaves:
        leaf_loss = loss.at(forward=False, higher=False)
        return reverse_over_reverse(leaf_loss, loss.leaves, vector, differentiable=False).hv

    def plain() -> Leaves:
        return DoubleBackward(func, params, where)(vector)

    with torch.enable_grad():  # a hidden parameter shows in the history of the loss
        _, product = first_exact(
            [
                ("forward_over_reverse", forward),
                ("reverse_over_reverse", reverse),
                ("double_backward", plain),
            ],
            where=where,
            tensors=params,
            eager=loss.eager,
        )
    return tuple(leaf.detach() for leaf in product)


def hessian_operator_of(
    func: Func, params: Leaves, *, create_graph: bool, where: str
) -> LinearOperator:
    """Return the Hessian of a closure as an operator on tuples of tensors; it is evaluated once."""
    if create_graph:
        return _double_backward_operator(func, params, where, create_graph=True)
    loss = closure_loss(func, params, where)

    def reverse() -> LinearOperator:
        product = pulled_back(loss.at(forward=False, higher=False), loss.leaves, False)
        return operator_on_leaves(product, loss.leaves, mode="reverse_over_reverse")

    def plain() -> LinearOperator:
        return _double_backward_operator(func, params, where, create_graph=False)

    with torch.enable_grad():
        _, op = first_exact(
            [("reverse_over_reverse", reverse), ("double_backward", plain)],
            where=where,
            tensors=params,
            eager=loss.eager,
        )
    return op


def _double_backward_operator(
    func: Func, params: Leaves, where: str, *, create_graph: bool
) -> LinearOperator:
    product = DoubleBackward(func, params, where, create_graph=create_graph, keep=True)
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
        return ggn_double_backward(output, loss_of, params, vector, where, create_graph=True)
    model = FlatModel(
        model=lambda leaves: output(),
        loss=loss_of,
        leaves=tuple(p.detach() for p in params),
        unflatten=tuple,
        where=where,
        originals=params,
        verify=_refuse_hidden(params),
    )
    vector = tuple(leaf.detach() for leaf in vector)

    def reverse() -> Leaves:
        apply = ggn_pullbacks(model, higher=False)
        with torch.no_grad():
            return apply(vector)

    def plain() -> Leaves:
        return ggn_double_backward(output, loss_of, params, vector, where, create_graph=False)

    with torch.enable_grad():
        _, product = first_exact(
            [
                ("forward_over_reverse", lambda: ggn_forward(model, vector, higher=False)),
                ("reverse_over_reverse", reverse),
                ("double_backward", plain),
            ],
            where=where,
            tensors=params,
            eager=model.eager,
        )
    return tuple(leaf.detach() for leaf in product)


# --------------------------------------------------------------- parameters that cannot be seen


def _refuse_hidden(params: Leaves) -> Callable[..., None]:
    """Return a check that every parameter was met, and that no output has a history that reaches one."""

    def verify(rules: SecondOrderRules, *outputs: Tensor) -> None:
        missed = [index for index, p in enumerate(params) if id(p) not in rules.seen]
        if missed:
            raise HiddenParameterError(
                f"params[{missed[0]}] is not met by any torch function of the closure"
            )
        reached = _first_reached(outputs, params)
        if reached is not None:
            raise HiddenParameterError(
                f"the closure reaches params[{reached}] by a path on which it cannot be exchanged"
            )

    return verify


def _first_reached(outputs: Sequence[Tensor], params: Leaves) -> int | None:
    """Return the first parameter in the plain autograd history of the outputs."""
    roots = [base.grad_fn for base in map(_base, outputs) if base.grad_fn is not None]
    leaves = {id(p): index for index, p in enumerate(params) if p.grad_fn is None}
    inner = {p.grad_fn: index for index, p in enumerate(params) if p.grad_fn is not None}
    for node in history(roots):
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            return leaves[id(variable)]
        if node in inner:
            return inner[node]
    return None


def _base(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
