"""Generalised Gauss-Newton products of a model and a loss, as function transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_like, check_params
from secorder_func.errors import ArgumentTypeError, message
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.rules.torch_func import forward_mode_lock, grad, jvp, jvp_aux, vjp, vjp_aux
from secorder_func.taylor import Propagation
from secorder_func.transforms.finite import refuse_non_finite, require_values
from secorder_func.transforms.loss import FlatLoss, Leaves, checked_scalar, exchanged
from secorder_func.transforms.plain_autograd import paired, pull, recording, to_differentiate
from secorder_func.transforms.plain_jacobian import GGNDoubleBackward
from secorder_func.transforms.policy import (
    check_mode,
    differentiated_outside,
    first_exact,
    in_transform,
    refuse_third_derivatives,
    routes_for,
)
from secorder_func.transforms.propagated import (
    by_propagation,
    evaluated_with_terms,
    refuse_forward_mode,
    with_constants,
)
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = [
    "FlatModel",
    "flat_model",
    "ggn_double_backward",
    "ggn_forward",
    "ggn_propagated",
    "ggn_pullbacks",
    "ggnvp",
    "outputs_function",
]


def ggnvp(
    model_fn: ModelFn, loss_fn: LossFn, *, mode: Mode = "auto", check_finite: bool = False
) -> Callable[..., Tree]:
    r"""Transform a model and a loss into the product with `G = J^T H_L J`.

    `J` is the Jacobian of `model_fn` in `params`, `H_L` the Hessian of `loss_fn` in the outputs.

    Parameters
    ----------
    model_fn
        `model_fn(params, inputs) -> outputs`; both sides may be trees.
    loss_fn
        `loss_fn(outputs, targets) -> loss` with one element. `G` has the unit of this loss, a sum or a mean over
        samples. `G` is positive semidefinite where the loss is convex in the outputs.
    mode, check_finite
        As for `hvp`; the mode is how `J v` and `H_L` are differentiated.

    Returns
    -------
    Callable
        `(params, v, inputs, targets) -> G v`, a tree like `params`.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `hvp`; also where an output is not a tensor.

    Notes
    -----
    Costs about two gradients: `J v` by forward propagation beside the evaluation of the model. There is one, so that a
    dropout mask is the same for `J` and `J^T`.
    Exact for every loss, not only for squared error and cross-entropy; equal to the Hessian where the model is linear
    in its parameters.

    References
    ----------
    N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
    Computation 14(7), 2002. https://doi.org/10.1162/08997660260028683

    Examples
    --------
    >>> import torch
    >>> from secorder_func import ggnvp
    >>> model = lambda params, x: x @ params["w"]
    >>> half_squares = lambda outputs, y: 0.5 * ((outputs - y) ** 2).sum()
    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
    >>> ggnvp(model, half_squares)({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])}, x, y)
    {'w': tensor([2., 2.])}
    """
    check_mode(mode, "ggnvp")

    def product(params: Tree, v: Tree, /, inputs: Any, targets: Any) -> Tree:
        if check_finite:
            require_values("ggnvp")
        model = flat_model(model_fn, loss_fn, params, inputs, targets, where="ggnvp")
        check_like(v, params, "ggnvp")
        vector = tuple(tree.flatten(without_inference_tensors(v))[0])
        outside = differentiated_outside(params, v, inputs, targets)

        def compute(route: Mode) -> Leaves:
            if route == "double_backward":
                return ggn_double_backward(model, differentiable=outside)(vector)
            if route == "reverse_over_forward":
                return ggn_propagated(model, vector, closed=mode == "auto", differentiable=outside)
            if route == "forward_over_reverse":
                return ggn_forward(model, vector, higher=outside)
            apply = ggn_pullbacks(model, higher=outside)
            with torch.set_grad_enabled(outside):
                return apply(vector)

        _, leaves = first_exact(
            [(route, partial(compute, route)) for route in routes_for(mode, outside=outside)],
            where="ggnvp",
            tensors=model.leaves,
            eager=model.eager,
        )
        if not outside:
            refuse_third_derivatives(leaves, "ggnvp")
        result = model.unflatten(leaves)
        if check_finite:
            refuse_non_finite(result, "ggnvp")
        return result

    return product


@dataclass
class FlatModel:
    """A model and its loss with everything but the leaves of `params` bound.

    Only floating and complex outputs are differentiated; other leaves reach the loss as they are. `originals` and
    `verify` are as in `FlatLoss`.
    """

    model: Callable[[Leaves], Any]
    loss: Callable[[Any], Any]
    leaves: Leaves
    unflatten: tree.Unflatten
    where: str
    originals: Leaves | None = None
    verify: Callable[..., None] | None = None
    _assemble: Callable[[Leaves, Leaves], Any] | None = None

    def outputs_at(
        self, *, forward: bool, higher: bool
    ) -> Callable[[Leaves], tuple[Leaves, Leaves]]:
        """Return leaves -> (differentiable tensors of the outputs, the other tensors), under the rules."""

        def outputs(leaves: Leaves) -> tuple[Leaves, Leaves]:
            return evaluated(
                lambda rules: self.plain_outputs(rules, leaves),
                forward=forward,
                higher=higher,
                exchange=exchanged(self.originals, leaves),
                protect=leaves,
            )

        return outputs

    def plain_outputs(self, rules: SecondOrderRules, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Return differentiable tensors of the outputs and the other tensors, under the rules that are in force."""
        smooth, others = self._split(self.model(leaves))
        if self.verify is not None:
            self.verify(rules, *smooth)
        return smooth, others

    def assembling_as(self, other: FlatModel) -> FlatModel:
        """Put outputs together as another one does, whose model was evaluated."""
        self._assemble = other._assemble
        return self

    def assembled(self, smooth: Leaves, others: Leaves) -> Any:
        """Return the outputs as the model gives them."""
        assert self._assemble is not None
        return self._assemble(smooth, others)

    def loss_of(self, others: Leaves) -> Callable[[Leaves], Any]:
        """Return differentiable tensors of the outputs -> what the user's loss returns."""
        return lambda smooth: self.loss(self.assembled(smooth, others))

    def loss_at(self, others: Leaves, *, forward: bool, higher: bool) -> Callable[[Leaves], Tensor]:
        """Return differentiable tensors of the outputs -> loss, under the rules."""
        loss_of = self.loss_of(others)

        def loss(smooth: Leaves) -> Tensor:
            def evaluate(rules: SecondOrderRules) -> Tensor:
                return checked_scalar(loss_of(smooth), self.where)

            return evaluated(evaluate, forward=forward, higher=higher)

        return loss

    def eager(self) -> object:
        """Evaluate plainly, for the errors of the user's own functions."""
        protect = self.originals or self.leaves
        return evaluated(
            lambda rules: self.loss(self.model(self.leaves)),
            forward=False,
            higher=False,
            protect=protect,
        )

    def _split(self, outputs: Any) -> tuple[Leaves, Leaves]:
        tensors, restore = tree.tensors_and_rest(outputs)
        smooth = [t.is_floating_point() or t.is_complex() for t in tensors]
        if not any(smooth):
            given = ", ".join(sorted(str(t.dtype) for t in tensors)) or type(outputs).__name__
            problem = f"model_fn must return at least one floating tensor, got {given}"
            raise ArgumentTypeError(message(self.where, problem))

        def assemble(differentiated: Leaves, others: Leaves) -> Any:
            first, second = iter(differentiated), iter(others)
            return restore([next(first) if is_smooth else next(second) for is_smooth in smooth])

        self._assemble = assemble
        pairs = list(zip(smooth, tensors, strict=True))
        return tuple(t for kept, t in pairs if kept), tuple(t for kept, t in pairs if not kept)


