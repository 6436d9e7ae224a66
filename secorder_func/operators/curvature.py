"""Curvature matrices of a loss as operators that pay once for what does not depend on the vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.operators.compiled import compiled_operator
from secorder_func.operators.forms import Forms
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.rows import Rows
from secorder_func.operators.versions import Versions
from secorder_func.rules.cut_graphs import may_fail
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import grad, vjp_aux, without_vmap_warnings
from secorder_func.transforms.double_backward import DoubleBackward
from secorder_func.transforms.finite import refuse_non_finite, require_values
from secorder_func.transforms.forms import forms_of_loss, forms_of_model
from secorder_func.transforms.gauss_newton import (
    FlatModel,
    flat_model,
    ggn_double_backward,
    ggn_forward,
    ggn_propagated,
    ggn_pullbacks,
    ggnvp,
)
from secorder_func.transforms.hessian import forward_over_reverse, hvp
from secorder_func.transforms.loss import FlatLoss, LeafLoss, Leaves, flat_loss
from secorder_func.transforms.output_space import space_of_batch
from secorder_func.transforms.plain_autograd import to_differentiate
from secorder_func.transforms.policy import (
    check_mode,
    differentiated_outside,
    first_exact,
    in_transform,
    no_exact_route,
    routes_for,
)
from secorder_func.transforms.propagated import by_propagation
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = [
    "ggn_forms",
    "ggn_operator",
    "ggn_rows",
    "hessian_forms",
    "hessian_operator",
    "operator_on_leaves",
    "pulled_back",
]

LeafProduct = Callable[[Leaves], Leaves]

_OTHER_MODE = (
    "Make the operator with another mode= (reverse_over_forward, forward_over_reverse, reverse_over_reverse, "
    "double_backward), "
    "or replace the function that is to blame"
)


def hessian_operator(
    f: LossFn,
    params: Tree,
    *args: Any,
    mode: Mode = "auto",
    check_finite: bool = False,
    compile: bool = False,
    **kwargs: Any,
) -> LinearOperator:
    """Return the Hessian of `f(params, *args, **kwargs)` in `params`, at these parameters.

    Parameters
    ----------
    f, params, args, kwargs
        As for `hvp`.
    mode
        `"auto"` keeps the pullback of the gradient, `vjp(grad(f))`. Where torch cannot make it, `jvp(grad(f))` follows,
        which evaluates the loss for every product, then double backward. A named mode is used or raises. The mode is
        chosen once, here; `op.mode` says which it is.
    check_finite
        Whether a product with a NaN or infinite entry is an error (`NonFiniteError`); not inside a transform.
    compile
        Whether to compile the product with `torch.compile`: 10 to 60 seconds once for `f` and the shapes of everything,
        then no more for other vectors, parameters and data. Nothing is kept of the gradient. `op.compile_seconds` says
        what it took; the first product is compared with an eager one.

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
    if compile:
        product = hvp(f, mode=mode, check_finite=check_finite)
        return compiled_operator(
            lambda params, v, rest: product(params, v, *rest[0], **rest[1]),
            *((f, check_finite), mode, params, (args, kwargs), where),
        )
    loss = flat_loss(f, params, args, kwargs, has_aux=False, where=where)
    outside = differentiated_outside(params, args, tuple(kwargs.values()))
    forms = hessian_forms(loss, (args, kwargs), outside or check_finite)

    def reverse() -> LeafProduct:
        return pulled_back(loss.at(forward=False, higher=outside), loss.leaves, outside)

    def forward() -> LeafProduct:
        leaf_loss = loss.at(forward=True, higher=outside)
        return _replaying(lambda v: forward_over_reverse(leaf_loss, loss.leaves, v).hv, loss.leaves)

    def propagated() -> LeafProduct:
        def product(v: Leaves) -> Leaves:
            recorded = outside or differentiated_outside(v)
            return by_propagation(loss, v, closed=False, differentiable=recorded)[0]

        return _replaying(product, loss.leaves)

    def plain() -> LeafProduct:
        at = to_differentiate(loss.leaves, differentiable=outside)
        product = DoubleBackward(lambda: loss.plain(at)[0], at, create_graph=outside)
        product(tuple(torch.zeros_like(leaf) for leaf in at))  # fails here if it fails at all
        return product

    route, product = first_exact(
        _in_order(mode, reverse, forward, plain, propagated),
        where=where,
        tensors=loss.leaves,
        eager=loss.eager,
    )
    return operator_on_leaves(product, params, mode=route, check_finite=check_finite, forms=forms)


