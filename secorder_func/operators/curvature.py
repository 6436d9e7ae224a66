"""Curvature matrices of a loss as operators that pay once for what does not depend on the vector."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.errors import message
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.gauss_newton import flat_model, ggn_forward, ggn_pullbacks
from secorder_func.transforms.hessian import forward_over_reverse
from secorder_func.transforms.loss import LeafLoss, Leaves, flat_loss
from secorder_func.transforms.policy import (
    check_mode,
    differentiated_outside,
    first_exact,
    no_exact_route,
)
from secorder_func.transforms.torch_func import grad, vjp_aux
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = ["ggn_operator", "hessian_operator", "operator_on_leaves", "pulled_back"]

LeafProduct = Callable[[Leaves], Leaves]


def hessian_operator(
    f: LossFn, params: Tree, *args: Any, mode: Mode = "auto", **kwargs: Any
) -> LinearOperator:
    """Return the Hessian of `f(params, *args, **kwargs)` in `params`, at these parameters.

    Parameters
    ----------
    f, params, args, kwargs
        As for `hvp`.
    mode
        `"auto"` keeps the pullback of the gradient, `vjp(grad(f))`, and falls back to `jvp(grad(f))`, which evaluates
        the loss for every product; a named mode is used or raises. `op.mode` says which it is.

    Returns
    -------
    LinearOperator
        Symmetric, on trees like `params`, with chunked products.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `hvp`. A product raises `RuntimeError` if a parameter was changed in place since.

    Notes
    -----
    Making it costs about two gradients and keeps their memory; then a product costs one to two gradients.
    Random numbers of the loss (dropout) are drawn once, so that all products are with one matrix.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator
    >>> op = hessian_operator(lambda p: p[0] ** 2 * p[1], torch.tensor([1.0, 2.0]))
    >>> op.dense()
    tensor([[4., 2.],
            [2., 0.]])
    >>> op
    LinearOperator(2 x 2, 1 leaves, torch.float32, cpu, mode='reverse_over_reverse')
    """
    where = "hessian_operator"
    check_mode(mode, where)
    loss = flat_loss(f, params, args, kwargs, has_aux=False, where=where)
    outside = differentiated_outside(params, args, tuple(kwargs.values()))

    def reverse() -> LeafProduct:
        return pulled_back(loss.at(forward=False, higher=outside), loss.leaves, outside)

    def forward() -> LeafProduct:
        leaf_loss = loss.at(forward=True, higher=outside)
        return _replaying(lambda v: forward_over_reverse(leaf_loss, loss.leaves, v).hv, loss.leaves)

    route, product = first_exact(
        _in_order(mode, reverse, forward),
        where=where,
        tensors=loss.leaves,
        eager=loss.eager,
    )
    return operator_on_leaves(product, params, mode=route)


def ggn_operator(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    mode: Mode = "auto",
) -> LinearOperator:
    """Return the generalised Gauss-Newton matrix `J^T H_L J` at these parameters.

    Parameters
    ----------
    model_fn, loss_fn, params, inputs, targets
        As for `ggnvp`.
    mode
        `"auto"` keeps three pullbacks (of the model, of that pullback, of the loss's gradient) and falls back to
        forward mode, which evaluates the model for every product; a named mode is used or raises.

    Returns
    -------
    LinearOperator
        Symmetric, on trees like `params`, with chunked products; positive semidefinite if the loss is convex in
        the outputs.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `ggnvp`. A product raises `RuntimeError` if a parameter was changed in place since.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import ggn_operator
    >>> model = lambda w, x: torch.tanh(x @ w)
    >>> squares = lambda outputs, y: ((outputs - y) ** 2).sum()
    >>> ggn_operator(model, squares, torch.zeros(2), torch.eye(2), torch.ones(2)).dense()
    tensor([[2., 0.],
            [0., 2.]])
    """
    where = "ggn_operator"
    check_mode(mode, where)
    model = flat_model(model_fn, loss_fn, params, inputs, targets, where=where)
    outside = differentiated_outside(params, inputs, targets)

    def reverse() -> LeafProduct:
        return _without_graph(ggn_pullbacks(model, higher=outside), outside)

    def forward() -> LeafProduct:
        return _replaying(lambda v: ggn_forward(model, v, higher=outside), model.leaves)

    route, product = first_exact(
        _in_order(mode, reverse, forward), where=where, tensors=model.leaves, eager=model.eager
    )
    return operator_on_leaves(product, params, mode=route)


def _in_order(
    mode: Mode, reverse: Callable[[], LeafProduct], forward: Callable[[], LeafProduct]
) -> list[tuple[str, Callable[[], LeafProduct]]]:
    routes = [("reverse_over_reverse", reverse), ("forward_over_reverse", forward)]
    return routes if mode == "auto" else [route for route in routes if route[0] == mode]


def pulled_back(loss: LeafLoss, leaves: Leaves, differentiable: bool) -> LeafProduct:
    """Return the Hessian's product as the pullback of the gradient, which is computed here, once."""
    _, pullback, _ = vjp_aux(grad(loss, has_aux=True), leaves)
    return _without_graph(lambda vector: pullback(vector)[0], differentiable)


def _without_graph(product: LeafProduct, differentiable: bool) -> LeafProduct:
    """Let products record a graph of their own only where someone differentiates them."""

    def apply(vector: Leaves) -> Leaves:
        recorded = torch.is_grad_enabled() and (differentiable or differentiated_outside(vector))
        with torch.set_grad_enabled(recorded):
            return product(vector)

    return apply


def _replaying(product: LeafProduct, leaves: Leaves) -> LeafProduct:
    """Make every product draw the random numbers of this moment; draw them once here, for show.

    The product with zero shows now whether this route works at all.
    """
    state = RandomState.now(leaves)
    product(tuple(torch.zeros_like(leaf) for leaf in leaves))

    def apply(vector: Leaves) -> Leaves:
        with state.replayed():
            return product(vector)

    return apply


def operator_on_leaves(product: LeafProduct, params: Tree, *, mode: str) -> LinearOperator:
    """Wrap a product of leaf tuples as an operator on trees like `params`.

    Several vectors go through `vmap`, with the same random numbers for all; one by one where vmap cannot.
    """
    leaves, unflatten = tree.flatten(params)
    versions = [_version(leaf) for leaf in leaves]
    batched = vmap(product, randomness="same")

    def single(vector: Leaves) -> Leaves:
        try:
            return product(vector)
        except (RuntimeError, NotImplementedError) as error:
            if type(error) not in (
                RuntimeError,
                NotImplementedError,
            ):  # the user's own, out of memory
                raise
            raise no_exact_route("LinearOperator", [(mode, error)]) from error

    def several(vectors: Leaves) -> Leaves:
        try:
            with warnings.catch_warnings():  # the user did not ask for vmap
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                result: Leaves = batched(vectors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            rows = [single(row) for row in zip(*vectors, strict=True)]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return result

    def on_trees(multiply: LeafProduct) -> Callable[[Tree], Tree]:
        def apply(v: Tree) -> Tree:
            if [_version(leaf) for leaf in leaves] != versions:
                raise RuntimeError(
                    message(
                        "LinearOperator",
                        "a parameter was changed in place after the operator was made",
                        "Make a new operator at the new parameters",
                    )
                )
            with out_of_inference_mode():
                return unflatten(multiply(tuple(tree.flatten(without_inference_tensors(v))[0])))

        return apply

    return LinearOperator(
        matvec=on_trees(single),
        like=tree.map(Tensor.detach, params),
        matmat=on_trees(several),
        symmetric=True,
        mode=mode,
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)
