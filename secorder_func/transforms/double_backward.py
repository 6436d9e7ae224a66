"""Hessian-vector products by plain autograd, twice.

The last resort, for what only plain autograd differentiates (a custom `autograd.Function` without `setup_context`,
activation checkpointing); and the way of a closure to a result with a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.cut_graphs import History, refuse_unrecorded_backwards
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.plain_autograd import (
    PlainEvaluation,
    gradients,
    or_zeros,
    paired,
    pull,
    pull_several,
    recording,
    to_differentiate,
)

__all__ = ["DoubleBackward", "plain_gradient"]


class DoubleBackward:
    """The product with a Hessian, by two backward passes.

    The loss is evaluated here, once. Parameters that it does not use get zeros.

    Parameters
    ----------
    evaluate
        `() -> loss`, a 0-dim tensor, computed from `params` as they are.
    params
        Where to differentiate; tensors that require gradients.
    create_graph
        Whether products can be differentiated again.

    Attributes
    ----------
    gradient
        Its leaves, None where the loss does not depend on a parameter or has no derivative in it.
    """

    def __init__(
        self, evaluate: Callable[[], Tensor], params: Leaves, *, create_graph: bool = False
    ) -> None:
        self.params = params
        self.create_graph = create_graph
        self._evaluation = PlainEvaluation(
            lambda: (evaluate(),),
            params,
            create_graph=create_graph,
        )
        self.gradient = self._differentiated()
        if self._evaluation.calls_python:  # nodes of torch's own have a derivative or raise
            roots = [g.grad_fn for g in self.gradient if g is not None and g.requires_grad]
            History(roots).refuse_cuts()

    def _differentiated(self) -> list[Tensor | None]:
        (loss,), history = self._evaluation.outputs, self._evaluation.history
        if not loss.requires_grad:
            return [None] * len(self.params)
        history.refuse_cuts()
        with (
            self._evaluation.differentiating(),
            refuse_unrecorded_backwards(history.custom) as custom,
        ):
            seed = [torch.ones_like(loss, requires_grad=True)] if custom else None
            return gradients([loss], self.params, seed, create_graph=True)

    def __call__(self, vector: Leaves) -> Leaves:
        """Return the product with one vector."""
        pairs = paired(self.gradient, vector)
        with self._evaluation.differentiating():
            return pull(pairs, self.params, create_graph=self.create_graph)

    def several(self, vectors: Leaves) -> Leaves:
        """Return the products with vectors stacked along a leading axis."""
        pairs = paired(self.gradient, vectors)
        with self._evaluation.differentiating():
            return pull_several(pairs, self.params, self.create_graph, vectors[0].shape[0])

    def block(self, index: int, vectors: Tensor) -> Tensor:
        """Return the products of stacked vectors with the diagonal block of one parameter."""
        pairs = paired(self.gradient[index : index + 1], (vectors,))
        with self._evaluation.differentiating():
            own = (self.params[index],)
            (found,) = pull_several(pairs, own, self.create_graph, vectors.shape[0])
        return found


def plain_gradient(
    loss: Callable[[Leaves], tuple[Tensor, Leaves]], leaves: Leaves, *, differentiable: bool
) -> Leaves:
    """Return the gradient of a loss by plain autograd, at tensors made for it."""
    at = to_differentiate(leaves, differentiable=differentiable)

    def differentiate(rules: SecondOrderRules) -> list[Tensor | None]:
        value = loss(at)[0]
        if not value.requires_grad:
            return [None] * len(at)
        return gradients([value], at, create_graph=differentiable)

    with recording():
        found = evaluated(differentiate, forward=False, higher=differentiable, protect=at)
    return or_zeros(found, at)
