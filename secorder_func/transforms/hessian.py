"""Hessian-vector products of a scalar function, as function transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from secorder_func import tree
from secorder_func.checks import check_callable, check_like
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.rules.torch_func import forward_mode_lock, grad, jvp_aux, vjp_aux
from secorder_func.transforms.double_backward import DoubleBackward
from secorder_func.transforms.dual_numbers import by_dual_numbers
from secorder_func.transforms.finite import refuse_non_finite, require_values
from secorder_func.transforms.loss import FlatLoss, LeafLoss, Leaves, flat_loss
from secorder_func.transforms.plain_autograd import or_zeros, to_differentiate
from secorder_func.transforms.policy import (
    check_mode,
    differentiated_outside,
    first_exact,
    in_transform,
    refuse_third_derivatives,
    routes_for,
)
from secorder_func.transforms.propagated import by_propagation
from secorder_func.typing import LossFn, Mode, Tree

__all__ = [
    "Product",
    "double_backward",
    "forward_over_reverse",
    "hvp",
    "hvp_and_grad",
    "reverse_over_reverse",
]


def hvp(
    f: LossFn, *, has_aux: bool = False, mode: Mode = "auto", check_finite: bool = False
) -> Callable[..., Any]:
    r"""Transform `f` into its Hessian-vector product: `hvp(f)(params, v) = H v`, `H = d²f/dparams²`.

    The definition is `jvp(grad(f))`, forward over reverse, over a pytree of parameters.

    Parameters
    ----------
    f
        `f(params, *args, **kwargs) -> loss` with one element; with `has_aux`, `(loss, aux)`. Whether the loss
        is a sum or a mean over samples is up to `f`, and `H` has the same unit.
    has_aux
        Whether `f` returns something beside the loss. Its tensors come back without derivatives.
    mode
        `"auto"`, `"reverse_over_forward"`, `"forward_over_reverse"`, `"reverse_over_reverse"` or
        `"double_backward"`; see `secorder_func.transforms.policy`.
    check_finite
        Whether a product with a NaN or infinite entry is an error; not inside a transform. It looks at every entry.

    Returns
    -------
    Callable
        `(params, v, *args, **kwargs) -> Hv`, or `(Hv, aux)`. `v` and `Hv` are trees like `params`, leaf by leaf
        of the same shape, dtype and device. Parameters that the loss does not use get zeros.

    Raises
    ------
    TypeError
        `v` is structured differently from `params`; a leaf or the loss is not a tensor.
    ValueError
        A leaf of `v` has another shape, dtype or device; the loss has several elements or is complex.
    NoExactRouteError
        torch cannot differentiate some function of the loss twice.
    NonFiniteError
        With `check_finite`, an entry of the product is NaN or infinite.

    Notes
    -----
    Costs 2.5 to 3 gradients, whatever the number of parameters: by one backward pass over forward propagation where
    every function of `f` has a rule of ours (`rule_kinds` tells), else by `jvp(grad(f))`. Composes with `vmap`
    over any argument, `grad`, `jvp` and `torch.compile`. Derivatives of the product (third derivatives) are right with
    respect to `params`, `v` and the arguments. A tensor that `f` merely captures is not seen in time: a derivative in
    it is refused, pass it as an argument. Attention runs on the math kernel, running statistics are not updated.

    References
    ----------
    B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    https://doi.org/10.1162/neco.1994.6.1.147

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp
    >>> def f(params, x):
    ...     return (params["a"] * x**2).sum() * params["b"]
    >>> params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    >>> v = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(0.0)}
    >>> hvp(f)(params, v, torch.tensor([2.0, 1.0]))
    {'a': tensor([0., 0.]), 'b': tensor(4.)}
    """
    check_callable(f, "hvp")
    check_mode(mode, "hvp")

    def product(params: Tree, v: Tree, /, *args: Any, **kwargs: Any) -> Any:
        loss, result = _product(
            f, params, v, args, kwargs, has_aux, mode, check_finite, "hvp", False
        )
        hv = loss.unflatten(result.hv)
        return (hv, loss.aux(result.aux)) if has_aux else hv

    return product


def hvp_and_grad(
    f: LossFn, *, has_aux: bool = False, mode: Mode = "auto", check_finite: bool = False
) -> Callable[..., Any]:
    """Transform `f` into `(params, v, *args, **kwargs) -> (Hv, gradient)`, at the cost of `hvp` alone.

    With `has_aux` the result is `((Hv, gradient), aux)`. Everything else, errors too, is as for `hvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hvp_and_grad
    >>> hvp_and_grad(lambda p: (p**3).sum())(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    (tensor([ 6., 12.]), tensor([ 3., 12.]))
    """
    check_callable(f, "hvp_and_grad")
    check_mode(mode, "hvp_and_grad")

    def product(params: Tree, v: Tree, /, *args: Any, **kwargs: Any) -> Any:
        where = "hvp_and_grad"
        loss, result = _product(
            f, params, v, args, kwargs, has_aux, mode, check_finite, where, True
        )
        both = (loss.unflatten(result.hv), loss.unflatten(result.gradient))
        return (both, loss.aux(result.aux)) if has_aux else both

    return product


class Product(NamedTuple):
    """What one evaluation gives: leaves of `Hv` and of the gradient, if asked for, tensors of the auxiliary output."""

    hv: Leaves
    gradient: Leaves
    aux: Leaves


def _product(
    f: LossFn,
    params: Tree,
    v: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    mode: Mode,
    check_finite: bool,
    where: str,
    with_gradient: bool,
) -> tuple[FlatLoss, Product]:
    if check_finite:
        require_values(where)
    loss = flat_loss(f, params, args, kwargs, has_aux=has_aux, where=where)
    check_like(v, params, where)
    vector = tuple(tree.flatten(without_inference_tensors(v))[0])
    outside = differentiated_outside(params, v, args, tuple(kwargs.values()))

    with_gradient = with_gradient or check_finite
    routes = routes_for(mode, outside=outside)
    if mode == "auto" and with_gradient:  # which the others give beside the product
        routes = tuple(route for route in routes if route != "reverse_over_forward")

    def compute(route: Mode) -> Product:
        if route == "double_backward":
            return double_backward(loss, vector, differentiable=outside)
        if route == "reverse_over_forward":
            return Product(
                *by_propagation(
                    loss,
                    vector,
                    closed=mode == "auto",
                    differentiable=outside,
                    gradient=with_gradient,
                )
            )
        if route == "forward_over_reverse":
            plainly = None if outside or in_transform() else by_dual_numbers(loss, vector)
            if plainly is not None:
                return Product(*plainly)
            return forward_over_reverse(loss.at(forward=True, higher=outside), loss.leaves, vector)
        leaf_loss = loss.at(forward=False, higher=outside)
        return reverse_over_reverse(leaf_loss, loss.leaves, vector, differentiable=outside)

    _, result = first_exact(
        [(route, partial(compute, route)) for route in routes],
        where=where,
        tensors=loss.leaves,
        eager=loss.eager,
    )
    if not outside:
        refuse_third_derivatives(result.hv, where)
    if check_finite:
        refuse_non_finite(loss.unflatten(result.hv), where, gradient=result.gradient)
    return loss, result


def forward_over_reverse(loss: LeafLoss, leaves: Leaves, vector: Leaves) -> Product:
    """Return `jvp(grad(loss))`."""
    with forward_mode_lock():
        gradient, hv, aux = jvp_aux(grad(loss, has_aux=True), (leaves,), (vector,))
    return Product(hv, gradient, aux)


def reverse_over_reverse(
    loss: LeafLoss, leaves: Leaves, vector: Leaves, *, differentiable: bool
) -> Product:
    """Return `vjp(grad(loss))`, with a graph of its own only if `differentiable`."""
    gradient, pullback, aux = vjp_aux(grad(loss, has_aux=True), leaves)
    with torch.set_grad_enabled(differentiable):
        (hv,) = pullback(vector)
    return Product(hv, gradient, aux)


def double_backward(loss: FlatLoss, vector: Leaves, *, differentiable: bool) -> Product:
    """Return the product by plain autograd."""
    at = to_differentiate(loss.leaves, differentiable=differentiable)
    aux: list[Leaves] = []

    def evaluate() -> torch.Tensor:
        value, tensors = loss.plain(at)
        aux.append(tuple(tensor.detach() for tensor in tensors))
        return value

    product = DoubleBackward(evaluate, at, create_graph=differentiable)
    gradient = or_zeros(product.gradient, at)
    if not differentiable:
        gradient = tuple(leaf.detach() for leaf in gradient)
    return Product(product(vector), gradient, aux[-1])
