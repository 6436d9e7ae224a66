"""A batch as samples that are looked at alone: each is a batch of one, under vmap over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secorder_func import tree
from secorder_func.errors import ArgumentError, message
from secorder_func.rules import evaluated
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import Leaves

__all__ = [
    "MIXED",
    "Samples",
    "agree",
    "evaluated_alone",
    "refuse_coupled_losses",
    "watched_for_mixing",
]

MIXED = "the samples of the batch influence each other"


@dataclass(frozen=True)
class Samples:
    """The tensors of a batch, `(samples, ...)` each, and how to put some of them back into what holds them."""

    tensors: Leaves
    restore: tree.Unflatten

    @staticmethod
    def of(batch: Any, where: str) -> Samples:
        """Take a batch apart; refuse one whose tensors have no common leading axis."""
        tensors, restore = tree.tensors_and_rest(without_inference_tensors(batch))
        lengths = sorted({str(t.shape[0]) if t.ndim else "none" for t in tensors})
        if lengths == ["0"]:
            raise ArgumentError(message(where, "the batch has no samples"))
        if len(lengths) != 1 or lengths == ["none"]:
            problem = (
                f"every tensor of the batch needs the same leading axis of samples, got lengths "
                f"{', '.join(lengths) or 'of no tensor'}"
            )
            mend = "Bind what all samples share to the function (functools.partial)"
            raise ArgumentError(message(where, problem, mend))
        return Samples(tensors, restore)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return int(self.tensors[0].shape[0])

    def rows(self, chunk: slice) -> Leaves:
        """Return the tensors of some samples."""
        return tuple(t[chunk] for t in self.tensors)

    def batch(self, chunk: slice) -> Any:
        """Return the batch of some samples."""
        return self.restore(self.rows(chunk))

    def alone(self, row: Leaves) -> Any:
        """Return a batch of one out of the tensors of one sample."""
        return self.restore([t.unsqueeze(0) for t in row])


def watched_for_mixing(evaluate: Callable[[], Any], leaves: Leaves, where: str) -> tuple[Any, bool]:
    """Return what `evaluate` does, and whether it drew random numbers; refuse batch statistics.

    Modules are left as they are, random generators too.
    """
    state = RandomState.now(leaves)
    with state.replayed():

        def watched(rules: Any) -> Any:
            with _BatchStatistics(where):
                return evaluate()

        result = evaluated(watched, forward=False, higher=False, protect=leaves)
        return result, state.has_changed()


def evaluated_alone(evaluate: Callable[[], Any], leaves: Leaves) -> Any:
    """Return what `evaluate` does, under the rules, with all modules left as they are."""
    return evaluated(lambda rules: evaluate(), forward=False, higher=False, protect=leaves)


class _BatchStatistics(TorchFunctionMode):
    """Refuses to normalise over the samples of a batch."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            named = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
            if named.get("training") or named.get("running_mean") is None:
                problem = f"{MIXED}: batch normalisation uses the statistics of the batch"
                mend = "Put the module into eval mode, or replace BatchNorm (GroupNorm, LayerNorm)"
                raise ArgumentError(message(self._where, problem, mend))
        return func(*args, **kwargs)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")


def agree(batch: Tensor, alone: Tensor) -> bool:
    """Say whether samples give the same in a batch as they do alone, but for rounding."""
    if batch.shape != alone.shape:
        return False
    size = torch.nan_to_num(alone.detach().abs(), posinf=0.0).amax() if alone.numel() else 0.0
    atol = float(size) * torch.finfo(alone.dtype).eps ** 0.5
    near = torch.isclose(batch.detach(), alone.detach(), rtol=0.0, atol=atol, equal_nan=True)
    return bool(near.all())


def refuse_coupled_losses(loss_of: Callable[[slice], Tensor], alone: Tensor, where: str) -> bool:
    """Return whether a batch has one loss a sample; refuse one that does not consist of those that samples have alone.

    A single number must be the sum, or the mean, of the whole batch and of its halves.
    """
    count = len(alone)
    value = loss_of(slice(0, count))
    if value.shape == (count,):
        if not agree(value, alone):
            problem = f"{MIXED}: in the batch they have other losses than alone"
            raise ArgumentError(message(where, problem, "Take out what looks at other samples"))
        return True
    half = count // 2
    parts = [slice(0, count), *([slice(0, half), slice(half, count)] if half else [])]
    numbers = [value, *map(loss_of, parts[1:])]
    for reduced in (torch.sum, torch.mean):
        if all(_close(n, reduced(alone[part])) for n, part in zip(numbers, parts, strict=True)):
            return False
    total, mean = float(alone.sum()), float(alone.mean())
    problem = (
        f"{MIXED}, or are weighted: the loss of the batch is {float(value):.6g}, neither the sum {total:.6g} nor "
        f"the mean {mean:.6g} of the losses that they have alone, or so for half of the batch"
    )
    missing = int(alone.isnan().sum())
    if missing:
        problem = f"{missing} of {count} samples have a loss of NaN alone, as by ignored targets"
    raise ArgumentError(message(where, problem, "Return one loss a sample (reduction='none')"))


def _close(number: Tensor, other: Tensor) -> bool:
    """Say whether two numbers are one but for rounding."""
    wide = torch.promote_types(other.dtype, torch.float32)
    a, b = float(number.detach()), float(other.detach())
    eps = torch.finfo(other.dtype).eps
    return abs(a - b) <= (128 if other.dtype == wide else 4) * eps * max(abs(a), abs(b))
