"""What is summed over batches: the curvature of one batch, by whatever of it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from secorder_func.checks import check_like
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_sums import Batch
from secorder_func.operators.curvature import (
    ggn_forms,
    ggn_operator,
    ggn_rows,
    hessian_forms,
    hessian_operator,
)
from secorder_func.operators.fisher import FisherModel
from secorder_func.operators.forms import FormsLike
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.rows import RowsLike
from secorder_func.transforms.gauss_newton import flat_model, ggnvp
from secorder_func.transforms.hessian import hvp
from secorder_func.transforms.loss import checked_scalar, flat_loss
from secorder_func.typing import LossFn, Mode, Tree

__all__ = ["GaussNewton", "Hessian", "Kind", "Other", "pair"]


class Kind(Protocol):
    """The curvature of the loss of a batch at some parameters; nothing is computed before it is asked for."""

    def product(self, batch: Batch, v: Tree, /) -> Tree:
        """Return the product with one vector, by what is cheapest for one."""

    def operator(self, batch: Batch, /) -> LinearOperator:
        """Return the operator, for several vectors."""

    def forms(self, batch: Batch, /) -> FormsLike | None:
        """Return the forms without products, if there may be such."""

    def rows(self, batch: Batch, /) -> RowsLike | None:
        """Return the outer products, if there may be such."""

    def value(self, batch: Batch, /) -> Tensor | None:
        """Return the loss, if there is one."""


@dataclass(frozen=True)
class Hessian:
    """The Hessian of `f(params, *batch)`."""

    f: LossFn
    params: Tree
    mode: Mode
    check_finite: bool

    def product(self, batch: Batch, v: Tree, /) -> Tree:
        """Return the product with one vector, by what is cheapest for one."""
        multiply = hvp(self.f, mode=self.mode, check_finite=self.check_finite)
        return multiply(self.params, v, *batch.args)

    def operator(self, batch: Batch, /) -> LinearOperator:
        """Return the operator, for several vectors."""
        return hessian_operator(
            self.f, self.params, *batch.args, mode=self.mode, check_finite=self.check_finite
        )

    def forms(self, batch: Batch, /) -> FormsLike | None:
        """Return the forms without products, if there may be such."""
        return hessian_forms(self._loss(batch), batch.args, self.check_finite)

    def rows(self, batch: Batch, /) -> RowsLike | None:
        """Return nothing: a Hessian is no sum of outer products."""
        return None

    def value(self, batch: Batch, /) -> Tensor | None:
        """Return the loss."""
        return checked_scalar(self._loss(batch).eager(), "Batches")

    def _loss(self, batch: Batch) -> Any:
        return flat_loss(
            self.f, self.params, batch.args, {}, has_aux=False, where="hessian_operator"
        )


@dataclass(frozen=True)
class GaussNewton:
    """The Gauss-Newton matrix of what `model_of` makes of a batch: a model, a loss, inputs and targets.

    `has_loss` says whether that loss is the user's, whose value is a mean or a sum over samples.
    """

    model_of: Callable[[Batch], FisherModel]
    params: Tree
    mode: Mode
    check_finite: bool
    has_loss: bool

    def product(self, batch: Batch, v: Tree, /) -> Tree:
        """Return the product with one vector, by what is cheapest for one."""
        model, loss, inputs, targets = self.model_of(batch)
        multiply = ggnvp(model, loss, mode=self.mode, check_finite=self.check_finite)
        return multiply(self.params, v, inputs, targets)

    def operator(self, batch: Batch, /) -> LinearOperator:
        """Return the operator, for several vectors."""
        model, loss, inputs, targets = self.model_of(batch)
        return ggn_operator(
            *(model, loss, self.params, inputs, targets),
            mode=self.mode,
            check_finite=self.check_finite,
        )

    def forms(self, batch: Batch, /) -> FormsLike | None:
        """Return the forms without products, if there may be such."""
        flat, (_, _, *data) = self._flat(batch)
        return ggn_forms(flat, tuple(data), self.check_finite)

    def rows(self, batch: Batch, /) -> RowsLike | None:
        """Return the outer products, if there may be such."""
        if self.check_finite:
            return None
        flat, (model, loss, inputs, targets) = self._flat(batch)
        return ggn_rows(flat, model, loss, self.params, (inputs, targets))

    def value(self, batch: Batch, /) -> Tensor | None:
        """Return the loss, if it is the user's."""
        if not self.has_loss:
            return None
        return checked_scalar(self._flat(batch)[0].eager(), "Batches")

    def _flat(self, batch: Batch) -> tuple[Any, FisherModel]:
        model, loss, inputs, targets = self.model_of(batch)
        flat = flat_model(model, loss, self.params, inputs, targets, where="ggn_operator")
        return flat, (model, loss, inputs, targets)


@dataclass(frozen=True)
class Other:
    """Whatever operator the user makes of a batch."""

    make: Callable[..., LinearOperator]
    like: Tree

    def product(self, batch: Batch, v: Tree, /) -> Tree:
        """Return the product with one vector."""
        return self.operator(batch) @ v

    def operator(self, batch: Batch, /) -> LinearOperator:
        """Return the operator."""
        found: Any = self.make(*batch.args)
        if not isinstance(found, LinearOperator):
            problem = f"make must return a LinearOperator, got {type(found).__name__}"
            raise ArgumentTypeError(message("Batches.operator", problem))
        check_like(found.like, self.like, "Batches.operator", name="make(*batch).like")
        return found

    def forms(self, batch: Batch, /) -> FormsLike | None:
        """Return the forms without products, if there are such."""
        return self.operator(batch).forms

    def rows(self, batch: Batch, /) -> RowsLike | None:
        """Return the outer products, if there are such."""
        return self.operator(batch).rows

    def value(self, batch: Batch, /) -> Tensor | None:
        """Return nothing: the loss is not known."""
        return None


def pair(batch: Batch, where: str) -> tuple[Any, Any]:
    """Return inputs and targets; refuse a batch that is not both."""
    if len(batch.args) != 2:
        problem = f"a batch must be (inputs, targets), got {len(batch.args)} parts"
        mend = "Say how it is both: Batches(data, prepare=lambda batch: (inputs, targets))"
        raise ArgumentError(message(where, problem, mend))
    inputs, targets = batch.args
    return inputs, targets
