"""The Gauss-Newton matrix seen from the outputs: Hessians of the loss there, and the pullback of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func.errors import ArgumentError
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import grad, vjp, vjp_aux
from secorder_func.transforms.gauss_newton import FlatModel, flat_model, outputs_function
from secorder_func.transforms.independence import (
    LOOKED_AT,
    fixed_normal,
    looking,
    outputs_alone,
    same_pullbacks,
)
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.samples import Samples
from secorder_func.typing import LossFn, ModelFn, Tree

__all__ = ["OutputSpace", "space_of_batch", "space_of_samples"]

_MOST_OUTPUTS = 1024
_MOST_ENTRIES = 2**23
_AT_ONCE = 64


@dataclass(frozen=True)
class OutputSpace:
    """What of `J_n^T H_n J_n` is known in the outputs, for every sample or for a batch as one.

    Attributes
    ----------
    hessians
        `(samples, outputs, outputs)`.
    pull
        A range of samples and cotangents of theirs, `(samples, r, outputs)`, to leaves `(samples, r, ...)`.
    """

    hessians: Tensor
    pull: Callable[[slice, Tensor], Leaves]


class _Alone:
    """The model and the loss on one sample, to be mapped over samples.

    Outputs are `(1, ...)` each, those of all samples `(samples, 1, ...)`.
    """

    def __init__(
        self, model_fn: ModelFn, loss_fn: LossFn, params: Tree, samples: Samples, where: str
    ) -> None:
        self._functions = model_fn, loss_fn, params
        self._samples = samples
        self._where = where
        self._last: FlatModel | None = None

    def model(self, row: Leaves) -> FlatModel:
        """Return both for one sample."""
        return flat_model(*self._functions, *self._samples.alone(row), where=self._where)

    def outputs(self, row: Leaves) -> tuple[Leaves, Leaves]:
        """Return the outputs for one sample."""
        model = self._last = self.model(row)
        return model.outputs_at(forward=False, higher=False)(model.leaves)

    def loss(self, at: Leaves, others: Leaves, row: Leaves) -> Tensor:
        """Return the loss of one sample at its outputs."""
        assert self._last is not None
        model = self.model(row).assembling_as(self._last)
        return model.loss_at(others, forward=False, higher=False)(at)

    def pulled(self, row: Leaves, cotangents: Tensor) -> Leaves:
        """Return the pullbacks of several cotangents `(r, outputs)` of one sample."""
        model = self.model(row)
        outputs, pull, _ = vjp_aux(model.outputs_at(forward=False, higher=False), model.leaves)
        found: Leaves = vmap(lambda c: pull(_split(c, outputs))[0])(cotangents)
        return found


def space_of_samples(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    samples: Samples,
    state: RandomState,
    where: str,
) -> OutputSpace | None:
    """Return it for every sample and its own loss, None if there are too many outputs.

    `samples` holds `(inputs, targets)`; random numbers are those of a state.
    """
    alone = _Alone(model_fn, loss_fn, params, samples, where)
    with looking(state):
        outputs, others = _in_chunks(alone.outputs, samples.tensors)

        def total(at: Leaves) -> Tensor:
            losses: Tensor = _mapped(alone.loss)(at, others, samples.tensors)
            return losses.sum()

        hessians = _blocks(total, outputs, samples.count)
    if hessians is None:
        return None
    return OutputSpace(hessians, partial(_pulled, alone, samples, state))


def space_of_batch(
    model: FlatModel,
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    batch: tuple[Any, Any],
    state: RandomState,
) -> OutputSpace | None:
    """Return it for every sample of a batch if samples do not influence each other, else for the whole batch as one.

    Then the matrices add up to that of the loss of the batch. None if there are too many outputs, or complex ones.
    """
    with looking(state):
        outputs_of = model.outputs_at(forward=False, higher=False)
        outputs, pull, others = vjp_aux(outputs_of, model.leaves)
        if any(z.is_complex() or not z.numel() for z in outputs):
            return None
        total = model.loss_at(others, forward=False, higher=False)
        alone, samples = _if_independent(
            model, model_fn, loss_fn, params, batch, outputs, total, state
        )
        hessians = _blocks(total, outputs, None if samples is None else samples.count)
    if hessians is None:
        return None
    if samples is not None:
        return OutputSpace(hessians, partial(_pulled, alone, samples, state))

    def pulled(chunk: slice, cotangents: Tensor) -> Leaves:
        found: Leaves = vmap(lambda c: pull(_split(c, outputs))[0])(cotangents[0])
        return tuple(leaf.unsqueeze(0) for leaf in found)

    return OutputSpace(hessians, pulled)


def _if_independent(
    model: FlatModel,
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    batch: tuple[Any, Any],
    outputs: Leaves,
    total: Callable[[Leaves], Tensor],
    state: RandomState,
) -> tuple[Any, Samples | None]:
    """Return the model on single samples, None where samples depend on each other in the model or in the loss."""
    try:
        samples = Samples.of(batch, model.where)
    except ArgumentError:
        return None, None
    if any(t.shape[:1] != (samples.count,) for t in outputs):
        return None, None
    alone = _Alone(model_fn, loss_fn, params, samples, model.where)

    outputs_of = outputs_function(model_fn, loss_fn, model.unflatten, model.where)
    some = samples.some(LOOKED_AT)
    whole = some.restore(some.tensors)
    try:
        same = same_pullbacks(
            lambda at: outputs_of(at, whole), outputs_alone(outputs_of, some), model.leaves, state
        )
    except Exception:  # alone, or mapped, the model does not work: together it does
        return None, None
    independent = same and _acts_alone(total, outputs, samples.count)
    return alone, samples if independent else None


def _acts_alone(total: Callable[[Leaves], Tensor], outputs: Leaves, count: int) -> bool:
    """Say whether the Hessian of a loss takes the outputs of every sample to that sample's only.

    So it commutes with a random number for each sample.
    """
    _, bend = vjp(grad(total), outputs)
    generator = torch.Generator().manual_seed(count)
    numbers = torch.rand(count, dtype=torch.float64, generator=generator) + 0.5
    vectors = fixed_normal(outputs)

    def scaled(tensors: Leaves) -> Leaves:
        return tuple(_along(numbers, t).to(t) * t for t in tensors)

    (before,), (after,) = bend(scaled(vectors)), bend(vectors)
    size = max(float(t.abs().max()) for t in after)
    apart = max(float((a - b).abs().max()) for a, b in zip(before, scaled(after), strict=True))
    return apart <= 64 * torch.finfo(after[0].dtype).eps * size


def _along(mask: Tensor, t: Tensor) -> Tensor:
    return mask.to(t.device).reshape(-1, *[1] * (t.ndim - 1))


def _blocks(total: Callable[[Leaves], Tensor], outputs: Leaves, count: int | None) -> Tensor | None:
    """Return the Hessian of a sum over samples, block by block; in one block if `count` is None."""
    if count is None:
        count, flat = 1, [t.reshape(1, -1) for t in outputs]
    else:
        flat = [t.reshape(count, -1) for t in outputs]
    sizes = [t.shape[1] for t in flat]
    width = sum(sizes)
    if width > _MOST_OUTPUTS or count * width * width > _MOST_ENTRIES:
        return None
    _, bend = vjp(grad(total), outputs)

    def column(unit: Tensor) -> Tensor:
        parts = unit.expand(count, width).split(sizes, 1)
        at = tuple(p.reshape(t.shape).to(t) for p, t in zip(parts, outputs, strict=True))
        (bent,) = bend(at)
        return torch.cat([b.reshape(count, -1).to(flat[0]) for b in bent], 1)

    units = torch.eye(width, dtype=flat[0].dtype, device=flat[0].device)
    columns: Tensor = vmap(column, chunk_size=_AT_ONCE, randomness="same")(units)
    return columns.transpose(0, 1)


def _pulled(
    alone: _Alone, samples: Samples, state: RandomState, chunk: slice, cotangents: Tensor
) -> Leaves:
    with looking(state):
        found: Leaves = _mapped(alone.pulled)(samples.rows(chunk), cotangents)
        return found


def _split(cotangent: Tensor, outputs: Leaves) -> Leaves:
    parts = cotangent.split([t.numel() for t in outputs])
    return tuple(p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, outputs, strict=True))


def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map over samples, which share what is drawn at random."""
    return vmap(function, randomness="same")


def _in_chunks(function: Callable[..., Any], tensors: Leaves) -> Any:
    return vmap(function, randomness="same", chunk_size=_AT_ONCE)(tensors)
