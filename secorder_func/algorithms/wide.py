"""The dtype in which squares and sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(tensor: Tensor) -> Tensor:
    """Return it in float64, in which squares of what float32 can hold are neither zero nor infinite.

    In float32 on devices that have no float64.
    """
    if tensor.device.type == "mps":
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.double()
