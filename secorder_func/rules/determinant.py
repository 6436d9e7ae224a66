"""Determinants with finite third derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    torch.det,
    torch.linalg.det,
    torch.Tensor.det,
    because="its third derivatives are NaN under torch.func's transforms (2.13), those of slogdet are right",
)
def _det(rules: Rules, input: Tensor) -> Tensor:
    if not rules.higher:
        plain: Tensor = torch.linalg.det(input)
        return plain
    sign, logabsdet = torch.linalg.slogdet(input)
    determinant: Tensor = sign * logabsdet.exp()
    return determinant