def flat_model(
    model_fn: ModelFn, loss_fn: LossFn, params: Tree, inputs: Any, targets: Any, *, where: str
) -> FlatModel:
    """Bind everything but the leaves of `params`, which are checked."""
    check_callable(model_fn, where, name="model_fn")
    check_callable(loss_fn, where, name="loss_fn")
    check_params(params, where)
    params, inputs, targets = without_inference_tensors((params, inputs, targets))
    leaves, unflatten = tree.flatten(params)
    return FlatModel(
        model=lambda leaves: model_fn(unflatten(leaves), inputs),
        loss=lambda outputs: loss_fn(outputs, targets),
        leaves=tuple(leaves),
        unflatten=unflatten,
        where=where,
    )


def outputs_function(
    model_fn: ModelFn, loss_fn: LossFn, unflatten: tree.Unflatten, where: str
) -> Callable[[Leaves, Any], Leaves]:
    """Return (leaves, (inputs, targets)) -> the differentiable outputs of the model."""

    def outputs(at: Leaves, batch: tuple[Any, Any]) -> Leaves:
        model = flat_model(model_fn, loss_fn, unflatten(at), *batch, where=where)
        return model.outputs_at(forward=False, higher=False)(tuple(at))[0]

    return outputs


def ggn_forward(model: FlatModel, vector: Leaves, *, higher: bool) -> Leaves:
    """Return `J^T H_L J v` with `J v` and `H_L` in forward mode and one evaluation of the model."""
    outputs_of = model.outputs_at(forward=True, higher=higher)

    def outputs_and_tangents(leaves: Leaves) -> tuple[Leaves, tuple[Leaves, Leaves]]:
        outputs, tangents, others = jvp_aux(outputs_of, (leaves,), (vector,))
        return outputs, (tangents, others)

    with forward_mode_lock():
        outputs, pullback, (tangents, others) = vjp_aux(outputs_and_tangents, model.leaves)
        loss = model.loss_at(others, forward=True, higher=higher)
        _, cotangents = jvp(grad(loss), (outputs,), (tangents,))
    with torch.set_grad_enabled(higher or differentiated_outside(vector)):
        result: Leaves = pullback(cotangents)[0]
    return result


