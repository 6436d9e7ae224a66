"""What the loss of a batch was averaged over."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_sums import Args, Batch, BatchSums
from secorder_func.rules.in_double import InDouble, widened
from secorder_func.transforms.fisher import Reduction
from secorder_func.transforms.samples import has_list_of_samples

__all__ = ["BatchWeights", "Value", "Weight"]

Value: TypeAlias = "Callable[[Batch], Tensor | None]"
"""A batch -> its loss, if there is one."""
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

    def require_right(self, value: Value, sums: BatchSums, batch: Batch) -> None:
        """Refuse weights and a reduction that the losses of the parts of a batch contradict.

        Of a loss that was fitted, little but rounding may be left: what contradicts is looked at again in double
        precision, to the same tolerance.
        """
        parts = self._parts(value, sums, batch)
        if parts is None or parts.add_up is not False:
            return
        with suppress(Exception), InDouble():  # there may be no such
            again = self._parts(value, sums, replace(batch, args=widened(batch.args)))
            if again is not None and replace(again, eps=parts.eps).add_up:
                return
        mean = self.reduction == "mean"
        what = "weights times losses" if mean else "losses"
        problem = (
            f"the loss of batch {batch.index} is not the {self.reduction} of the losses of its first {parts.cut} and "
            f"last {parts.count - parts.cut} samples: {what} are {parts.whole:.6g} of all and {parts.first:.6g} + "
            f"{parts.rest:.6g} of the parts"
        )
        mend = (
            "If the loss is a sum, take Batches(data, reduction='sum'); if it is a mean over something else than "
            "samples, tokens say, Batches(data, weight=...), by what the loss of a batch is averaged over"
            if mean
            else "If the loss is a mean, take Batches(data, reduction='mean')"
        )
        mend += (
            ". If samples of a batch influence each other (batch normalisation in training mode), or the loss "
            "has a term of the parameters alone, and that is meant, take Batches(data, check_weights=False)"
        )
        raise ArgumentError(message(sums.where, problem, mend))

    def _parts(self, value: Value, sums: BatchSums, batch: Batch) -> _Parts | None:
        """Return the losses of a batch and of two parts of it; None where that says nothing."""
        tensors, restore = tree.tensors_and_rest(batch.args)
        counts = {t.shape[0] if t.ndim else 0 for t in tensors}
        count = counts.pop() if len(counts) == 1 else 0
        if count < 2 or has_list_of_samples(batch.args, count):
            return None  # it cannot be split
        cut = max(count // 3, min(2, count // 2))  # of one alone some losses are not defined
        halves = [restore([t[rows] for t in tensors]) for rows in (slice(cut), slice(cut, None))]
        state = sums.randomness(batch)
        terms = []
        for args in (batch.args, *halves):
            weight = self._of(args) if self.reduction == "mean" else 1.0
            with state.replayed(), torch.no_grad():
                try:
                    loss = value(replace(batch, args=args)) if weight else torch.zeros(())
                except Exception:
                    if args is batch.args:
                        raise
                    return None  # of so few samples there is no loss
                if loss is None or state.has_changed():
                    return None  # there is none, or its parts would draw other random numbers
            terms.append(weight * float(loss))
            eps = torch.finfo(loss.dtype).eps
        whole, first, rest = terms
        return _Parts(count, cut, whole, first, rest, eps)


@dataclass(frozen=True)
class _Parts:
    """What a batch contributes to the loss, and the first samples and the rest of it."""

    count: int
    cut: int
    whole: float
    first: float
    rest: float
    eps: float

    @property
    def add_up(self) -> bool | None:
        """Whether the parts are the whole, but for rounding; None if they are not finite."""
        terms = self.whole, self.first, self.rest
        if not all(map(math.isfinite, terms)):
            return None
        apart = abs(self.whole - self.first - self.rest)
        return apart <= math.sqrt(self.eps) * max(map(abs, terms))
