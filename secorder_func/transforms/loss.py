"""A user's loss as the pure function of flat leaves that torch's transforms are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_params
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.typing import LossFn, Tree

__all__ = ["FlatLoss", "LeafLoss", "checked_scalar", "exchanged", "flat_loss"]

Leaves = tuple[Tensor, ...]
LeafLoss = Callable[[Leaves], tuple[Tensor, Leaves]]
"""Leaves -> (0-dim loss, the tensors of the auxiliary output)."""


@dataclass
class FlatLoss:
    """A loss with everything but the leaves of its parameters bound.

    `at(forward=..., higher=...)` is the function to differentiate; `aux` puts the auxiliary output of the last
    evaluation together again.

    Attributes
    ----------
    evaluate
        Leaves -> what the user's function returns.
    leaves
        Where to differentiate.
    originals
        For a closure, which takes no leaves: the tensors that stand for them in it, to be exchanged by identity.
    verify
        Called with the rules and the loss after an evaluation, to refuse it.
    """

    evaluate: Callable[[Leaves], Any]
    leaves: Leaves
    unflatten: tree.Unflatten
    has_aux: bool
    where: str
    originals: Leaves | None = None
    verify: Callable[[SecondOrderRules, Tensor], None] | None = None
    _restore_aux: tree.Unflatten | None = None

    def at(self, *, forward: bool, higher: bool) -> LeafLoss:
        """Return the loss under the rules for the derivatives that are taken of it."""

        def loss(leaves: Leaves) -> tuple[Tensor, Leaves]:
            return evaluated(
                lambda rules: self.verified(rules, leaves),
                forward=forward,
                higher=higher,
                exchange=exchanged(self.originals, leaves),
                protect=leaves,
            )

        return loss

    def verified(self, rules: SecondOrderRules, leaves: Leaves) -> tuple[Tensor, Leaves]:
        """Return what `plain` does, if it is not refused."""
        value, aux = self.plain(leaves)
        if self.verify is not None:
            self.verify(rules, value)
        return value, aux

    def plain(self, leaves: Leaves) -> tuple[Tensor, Leaves]:
        """Return the 0-dim loss and the tensors of the auxiliary output, under whatever rules are in force."""
        value, aux = self._split(self.evaluate(leaves))
        return checked_scalar(value, self.where), self._pack(aux)

    def eager(self) -> object:
        """Evaluate plainly, for the errors of the user's own function."""
        protect = self.originals or self.leaves
        return evaluated(
            lambda rules: self.evaluate(self.leaves), forward=False, higher=False, protect=protect
        )

    def _split(self, output: Any) -> tuple[Any, Any]:
        if not self.has_aux:
            return output, None
        if not (isinstance(output, tuple) and len(output) == 2):
            given = type(output).__name__
            raise ArgumentTypeError(
                message(
                    self.where,
                    f"with has_aux=True the function must return (loss, aux), got {given}",
                )
            )
        return output

    def _pack(self, aux: Any) -> Leaves:
        """Take the tensors out of `aux`, which may hold anything: torch's transforms carry tensors only."""
        tensors, self._restore_aux = tree.tensors_and_rest(aux)
        return tensors

    def aux(self, tensors: Leaves) -> Any:
        """Return the auxiliary output of the last evaluation with these tensors in it."""
        assert self._restore_aux is not None
        return self._restore_aux(tensors)


def exchanged(originals: Leaves | None, leaves: Leaves) -> list[tuple[Tensor, Tensor]] | None:
    """Return the pairs to exchange by identity in a closure."""
    return None if originals is None else list(zip(originals, leaves, strict=True))


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
    check_callable(f, where)
    check_params(params, where)
    params, args, kwargs = without_inference_tensors((params, args, kwargs))
    leaves, unflatten = tree.flatten(params)

    def evaluate(leaves: Leaves) -> Any:
        return f(unflatten(leaves), *args, **kwargs)

    return FlatLoss(evaluate, tuple(leaves), unflatten, has_aux, where)


def checked_scalar(loss: Any, where: str) -> Tensor:
    """Return a loss of one element as a 0-dim tensor; refuse anything else."""
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(
            message(where, f"the loss must be a tensor with one element, got {type(loss).__name__}")
        )
    if loss.numel() != 1:
        raise ArgumentError(
            message(
                where,
                f"the loss must have one element, got shape {tuple(loss.shape)}",
                "Reduce it with .sum() or .mean(), or use torch.func.vmap for one product per sample",
            )
        )
    if not loss.is_floating_point():
        raise ArgumentError(
            message(
                where,
                f"the loss must be real and floating, got {loss.dtype}",
                "Take .real or .abs() of it",
            )
        )
    return torch.reshape(loss, ())
