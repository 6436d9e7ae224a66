"""Loss functions that torch cannot differentiate forward over reverse, or differentiates wrongly."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__ = ["REDUCTIONS", "reduced"]

REDUCTIONS = ("mean", "sum", "none")


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Apply a loss's `reduction`."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


@repairs(
    F.mse_loss, because="the mean fails forward over reverse on a constant target, pytorch#123996"
)
def _mse_loss(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    unusual = size_average is not None or reduce is not None or weight is not None
    if unusual or reduction not in REDUCTIONS:
        if weight is not None:
            kwargs["weight"] = weight
        return F.mse_loss(input, target, size_average, reduce, reduction, **kwargs)
    if input.shape == target.shape:
        # Written out, because a compiled jvp of the fused kernel ends the process (torch 2.13).
        squares = (input - target).square()
    else:  # torch words its own warning
        squares = F.mse_loss(input, target, reduction="none", **kwargs)
    return reduced(squares, reduction)


def _linear_cross_entropy(rules: Rules, *args: Any, **kwargs: Any) -> Tensor:
    return F.linear_cross_entropy(*args, **{**kwargs, "options": None})  # type: ignore[attr-defined, unused-ignore]


if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    repairs(
        F.linear_cross_entropy,
        because="in chunks its gradients are constants: second derivatives silently wrong by double backward, "
        "81 to 104 % off in 2.13, refused by torch.func",
    )(_linear_cross_entropy)
