"""Products with NaN or infinite entries, refused on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, NonFiniteError, message
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import Tree

__all__ = ["refuse_non_finite", "require_values"]


def require_values(where: str) -> None:
    """Refuse to look at values where a transform hides them."""
    if in_transform():
        raise ArgumentError(
            message(
                where,
                "check_finite=True looks at values, which vmap, grad, jvp and torch.compile hide",
                "Leave it out inside transforms and check the result outside",
            )
        )


def refuse_non_finite(product: Tree, where: str, *, gradient: Sequence[Tensor] = ()) -> None:
    """Raise if a product has a NaN or infinite entry; say where, and whether the gradient has too."""
    for path, leaf in zip(tree.paths(product), tree.flatten(product)[0], strict=True):
        bad = leaf.numel() - int(torch.isfinite(leaf).sum())
        if not bad:
            continue
        problem = f"at {path or 'the root'} {bad} of {leaf.numel()} entries are NaN or infinite"
        if not gradient:
            mend = "Look at the loss and its gradient there"
        elif all(bool(torch.isfinite(g).all()) for g in gradient):
            mend = (
                "The gradient is finite, so a function without a second derivative at this point is to blame: "
                "a root, norm or power of zero, say. Add a small constant inside it"
            )
        else:
            mend = "The gradient is not finite either: look at the loss"
        raise NonFiniteError(message(where, f"the product is not finite: {problem}", mend))
