"""A model and its mean loss on fixed samples, as the demonstration's measurements take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    PerSampleOperator,
    functional_model,
    ggn_operator,
    hessian_operator,
    per_sample_hessian_operator,
    tree,
)
from secorder_func.typing import LossFn, ModelFn, Tree

__all__ = ["Params", "Problem", "relative_difference", "watched"]

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and its mean loss on fixed samples.

    Attributes
    ----------
    model_fn, loss_fn
        `model_fn(params, inputs) -> outputs`, `loss_fn(outputs, targets) -> loss`, the mean over samples, or with
        `reduction="none"` one loss a sample; both also take one sample without its axis.
    params
        By name; they share memory with the model's.
    inputs, targets
        `(num_samples, ...)`.
    """

    model_fn: ModelFn
    loss_fn: LossFn
    params: Params
    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, model: nn.Module, loss_fn: LossFn, inputs: Tensor, targets: Tensor) -> Problem:
        """Return the problem of a module at its present parameters."""
        model_fn, params = functional_model(model)
        return cls(model_fn, loss_fn, params, inputs, targets)

    def loss(self, params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the samples given, or the loss of one."""
        return self.loss_fn(self.model_fn(params, inputs), targets)

    def losses(self, params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample given."""
        return self.loss_fn(self.model_fn(params, inputs), targets, reduction="none")

    def hessian(self) -> LinearOperator:
        """Return the Hessian of the mean loss."""
        return hessian_operator(self.loss, self.params, self.inputs, self.targets)

    def sample_hessians(self) -> PerSampleOperator:
        """Return the Hessian of the loss of every sample."""
        return per_sample_hessian_operator(self.losses, self.params, self.inputs, self.targets)

    def gauss_newton(self) -> LinearOperator:
        """Return the Gauss-Newton matrix of the mean loss."""
        return ggn_operator(self.model_fn, self.loss_fn, self.params, self.inputs, self.targets)

    def frozen(self) -> Problem:
        """Return the problem with a copy of its parameters, which training does not move."""
        return replace(self, params={name: p.clone() for name, p in self.params.items()})


def relative_difference(value: Tree, reference: Tree) -> float:
    """Return `|value - reference| / |reference|` of two trees."""
    return float(tree.norm(tree.sub(value, reference)) / tree.norm(reference))


def watched(op: LinearOperator, advance: Callable[[int], None]) -> LinearOperator:
    """Return the same operator, which calls `advance` with the number of products it has just made."""

    def matvec(v: Tree) -> Tree:
        result = op.matvec(v)
        advance(1)
        return result

    def matmat(vectors: Tree) -> Tree:
        result = op.mm(vectors)
        advance(tree.flatten(vectors)[0][0].shape[0])
        return result

    return replace(op, matvec=matvec, matmat=matmat, quadratic=None, forms=None)
