"""A loss and its gradient, as the transforms evaluate it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.torch_func import vjp_aux
from secorder_func.transforms.loss import checked_scalar, flat_loss
from secorder_func.typing import LossFn, Tree

__all__ = ["value_and_gradient"]


def value_and_gradient(
    f: LossFn, params: Tree, args: tuple[Any, ...], where: str, *, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return `f(params, *args)`, 0-dim, and the leaves of its gradient, none if it is not wanted; both detached."""
    loss = flat_loss(f, params, args, {}, has_aux=False, where=where)
    if not gradient:
        with torch.no_grad():
            return checked_scalar(loss.eager(), where).detach(), []
    with out_of_inference_mode():
        value, pull, _ = vjp_aux(loss.at(forward=False, higher=False), loss.leaves)
        return value.detach(), [leaf.detach() for leaf in pull(torch.ones_like(value))[0]]
