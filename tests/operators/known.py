"""Operators of two known matrices, on a tree with a scalar, an empty leaf and None."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from secorder_func import LinearOperator
from tests import oracles

_g = torch.Generator().manual_seed(0)
A = torch.randn(7, 7, dtype=torch.float64, generator=_g)
A = A + A.T
B = torch.randn(7, 7, dtype=torch.float64, generator=_g)
LIKE = {
    "w": torch.zeros(2, 2).double(),
    "b": (torch.zeros(()).double(), None, torch.zeros(0, 3).double()),
    "a": torch.zeros(2).double(),
}
V = oracles.random_like(LIKE, 1)
W = oracles.random_like(LIKE, 2)


def operator(matrix: Tensor, *, stacked: bool = False, **options: Any) -> LinearOperator:
    def matvec(v: Any) -> Any:
        return oracles.like(matrix @ oracles.flat(v), LIKE)

    def matmat(vectors: Any) -> Any:
        leaves, spec = optree.tree_flatten(vectors)
        rows = torch.cat([leaf.reshape(len(leaf), leaf[0].numel()) for leaf in leaves], 1)
        products = (rows @ matrix.T).split([leaf[0].numel() for leaf in leaves], dim=1)
        return spec.unflatten(
            [p.reshape(leaf.shape) for p, leaf in zip(products, leaves, strict=True)]
        )

    return LinearOperator(matvec, LIKE, matmat=matmat if stacked else None, **options)


def stack(*trees: Any) -> Any:
    return optree.tree_map(lambda *rows: torch.stack(rows), *trees)


def times(matrix: Tensor, v: Any) -> Any:
    return oracles.like(matrix @ oracles.flat(v), LIKE)
