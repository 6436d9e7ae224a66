"""A user's loss as the pure function of flat leaves that torch's transforms are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import message
from secorder_func.rules import evaluation
from secorder_func.typing import LossFn, Tree

__all__ = ["FlatLoss", "LeafLoss", "checked_scalar", "flat_loss"]

Leaves = tuple[Tensor, ...]
LeafLoss = Callable[[Leaves], tuple[Tensor, Leaves]]
"""Leaves -> (0-dim loss, the tensors of the auxiliary output)."""


@dataclass
class FlatLoss:
    """A loss `f(params, *args, **kwargs)` with everything but the leaves of `params` bound.

    `at(forward=..., higher=...)` is the function to differentiate; `aux` puts the auxiliary output of the last
    evaluation together again.
    """

    evaluate: Callable[[Leaves], Any]
    leaves: Leaves
    unflatten: tree.Unflatten
    has_aux: bool
    where: str
    _aux_skeleton: tuple[list[Any], tree.Unflatten] | None = None

    def at(self, *, forward: bool, higher: bool) -> LeafLoss:
        """Return the loss under the rules for the derivatives that are taken of it."""

        def loss(leaves: Leaves) -> tuple[Tensor, Leaves]:
            with evaluation(forward=forward, higher=higher):
                output = self.evaluate(leaves)
            value, aux = self._split(output)
            return checked_scalar(value, self.where), self._pack(aux)

        return loss

    def _split(self, output: Any) -> tuple[Any, Any]:
        if not self.has_aux:
            return output, None
        if not (isinstance(output, tuple) and len(output) == 2):
            given = type(output).__name__
            raise TypeError(
                message(
                    self.where,
                    f"with has_aux=True the function must return (loss, aux), got {given}",
                )
            )
        return output

    def _pack(self, aux: Any) -> Leaves:
        """Take the tensors out of `aux`, which may hold anything: torch's transforms carry tensors only."""
        items, unflatten = tree.flatten(aux)
        self._aux_skeleton = ([None if isinstance(x, Tensor) else x for x in items], unflatten)
        return tuple(x for x in items if isinstance(x, Tensor))

    def aux(self, tensors: Leaves) -> Any:
        """Return the auxiliary output of the last evaluation with these tensors in it."""
        assert self._aux_skeleton is not None
        items, unflatten = self._aux_skeleton
        remaining = iter(tensors)
        return unflatten([next(remaining) if item is None else item for item in items])


def flat_loss(
    f: LossFn,
    params: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
    where: str,
) -> FlatLoss:
    """Bind everything but the leaves of `params`, which are checked."""
    tree.check_params(params, where)
    leaves, unflatten = tree.flatten(params)

    def evaluate(leaves: Leaves) -> Any:
        return f(unflatten(leaves), *args, **kwargs)

    return FlatLoss(evaluate, tuple(leaves), unflatten, has_aux, where)


def checked_scalar(loss: Any, where: str) -> Tensor:
    """Return a loss of one element as a 0-dim tensor; refuse anything else."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            message(where, f"the loss must be a tensor with one element, got {type(loss).__name__}")
        )
    if loss.numel() != 1:
        raise ValueError(
            message(
                where,
                f"the loss must have one element, got shape {tuple(loss.shape)}",
                "Reduce it with .sum() or .mean(), or use torch.func.vmap for one product per sample",
            )
        )
    if not loss.is_floating_point():
        raise ValueError(
            message(
                where,
                f"the loss must be real and floating, got {loss.dtype}",
                "Take .real or .abs() of it",
            )
        )
    return torch.reshape(loss, ())
