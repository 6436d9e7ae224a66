"""Operators of known matrices, on a tree with a scalar and an empty leaf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func import LinearOperator
from tests import oracles

LIKE = {
    "w": torch.zeros(2, 3, dtype=torch.float64),
    "b": (torch.zeros((), dtype=torch.float64), torch.zeros(0, 2, dtype=torch.float64)),
    "a": torch.zeros(3, dtype=torch.float64),
}
N = 10


def random_matrix(seed: int = 0, *, symmetric: bool = True) -> Tensor:
    """Return a matrix of normal entries."""
    A = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return A + A.T if symmetric else A


def operator(matrix: Tensor, sizes: list[int] | None = None) -> LinearOperator:
    """Return the operator of a matrix on `LIKE`; note how many vectors each product has in `sizes`."""

    def matmat(vectors: Any) -> Any:
        rows = [v.reshape(v.shape[0], v.shape[1:].numel()) for v in oracles.leaves_of(vectors)]
        if sizes is not None:
            sizes.append(rows[0].shape[0])
        products = torch.cat(rows, 1) @ matrix.T
        return torch.func.vmap(lambda row: _folded(row))(products)

    return LinearOperator(
        lambda v: oracles.like(matrix @ oracles.flat(v), LIKE), LIKE, matmat=matmat
    )


def _folded(row: Tensor) -> Any:
    a, b, w = row[:3], row[3], row[4:]
    return {"w": w.reshape(2, 3), "b": (b, row[:0].reshape(0, 2)), "a": a}


def generator(seed: int) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed))).Q
    A = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2
