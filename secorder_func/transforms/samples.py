"""A batch as samples: each alone is a batch of one, under vmap over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from secorder_func import tree
from secorder_func.errors import ArgumentError, message
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.transforms.loss import Leaves

__all__ = ["Samples", "has_list_of_samples", "refuse_lists_of_samples"]


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

    def some(self, most: int) -> Samples:
        """Return at most so many samples, spread over the batch."""
        if self.count <= most:
            return self
        device = self.tensors[0].device
        index = torch.linspace(0, self.count - 1, most, device=device).round().long()
        return Samples(tuple(t[index.to(t.device)] for t in self.tensors), self.restore)

    def with_others_replaced(self, kept: int) -> Samples:
        """Return the same with the first sample in place of all after the first `kept`."""
        index = torch.arange(self.count)
        index[kept:] = 0
        return Samples(tuple(t[index.to(t.device)] for t in self.tensors), self.restore)


def has_list_of_samples(given: Any, count: int) -> bool:
    """Say whether there is a list beside the tensors with an item for every sample: names, lengths.

    It cannot be taken apart as tensors are. A tuple of numbers may be a shape, and is none.
    """
    if isinstance(given, dict):
        return any(has_list_of_samples(value, count) for value in given.values())
    if not isinstance(given, (list, tuple)):
        return False
    plain = (str, bytes, int, float) if isinstance(given, list) else (str, bytes)
    if len(given) == count > 1 and all(isinstance(item, plain) for item in given):
        return True
    return any(has_list_of_samples(item, count) for item in given)


def refuse_lists_of_samples(batch: Any, count: int, where: str) -> None:
    """Refuse such a list: a sample would get the items of others."""
    if has_list_of_samples(batch, count):
        problem = f"the batch has a list with an item for each of its {count} samples"
        mend = "Make a tensor of it, with samples along its first axis, or bind it to the function"
        raise ArgumentError(message(where, problem, mend))
