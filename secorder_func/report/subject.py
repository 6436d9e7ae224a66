"""What a report is about: a loss, its parameters, its data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secorder_func import (
    Batches,
    LinearOperator,
    ggn_operator,
    hessian_operator,
    running,
    tree,
)
from secorder_func.errors import ArgumentError
from secorder_func.typing import LossFn, ModelFn, Tree

__all__ = ["Subject"]

Shape = tuple[int, ...]


@dataclass(eq=False)
class Subject:
    """A loss, its parameters and its data.

    Attributes
    ----------
    title
        For people.
    f, params
        `f(params, *batch) -> loss`.
    batch, batches
        The only batch, or all of them where they are several; the other one is None.
    model_fn, loss_fn
        `model_fn(params, inputs)` and `loss_fn(outputs, targets)`, where there is a model apart from its loss.
    image_shape
        Of a sample's inputs as a picture, where these are flat.
    facts
        More for the headline.
    """

    title: str
    f: LossFn
    params: Tree
    batch: tuple[Any, ...] | None
    batches: Batches | None
    model_fn: ModelFn | None = None
    loss_fn: LossFn | None = None
    image_shape: Shape | None = None
    facts: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return tree.numel(self.params)

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        return str(tree.common_dtype(self.params)).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        device: torch.device = tree.flatten(self.params)[0][0].device
        return device

    @cached_property
    def first_batch(self) -> tuple[Any, ...]:
        """The only batch, or the first."""
        if self.batch is not None:
            return self.batch
        return next(self._read())

    @cached_property
    def sizes(self) -> list[int | None]:
        """How many samples each batch has: the leading axis of its first tensor, None if it has none."""
        found = []
        for batch in self._read():
            found.append(_length(batch))
            running.look()
        return found

    @property
    def num_samples(self) -> int | None:
        """How many samples there are, None if that cannot be said."""
        if any(size is None for size in self.sizes):
            return None
        return sum(size or 0 for size in self.sizes)

    def _read(self) -> Iterator[tuple[Any, ...]]:
        if self.batches is None:
            assert self.batch is not None
            yield self.batch
            return
        yield from self.batches.read(self.device)

    def loss_and_gradient(self) -> tuple[Tensor, Tree]:
        """Return the loss of all data and its gradient."""
        batches = self.batches
        if batches is None:
            batches = Batches([self.batch], reduction="sum", check_weights=False)
        try:
            return batches.loss_and_gradient(self.f, self.params)
        except ArgumentError as error:
            raise ArgumentError(_of_the_loader(str(error))) from error

    @cached_property
    def hessian(self) -> LinearOperator:
        """The Hessian of the loss of all data."""
        if self.batches is not None:
            return self.batches.hessian_operator(self.f, self.params)
        assert self.batch is not None
        return hessian_operator(self.f, self.params, *self.batch)

    @cached_property
    def gauss_newton(self) -> LinearOperator | None:
        """The Gauss-Newton matrix of the loss of all data; None where there is no model apart from the loss."""
        if self.model_fn is None or self.loss_fn is None:
            return None
        if self.batches is not None:
            return self.batches.ggn_operator(self.model_fn, self.loss_fn, self.params)
        assert self.batch is not None
        return ggn_operator(self.model_fn, self.loss_fn, self.params, *self.batch)

    def headline(self) -> str:
        """Return what is measured, in one line."""
        parts = [_counted(self.num_params, "parameter")]
        if self.num_samples is not None:
            parts.append(_counted(self.num_samples, "sample"))
        if self.batches is not None:
            parts.append(_counted(len(self.sizes), "batch", "batches"))
        return ", ".join([*parts, self.dtype, str(self.device), *self.facts])

    def picture(self, sample: Tensor) -> Tensor | None:
        """Return a sample's inputs as `(H, W)` or `(H, W, 3)` from 0 to 1, None if they do not look like an image."""
        if self.image_shape is not None and sample.numel() == math.prod(self.image_shape):
            sample = sample.reshape(1, *self.image_shape)
        if sample.ndim != 3 or sample.shape[0] not in (1, 3) or min(sample.shape[1:]) < 4:
            return None
        if sample.dtype == torch.bool or sample.is_complex():
            return None
        image = sample.detach().double().cpu()
        low, high = image.min(), image.max()
        image = (image - low) / (high - low if high > low else 1)
        return image[0] if len(image) == 1 else image.permute(1, 2, 0)


def _of_the_loader(text: str) -> str:
    """Turn what `Batches` says to its users into words for those who gave a loader."""
    meant = text.replace(
        "take Batches(data, reduction='sum')",
        "give Batches(loader, reduction='sum') in place of the loader",
    )
    return meant.replace("Batches(data,", "Batches(loader,")


def _length(batch: tuple[Any, ...]) -> int | None:
    tensors = tree.tensors_in(*batch)
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else None


def _counted(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
