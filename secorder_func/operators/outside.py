"""What iterations must know of who differentiates or maps them from outside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from secorder_func.errors import NoExactRouteError, message
from secorder_func.rules.levels import JVP, differentiating_levels, mapping
from secorder_func.transforms.policy import differentiated_outside

__all__ = [
    "differentiated_outside",
    "refuse_forward_mode",
    "refuse_gradients",
    "refuse_transforms",
    "refuse_vmap_and_jvp",
]

_NOT_FORWARD = "solutions cannot be differentiated in forward mode"
_BACKWARD = "Take torch.func.grad, vjp or backward, or a finite difference"


def refuse_transforms(where: str) -> None:
    """Refuse to iterate inside of `vmap`, `grad` or `jvp`: nothing of the iteration is differentiated or mapped."""
    if mapping() or differentiating_levels():
        problem = "it works on numbers, and cannot be mapped or differentiated by torch.func"
        mend = "Call it outside. A simple eigenvalue has the gradient of v . A v with its eigenvector v held fixed"
        raise NoExactRouteError(message(where, problem, mend))


def refuse_gradients(where: str) -> None:
    """Refuse to be differentiated by torch.func: nothing is recorded."""
    if differentiating_levels():
        problem = "it does not record derivatives, which would be zeros"
        mend = "Take its gradient from Batches.loss_and_gradient, and curvature from an operator"
        raise NoExactRouteError(message(where, problem, mend))


def refuse_vmap_and_jvp(where: str) -> None:
    """Refuse to iterate inside `vmap`, in which no number can be looked at, and inside `jvp`."""
    if mapping():
        problem = "vmap does not let an iteration see when it has converged"
        mend = f"Give {where} the stacked right-hand sides, which it solves side by side, or write a loop"
        raise NoExactRouteError(message(where, problem, mend))
    if JVP in differentiating_levels():
        raise NoExactRouteError(message(where, _NOT_FORWARD, _BACKWARD))


def refuse_forward_mode(where: str, tensor: Tensor) -> None:
    """Refuse a tensor with a tangent of plain forward-mode autograd."""
    if not torch.is_inference(tensor) and unpack_dual(tensor).tangent is not None:
        raise NoExactRouteError(message(where, _NOT_FORWARD, _BACKWARD))