def ggn_operator(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    mode: Mode = "auto",
    check_finite: bool = False,
    compile: bool = False,
) -> LinearOperator:
    """Return the generalised Gauss-Newton matrix `J^T H_L J` at these parameters.

    Parameters
    ----------
    model_fn, loss_fn, params, inputs, targets
        As for `ggnvp`.
    mode
        `"auto"` keeps three pullbacks (of the model, of that pullback, of the loss's gradient) and falls back to
        forward mode, which evaluates the model for every product, and to double backward; a named mode is used or
        raises.
    check_finite, compile
        As for `hessian_operator`.

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
    if compile:
        product = ggnvp(model_fn, loss_fn, mode=mode, check_finite=check_finite)
        return compiled_operator(
            lambda params, v, rest: product(params, v, *rest),
            *((model_fn, loss_fn, check_finite), mode, params, (inputs, targets), where),
        )
    model = flat_model(model_fn, loss_fn, params, inputs, targets, where=where)
    outside = differentiated_outside(params, inputs, targets)
    forms = ggn_forms(model, (inputs, targets), outside or check_finite)
    rows = None
    if forms is not None:
        rows = ggn_rows(model, model_fn, loss_fn, params, (inputs, targets))

    def reverse() -> LeafProduct:
        return _without_graph(ggn_pullbacks(model, higher=outside), outside)

    def forward() -> LeafProduct:
        return _replaying(lambda v: ggn_forward(model, v, higher=outside), model.leaves)

    def propagated() -> LeafProduct:
        def product(v: Leaves) -> Leaves:
            recorded = outside or differentiated_outside(v)
            return ggn_propagated(model, v, closed=False, differentiable=recorded)

        return _replaying(product, model.leaves)

    def plain() -> LeafProduct:
        return ggn_double_backward(model, differentiable=outside)

    route, product = first_exact(
        _in_order(mode, reverse, forward, plain, propagated),
        where=where,
        tensors=model.leaves,
        eager=model.eager,
    )
    op = operator_on_leaves(product, params, mode=route, check_finite=check_finite, forms=forms)
    return replace(op, rows=rows)


def hessian_forms(loss: FlatLoss, batch: Any, refused: bool) -> Forms | None:
    """Return the forms of the Hessian of a loss of some data, None where they are not wanted or cannot be."""
    return _forms(partial(forms_of_loss, loss), loss.leaves, batch, refused)


def ggn_forms(model: FlatModel, batch: Any, refused: bool) -> Forms | None:
    """Return the same for the Gauss-Newton matrix."""
    return _forms(partial(forms_of_model, model), model.leaves, batch, refused)


def ggn_rows(
    model: FlatModel, model_fn: ModelFn, loss_fn: LossFn, params: Tree, batch: tuple[Any, Any]
) -> Rows:
    """Return the Gauss-Newton matrix as outer products, made when they are asked for."""
    state = RandomState.now(model.leaves)
    bound = without_inference_tensors(batch)
    space = partial(space_of_batch, model, model_fn, loss_fn, params, bound, state)
    return Rows(space, model.leaves, tuple(tree.tensors_in(batch)))


def _forms(compute: Any, leaves: Leaves, batch: Any, refused: bool) -> Forms | None:
    if refused or in_transform():
        return None
    return Forms(compute, leaves, data=tuple(tree.tensors_in(batch)))


def _in_order(
    mode: Mode,
    reverse: Callable[[], LeafProduct],
    forward: Callable[[], LeafProduct],
    plain: Callable[[], LeafProduct],
    propagated: Callable[[], LeafProduct],
) -> list[tuple[str, Callable[[], LeafProduct]]]:
    """Return the routes of a mode; an operator keeps a pullback, so that it takes reverse over reverse first."""
    ways = {
        "reverse_over_reverse": reverse,
        "forward_over_reverse": forward,
        "double_backward": plain,
    }
    if mode == "reverse_over_forward":
        return [(mode, propagated)]
    allowed = routes_for(mode, outside=False)
    return [(name, way) for name, way in ways.items() if name in allowed]


def pulled_back(loss: LeafLoss, leaves: Leaves, differentiable: bool) -> LeafProduct:
    """Return the Hessian's product as the pullback of the gradient, which is computed here, once."""
    roots: list[Any] = []

    def gradient(leaves: Leaves) -> tuple[Leaves, Leaves]:
        found: tuple[Leaves, Leaves] = grad(loss, has_aux=True)(leaves)
        if not torch.compiler.is_compiling():
            roots.extend(leaf.grad_fn for leaf in found[0] if leaf.grad_fn is not None)
        return found

    _, pullback, _ = vjp_aux(gradient, leaves)
    if may_fail(roots):  # then now, where another route can still be taken
        pullback(tuple(torch.zeros_like(leaf) for leaf in leaves))
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


def operator_on_leaves(
    product: LeafProduct,
    params: Tree,
    *,
    mode: str,
    check_finite: bool = False,
    forms: Forms | None = None,
) -> LinearOperator:
    """Wrap a product of leaf tuples as an operator on trees like `params`.

    Several vectors go through `vmap`, with the same random numbers for all, or through the product's own batching;
    one by one where that cannot.
    """
    leaves, unflatten = tree.flatten(params)
    versions = Versions(leaves)
    batched: LeafProduct = vmap(product, randomness="same")
    if isinstance(product, DoubleBackward):
        batched = product.several

    def single(vector: Leaves) -> Leaves:
        try:
            return product(vector)
        except (RuntimeError, NotImplementedError) as error:
            if type(error) not in (
                RuntimeError,
                NotImplementedError,
            ):  # the user's own, out of memory
                raise
            raise no_exact_route("LinearOperator", [(mode, error)], mend=_OTHER_MODE) from error

    def several(vectors: Leaves) -> Leaves:
        try:
            with without_vmap_warnings():
                result: Leaves = batched(vectors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            rows = [single(row) for row in zip(*vectors, strict=True)]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return result

    def on_trees(multiply: LeafProduct) -> Callable[[Tree], Tree]:
        def apply(v: Tree) -> Tree:
            versions.require_unchanged()
            if check_finite:
                require_values("LinearOperator")
            with out_of_inference_mode():
                vector = tuple(tree.flatten(without_inference_tensors(v))[0])
                result = unflatten(multiply(vector))
            if check_finite:
                refuse_non_finite(result, "LinearOperator")
            return result

        return apply

    return LinearOperator(
        matvec=on_trees(single),
        like=tree.map(Tensor.detach, params),
        matmat=on_trees(several),
        forms=forms,
        symmetric=True,
        mode=mode,
    )
