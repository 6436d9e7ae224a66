"""SiLU for plain dual numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.dual_norm import is_dual
from secorder_func.rules.registry import Rules, repairs, takes_dual_numbers

__all__: list[str] = []


@repairs(F.silu, because="its backward pass has a forward rule only where it is recorded once more")
def _silu(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    if inplace or not (takes_dual_numbers(rules) and is_dual(input)):
        return F.silu(input, inplace)
    return input * torch.sigmoid(input)
