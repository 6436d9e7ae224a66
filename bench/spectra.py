"""Symmetric matrices with known eigenvalues, on which estimators are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RATIO", "Spectrum", "spectra"]

RATIO = 0.7
"""Of an eigenvalue to the next on the exponential spectrum."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, and the counts of products that are looked at."""

    name: str
    description: str
    eigenvalues: Tensor
    counts: tuple[int, ...] = (12, 24, 48, 96)
    semidefinite: bool = True

    def matrix(self) -> Tensor:
        """Return a matrix with these eigenvalues and random eigenvectors; the same every time."""
        n = len(self.eigenvalues)
        generator = torch.Generator().manual_seed(n + sum(map(ord, self.name)))
        normal = torch.randn(n, n, dtype=torch.float64, generator=generator)
        Q = torch.linalg.qr(normal)[0]
        A: Tensor = (Q * self.eigenvalues) @ Q.T
        return (A + A.T) / 2


def spectra() -> list[Spectrum]:
    i = torch.arange(1, 301, dtype=torch.float64)
    few = torch.arange(1, 81, dtype=torch.float64)
    step = torch.full_like(i, 1e-3)
    step[:20] = 1
    return [
        Spectrum("flat", "1 to 2, evenly", 1 + (i - 1) / 299),
        Spectrum("polynomial", "i^-1.5", i**-1.5),
        Spectrum("exponential", f"{RATIO}^i", RATIO**few, (12, 24, 36, 48, 60)),
        Spectrum("step", "20 ones, the others 0.001", step),
        Spectrum("indefinite", "(-1)^i / i", (-1) ** i / i, semidefinite=False),
    ]