def ggn_propagated(
    model: FlatModel, vector: Leaves, *, closed: bool, differentiable: bool
) -> Leaves:
    """Return the product with `J v` by forward propagation, beside the one evaluation of the model.

    The terms are not recorded unless they are to be differentiated: two products of matrices a layer, beside the
    three of a gradient.
    """
    refuse_forward_mode()
    constants: dict[int, Tensor] = {}

    def outputs_and_terms(at: Leaves) -> tuple[Leaves, tuple[Leaves, Leaves]]:
        def evaluate(terms: Propagation) -> tuple[Leaves, tuple[Leaves, Leaves]]:
            smooth, others = model.plain_outputs(terms, at)
            constants.update(terms.constants)
            return smooth, (tuple(map(terms.or_zeros, smooth)), others)

        return evaluated_with_terms(
            evaluate,
            at,
            vector,
            exchange=exchanged(model.originals, at),
            closed=closed,
            higher=differentiable,
            record=differentiable,
        )

    if in_transform():
        outputs, pullback, (terms, others) = vjp_aux(outputs_and_terms, model.leaves)
        result: Leaves = pullback(_bent(model, outputs, terms, others, closed, differentiable))[0]
        return result
    at = to_differentiate(model.leaves, differentiable=differentiable)
    with forward_mode_lock(), recording():
        outputs, (terms, others) = outputs_and_terms(at)
        bent = _bent(model, outputs, terms, others, closed, differentiable)
        result = pull(paired(outputs, bent), at, create_graph=differentiable)
    return with_constants(result, constants.values())


def _bent(
    model: FlatModel,
    outputs: Leaves,
    terms: Leaves,
    others: Leaves,
    closed: bool,
    differentiable: bool,
) -> Leaves:
    """Return the product of the loss's Hessian in the outputs with their terms."""
    loss = FlatLoss(model.loss_of(others), outputs, tuple, False, model.where)
    return by_propagation(loss, terms, closed=closed, differentiable=differentiable)[0]


def ggn_pullbacks(model: FlatModel, *, higher: bool) -> Callable[[Leaves], Leaves]:
    """Return `v -> J^T H_L J v` by three pullbacks in reverse mode, made once.

    `J v` is the pullback of the pullback, which is linear in its cotangent.
    """
    outputs, pull, others = vjp_aux(model.outputs_at(forward=False, higher=higher), model.leaves)
    zeros = tuple(torch.zeros_like(z) for z in outputs)
    _, push = vjp(lambda cotangents: pull(cotangents)[0], zeros)
    _, bend = vjp(grad(model.loss_at(others, forward=False, higher=higher)), outputs)

    def apply(vector: Leaves) -> Leaves:
        (tangents,) = push(vector)
        (cotangents,) = bend(tangents)
        result: Leaves = pull(cotangents)[0]
        return result

    return apply


def ggn_double_backward(model: FlatModel, *, differentiable: bool) -> GGNDoubleBackward:
    """Return the product by plain autograd."""
    at = to_differentiate(model.leaves, differentiable=differentiable)
    return GGNDoubleBackward(
        lambda: model.model(at), model.loss, at, model.where, create_graph=differentiable
    )
