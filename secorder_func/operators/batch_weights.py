"""What the loss of a batch was averaged over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_sums import Args, Batch, BatchSums
from secorder_func.transforms.fisher import Reduction

__all__ = ["BatchWeights", "Weight"]

Weight: TypeAlias = "Callable[..., float | Tensor]"


class BatchWeights:
    """By what batches count: the user's `weight(*batch)`, or the number of samples.

    Parameters
    ----------
    reduction, weight
        As for `Batches`.
    """

    def __init__(self, reduction: Reduction, weight: Weight | None) -> None:
        self.reduction = reduction
        self._weight = weight
        self._shapes: Any = None

    def counted(self, instead: Callable[[Args], float] | None) -> Callable[[Args], float] | None:
        """Return what counts a batch, None for sums; `instead` of the number of samples, if the user gave nothing."""
        if self.reduction == "sum":
            return None
        return instead if instead is not None and self._weight is None else self._of

    def _of(self, args: Args) -> float:
        return self._number_of_samples(args) if self._weight is None else self._users(args)

    def _users(self, args: Args) -> float:
        assert self._weight is not None
        weight: Any = self._weight(*args)
        one = isinstance(weight, Tensor) and weight.numel() == 1
        if not one and not isinstance(weight, (int, float)):
            given = tuple(weight.shape) if isinstance(weight, Tensor) else repr(weight)
            problem = f"weight(*batch) must return a number, got {given}"
            raise ArgumentTypeError(message("Batches", problem, "Sum what counts in a batch"))
        number = float(weight)
        if not 0 <= number < math.inf:
            problem = f"weight must return a number from 0 on, got {number}"
            raise ArgumentError(message("Batches", problem))
        return number

    def _number_of_samples(self, args: Args) -> float:
        tensors = tree.tensors_in(args)
        mend = "Pass weight=, what the loss of a batch is averaged over"
        if not tensors:
            kinds = ", ".join(type(arg).__name__ for arg in args) or "nothing"
            problem = f"a batch has no tensor, but {kinds}"
            raise ArgumentTypeError(
                message("Batches", problem, "Pass prepare=, which makes tensors of a batch")
            )
        if not tensors[0].ndim:
            problem = "the first tensor of a batch has no leading axis of samples"
            raise ArgumentError(message("Batches", problem, mend))
        shapes = [tuple(t.shape[1:]) for t in tensors]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes:
            problem = (
                f"samples of different batches have different shapes, {shapes} after {self._shapes}: "
                "their number may not be what the loss is averaged over"
            )
            raise ArgumentError(message("Batches", problem, mend))
        return float(tensors[0].shape[0])

    def require_right(
        self, value: Callable[[Batch], Tensor | None], sums: BatchSums, batch: Batch
    ) -> None:
        """Refuse weights and a reduction that the losses of the parts of a batch contradict."""
        tensors, restore = tree.tensors_and_rest(batch.args)
        counts = {t.shape[0] if t.ndim else 0 for t in tensors}
        count = counts.pop() if len(counts) == 1 else 0
        if count < 2:
            return  # it cannot be split
        cut = max(count // 3, min(2, count // 2))  # of one alone some losses are not defined
        halves = [restore([t[rows] for t in tensors]) for rows in (slice(cut), slice(cut, None))]
        state = sums.randomness(batch)
        terms = []
        for args in (batch.args, *halves):
            weight = self._of(args) if self.reduction == "mean" else 1.0
            with state.replayed(), torch.no_grad():
                try:
                    found = value(replace(batch, args=args)) if weight else torch.zeros(())
                except Exception:
                    if args is batch.args:
                        raise
                    return  # of so few samples there is no loss
                if found is None or state.has_changed():
                    return  # there is none, or its parts would draw other random numbers
            terms.append(weight * float(found))
            eps = torch.finfo(found.dtype).eps
        whole, *both = terms
        if not all(map(math.isfinite, terms)):
            return
        if abs(whole - sum(both)) > math.sqrt(eps) * max(map(abs, terms)):
            mean = self.reduction == "mean"
            what = "weights times losses" if mean else "losses"
            problem = (
                f"the loss of batch {batch.index} is not the {self.reduction} of the losses of its first {cut} and "
                f"last {count - cut} samples: {what} are {whole:.6g} of all and {both[0]:.6g} + {both[1]:.6g} of the "
                "parts"
            )
            mend = (
                "Pass weight=, what the loss of a batch is averaged over, or reduction='sum'"
                if mean
                else "Pass reduction='mean'"
            )
            mend += (
                ". If samples of a batch influence each other (batch normalisation in training mode), or the loss "
                "has a term of the parameters alone, and that is meant, pass check_weights=False"
            )
            raise ArgumentError(message(sums.where, problem, mend))
