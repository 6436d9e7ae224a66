"""The loss under verification: its value, gradient and products, always from one random state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.rules import SecondOrderRules, evaluated
from secorder_func.rules.backward import grad_under_rules
from secorder_func.rules.in_double import InDouble, widened
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import grad
from secorder_func.transforms.hessian import hvp
from secorder_func.transforms.loss import FlatLoss, Leaves, checked_scalar, flat_loss
from secorder_func.typing import LossFn, Mode, Tree
from secorder_func.verify._lenses import HoldingNothing

__all__ = ["WHERE", "Problem"]

WHERE = "verify"


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss at a point, with what repeats it.

    Attributes
    ----------
    f, params, args, kwargs
        As `verify` is given them, the parameters detached.
    start
        Where every evaluation finds torch's generators.
    """

    f: LossFn
    params: Tree
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: RandomState

    @cached_property
    def flat(self) -> FlatLoss:
        """The loss as a function of leaves."""
        return flat_loss(self.f, self.params, self.args, self.kwargs, has_aux=False, where=WHERE)

    @property
    def leaves(self) -> Leaves:
        """The point."""
        return self.flat.leaves

    def value(self, at: Leaves) -> Tensor:
        """Return the loss."""
        self.start.restore()
        return self.flat.at(forward=False, higher=False)(at)[0]

    def recorded(self, at: Leaves) -> tuple[Tensor, Leaves]:
        """Return the loss with its autograd history, and the leaves that the history ends in."""
        at = _variables(at)
        with torch.enable_grad():
            return self.value(at), at

    def gradient(self, at: Leaves) -> Leaves:
        """Return the gradient by plain autograd, as in training."""
        self.start.restore()
        at = _variables(at)

        def differentiate(rules: SecondOrderRules) -> Leaves:
            value = checked_scalar(self.flat.evaluate(at), WHERE)
            if not value.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in at)
            found = grad_under_rules([value], at, allow_unused=True)
            return tuple(
                torch.zeros_like(leaf) if g is None else g.detach()
                for g, leaf in zip(found, at, strict=True)
            )

        with torch.enable_grad():
            return evaluated(differentiate, forward=False, higher=False, protect=at)

    def transformed_gradient(self, at: Leaves) -> Leaves:
        """Return the gradient by torch.func, which products are made of.

        From one state it may draw other random numbers than plain autograd: dropout fills the mask of an input that is
        not contiguous in another order.
        """
        self.start.restore()
        gradient: Leaves = grad(self.flat.at(forward=False, higher=False), has_aux=True)(at)[0]
        return gradient

    def gradients(self, *, random: bool) -> list[Callable[[Leaves], Leaves]]:
        """Return the gradients of which a product may be the derivative; they differ only where numbers are drawn."""
        return [self.gradient, self.transformed_gradient] if random else [self.gradient]

    def product(self, mode: Mode, vector: Leaves) -> Leaves:
        """Return the exact product `H v` by one mode."""
        self.start.restore()
        v = self.flat.unflatten(vector)
        return tuple(
            tree.flatten(hvp(self.f, mode=mode)(self.params, v, *self.args, **self.kwargs))[0]
        )

    def differentiated(self, v: Leaves | None) -> None:
        """Take the gradient, and with `v` a product, by plain autograd, for what torch says on the way."""
        value, at = self.recorded(self.leaves)
        gradient: Any = torch.autograd.grad(
            value, at, create_graph=v is not None, allow_unused=True
        )
        if v is None:
            return
        pairs = [
            (g, leaf)
            for g, leaf in zip(gradient, v, strict=True)
            if g is not None and g.requires_grad
        ]
        if pairs:
            torch.autograd.grad([g for g, _ in pairs], at, [w for _, w in pairs], allow_unused=True)

    def started_at(self, start: RandomState) -> Problem:
        """Return the problem with other random numbers."""
        return replace(self, start=start)

    def looked_at(self, lens: Callable[[], AbstractContextManager[Any]]) -> Problem:
        """Return the problem with every evaluation of the user's function inside a lens."""
        f = self.f

        def through_lens(*args: Any, **kwargs: Any) -> Any:
            with lens():
                return f(*args, **kwargs)

        return replace(self, f=through_lens)

    def holding_nothing(self) -> Problem:
        """Return the problem in which `detach`, `.data` and `no_grad` hold nothing constant."""
        return self.looked_at(HoldingNothing)

    def in_double(self) -> Problem:
        """Return the problem in double precision."""
        return replace(self.looked_at(InDouble), params=widened(self.params))


def _variables(leaves: Leaves) -> Leaves:
    return tuple(leaf.detach().requires_grad_() for leaf in leaves)
