"""Dropout with one mask, whoever differentiates.

Eager torch fills the mask in the memory order of the input, torch.func's wrapped tensors have another one. So for an
input that is not contiguous the transforms would drop other entries than a plain evaluation from the same random state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.levels import mapping, unwrapped
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    F.dropout, because="of an input that is not contiguous torch.func draws another mask than eager"
)
def _dropout(
    rules: Rules, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    usual = not training or inplace or not 0.0 < p < 1.0 or input.device.type != "cpu"
    if usual or torch.compiler.is_compiling() or mapping():
        return F.dropout(input, p, training, inplace)
    mask = torch.empty_like(unwrapped(input)).bernoulli_(1 - p).div_(1 - p)
    return input * mask
