"""Products with a Jacobian, and with the Gauss-Newton matrix of its outputs, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.cut_graphs import refuse_cut_history, refuse_unrecorded_backwards
from secorder_func.transforms.loss import Leaves, checked_scalar
from secorder_func.transforms.plain_autograd import (
    PlainEvaluation,
    gradients,
    paired,
    pull,
    pull_several,
)

__all__ = ["GGNDoubleBackward", "PlainJacobian"]


class PlainJacobian:
    """The Jacobian `J` of some outputs in some parameters, known by its products with both sides.

    The outputs are evaluated here, once. `J^T u` is a backward pass; `J v` is the derivative of `J^T u` in `u`, which
    is linear in it: another pass, through a graph that is made when it is first asked for, and for which every function
    must be differentiable twice.

    Parameters
    ----------
    evaluate
        `() -> outputs`, a tuple of tensors, computed from `params` as they are.
    params
        Where to differentiate; tensors that require gradients.
    create_graph
        Whether products can be differentiated again.

    Attributes
    ----------
    outputs
        What was evaluated.
    """

    def __init__(
        self,
        evaluate: Callable[[], Leaves],
        params: Leaves,
        *,
        create_graph: bool = False,
    ) -> None:
        self.params = params
        self.create_graph = create_graph
        self._evaluation = PlainEvaluation(evaluate, params, create_graph=create_graph)
        self.outputs = self._evaluation.outputs
        if create_graph:
            self._evaluation.history.refuse_cuts()
        self._pulled: tuple[Leaves, list[Tensor | None]] | None = None

    def pull(self, cotangents: Leaves) -> Leaves:
        """Return `J^T u`, zeros for a parameter that no output uses."""
        with self.differentiating():
            pairs = paired(self.outputs, cotangents)
            return pull(pairs, self.params, create_graph=self.create_graph)

    def pull_several(self, cotangents: Leaves) -> Leaves:
        """Return `J^T u` for cotangents stacked along a leading axis."""
        with self.differentiating():
            pairs = paired(self.outputs, cotangents)
            count = cotangents[0].shape[0]
            return pull_several(pairs, self.params, self.create_graph, count)

    def push(self, vector: Leaves) -> Leaves:
        """Return `J v`, zeros for an output that does not depend on the parameters."""
        cotangents, pulled = self.pullback()
        with self.differentiating():
            return pull(paired(pulled, vector), cotangents, create_graph=self.create_graph)

    def push_several(self, vectors: Leaves) -> Leaves:
        """Return `J v` for vectors stacked along a leading axis."""
        cotangents, pulled = self.pullback()
        with self.differentiating():
            count = vectors[0].shape[0]
            return pull_several(paired(pulled, vectors), cotangents, self.create_graph, count)

    def pullback(self) -> tuple[Leaves, list[Tensor | None]]:
        """Return some cotangents and `J^T u` as a function of them."""
        if self._pulled is not None:
            return self._pulled
        history = self._evaluation.history
        history.refuse_cuts()
        with self.differentiating(), refuse_unrecorded_backwards(history.custom):
            # `J^T u` is linear: any `u` will do, and one without zeros shows what is not recorded.
            cotangents = tuple(torch.ones_like(z, requires_grad=True) for z in self.outputs)
            pairs = paired(self.outputs, cotangents)
            pulled: list[Tensor | None] = [None] * len(self.params)
            if pairs:
                outputs, used = zip(*pairs, strict=True)
                pulled = gradients(outputs, self.params, used, create_graph=True)
        self._pulled = cotangents, pulled
        return self._pulled

    def differentiating(self) -> AbstractContextManager[Any]:
        """Return the context for a backward pass from the outputs."""
        return self._evaluation.differentiating()


class GGNDoubleBackward:
    """The product `J^T H_L J v`; model and loss are evaluated here, once.

    Parameters
    ----------
    model
        `() -> outputs`, any tree, computed from `params` as they are.
    loss_of
        `outputs -> loss`.
    params, create_graph
        As for `PlainJacobian`.
    where
        The public function, for messages.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        loss_of: Callable[[Any], Tensor],
        params: Leaves,
        where: str,
        *,
        create_graph: bool = False,
    ) -> None:
        def evaluate() -> Leaves:
            outputs, smooth = _cloned(model())
            if not smooth:
                problem = "no output of the model is a tensor that depends on its parameters"
                raise ArgumentTypeError(message(where, problem))
            loss = checked_scalar(loss_of(outputs), where)
            if not loss.requires_grad:
                raise ArgumentError(
                    message(where, "the loss does not depend on the model's output")
                )
            refuse_cut_history([loss.grad_fn])
            self.slope = gradients([loss], smooth, create_graph=True)
            return smooth

        self.jacobian = PlainJacobian(evaluate, params, create_graph=create_graph)
        self.jacobian.pullback()  # fails here if it fails at all

    def __call__(self, vector: Leaves) -> Leaves:
        """Return the product with one vector."""
        jacobian = self.jacobian
        tangents = jacobian.push(vector)
        with jacobian.differentiating():
            pairs = paired(self.slope, tangents)
            bent = pull(pairs, jacobian.outputs, create_graph=jacobian.create_graph)
        return jacobian.pull(bent)


def _cloned(outputs: Any) -> tuple[Any, Leaves]:
    """Return the outputs with copies of the differentiable ones, and the copies.

    One output may be computed from another; the loss's derivative in a copy does not run through its siblings.
    """
    items, unflatten = tree.flatten_fully(outputs)
    copies: list[Tensor] = []
    for index, item in enumerate(items):
        if isinstance(item, Tensor) and item.requires_grad:
            items[index] = item.clone()
            copies.append(items[index])
    return unflatten(items), tuple(copies)
