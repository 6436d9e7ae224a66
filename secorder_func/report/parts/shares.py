"""The share of eigenvalues in an interval, with all that a few Lanczos steps of a few random vectors leave open."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secorder_func import SpectralDensity

__all__ = ["Share", "share_between"]

_ENDED = 1e-9
"""A Krylov space has ended if the next coefficient is so small beside the largest node: then nothing is left open."""


@dataclass(frozen=True)
class Share:
    """A share of the eigenvalues.

    Attributes
    ----------
    value
        The middle of the bounds, their mean over the random vectors.
    standard_error
        Over the random vectors; infinite if there is one only.
    blur
        What the number of Lanczos steps leaves open on either side, a bound: half the mean distance of the bounds.
    """

    value: float
    standard_error: float
    blur: float

    @property
    def error(self) -> float:
        """Both together."""
        return self.standard_error + self.blur


def share_between(density: SpectralDensity, low: float, high: float) -> Share:
    """Return the share of eigenvalues from `low` to `high`; either may be infinite.

    The products fix `2 steps - 2` moments of the measure of each vector, and these fix between which bounds its
    cumulative distribution lies (Chebyshev, Markov, Stieltjes). The mean over the vectors of what is between the bounds
    is the share, but for the choice of the vectors.

    References
    ----------
    N. I. Akhiezer, The classical moment problem, Oliver and Boyd, 1965, section 2.5.
    G. H. Golub, Some modified matrix eigenvalue problems, SIAM Review 15(2), 1973. https://doi.org/10.1137/1015032
    """
    least, most = _cumulative(density, low)
    lower, upper = _cumulative(density, high)
    bounds = torch.stack([lower - most, upper - least]).clamp(0, 1)
    middle, blur = bounds.mean(0), (bounds[1] - bounds[0]).mean() / 2
    count = len(middle)
    error = float(middle.std()) / math.sqrt(count) if count > 1 else math.inf
    return Share(float(middle.mean()), error, float(blur))


def _cumulative(density: SpectralDensity, point: float) -> tuple[Tensor, Tensor]:
    """Return bounds of what the measure of each vector has below a point, and up to it."""
    whole = density.nodes.shape[1] == density.dimension
    pairs = zip(density.nodes, density.weights, strict=True)
    found = torch.tensor(
        [_bounds(nodes, weights, point, whole) for nodes, weights in pairs], dtype=torch.float64
    )
    return found[:, 0], found[:, 1]


def _bounds(nodes: Tensor, weights: Tensor, point: float, whole: bool) -> tuple[float, float]:
    if math.isinf(point):
        return (0.0, 0.0) if point < 0 else (1.0, 1.0)
    diagonal, beside, ended = _jacobi(nodes, weights)
    if whole or ended:
        share = float(weights[nodes <= point].sum())
        return share, share
    values, found = _with_node(diagonal, beside, point)
    at = int((values - point).abs().argmin())
    below = float(found[:at].sum())
    return below, below + float(found[at])


def _jacobi(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the diagonals of the tridiagonal matrix of these nodes and weights, and whether its space ends before."""
    tiny = _ENDED * float(nodes.abs().max())
    basis = (weights / weights.sum()).sqrt().unsqueeze(0)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    ended = False
    while not ended:
        w = nodes * basis[-1]
        diagonal.append(basis[-1] @ w)
        if len(basis) == len(nodes):
            break
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        length = w.norm()
        ended = float(length) <= tiny
        beside.append(length)
        basis = torch.cat([basis, (w / length).unsqueeze(0)])
    return torch.stack(diagonal), torch.stack([*beside, nodes.new_zeros(())])[:-1], ended


def _with_node(diagonal: Tensor, beside: Tensor, point: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the quadrature with the same moments, but for the last, that has a node there."""
    T = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    last, scale = math.inf, float(T.abs().max())
    corner = point  # of a single node
    for i, entry in enumerate(diagonal[:-1].tolist()):
        last = entry - point - (float(beside[i - 1]) ** 2 / last if i else 0.0)
        last = last or torch.finfo(torch.float64).tiny
    if len(diagonal) > 1:
        corner += float(beside[-1]) ** 2 / last
    if abs(corner) > scale / _ENDED:  # the shorter quadrature has a node there itself
        T = T[:-1, :-1]
    else:
        T[-1, -1] = corner
    values, vectors = torch.linalg.eigh(T)
    return values, vectors[0] ** 2
