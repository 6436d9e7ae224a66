"""Distances between points, whose fused kernels have no second derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs
from secorder_func.rules.wrong_third import refuse_reverse_of_forward

__all__: list[str] = []

_NO_SECOND = "its backward has no derivative in torch"


@repairs(torch.cdist, because=_NO_SECOND)
def _cdist(
    rules: Rules,
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str | None = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    refuse_reverse_of_forward(rules, "cdist", x1, x2)
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


@repairs(F.pdist, because=_NO_SECOND)
def _pdist(rules: Rules, input: Tensor, p: float = 2.0) -> Tensor:
    refuse_reverse_of_forward(rules, "pdist", input)
    rows, columns = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return _norm(input[rows] - input[columns], p)


def _norm(difference: Tensor, p: float) -> Tensor:
    """Return the p-norm over the last axis; equal points contribute no derivative, as in torch."""
    apart = (difference != 0).any(-1, keepdim=True)
    safe = torch.where(apart, difference, torch.ones_like(difference))
    norms: Tensor = torch.linalg.vector_norm(safe, p, -1)
    return torch.where(apart.squeeze(-1), norms, torch.zeros_like(norms))
