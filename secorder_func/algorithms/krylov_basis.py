"""An orthonormal basis that grows by one vector a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["KrylovBasis"]

_ENOUGH = 0.7
"""A pass that leaves this much of the norm left no more than rounding of the basis behind."""


class KrylovBasis:
    """Orthonormal vectors as the rows of blocks, so that vectors are contiguous and memory grows with use.

    With rows, both passes of a projection run through memory in order; with columns they cost up to twice as much
    (measured, 670,000 x 100, CPU).

    Parameters
    ----------
    like
        A vector of the space, `(n,)`.
    limit
        The most vectors.
    """

    def __init__(self, like: Tensor, limit: int) -> None:
        self.like, self.n, self.limit = like, like.numel(), limit
        self.count = 0
        self.blocks: list[Tensor] = []
        self._norms = like.new_empty(2)
        self.rows = min(limit, max(16, 2**22 // self.n))  # a block; the small ones are one block

    def append(self, w: Tensor, length: float) -> Tensor:
        """Add and return `w / length`, a unit vector orthogonal to all others."""
        row = self.count % self.rows
        if row == 0:
            rows = min(self.rows, self.limit - self.count)
            self.blocks.append(self.like.new_empty(rows, self.n))
        self.count += 1
        return torch.div(w, length, out=self.blocks[-1][row])

    def orthogonalised(self, Aq: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Return the part of `A q` outside the basis, its coefficients `(count,)` inside, and the norms of both.

        `q` is the last vector. In exact arithmetic `A q` has components on the last two only: these go first. What
        rounding left of the others goes in one pass over the basis, and a second one only if the first took much of
        what there was ("twice is enough": Daniel, Gragg, Kaufman and Stewart 1976). One synchronisation.
        """
        last = (self.count - 1) % self.rows
        near = self.blocks[-1][max(0, last - 1) : last + 1]
        nearest = near @ Aq
        w = torch.addmv(Aq, near.T, nearest, alpha=-1)
        torch.linalg.vector_norm(w, out=self._norms[0])
        inside = self._subtract(w)
        torch.linalg.vector_norm(w, out=self._norms[1])
        inside[self.count - near.shape[0] :].add_(nearest)
        *along, outside, rest = torch.cat([nearest, self._norms]).tolist()
        length = math.hypot(*along, outside)
        if rest < _ENOUGH * outside:
            inside += self._subtract(w)
            rest = float(torch.linalg.vector_norm(w))
        return w, inside, (length, rest)

    def fresh(self, generator: torch.Generator | None) -> Tensor:
        """Return a random unit vector orthogonal to the basis, which must not span the space."""
        device = self.like.device if generator is None else generator.device
        w: Tensor = torch.randn(self.n, dtype=self.like.dtype, device=device, generator=generator)
        w = w.to(self.like.device)
        for _ in range(
            3
        ):  # the complement may be small: what one pass leaves is then mostly rounding
            self._subtract(w)
            w /= torch.linalg.vector_norm(w)
        return w

    def outside(self, w: Tensor) -> tuple[Tensor, float]:
        """Return the part of `w` outside the basis, in its place, and its norm."""
        for _ in range(2):
            self._subtract(w)
        return w, float(torch.linalg.vector_norm(w))

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return the combinations with the columns of `coefficients`, `(count, k)`, as rows `(k, n)`."""
        weights = coefficients.T.to(self.like)
        parts = weights.split([len(block) for block in self._filled()], dim=1)
        total: Tensor = parts[0] @ self._filled()[0]
        for part, block in zip(parts[1:], self._filled()[1:], strict=True):
            total.addmm_(part, block)
        return total

    def _filled(self) -> list[Tensor]:
        last = (self.count - 1) % self.rows + 1
        return [*self.blocks[:-1], self.blocks[-1][:last]]

    def _subtract(self, w: Tensor) -> Tensor:
        """Take the projection on the basis off `w` in place; return its coefficients."""
        blocks = self._filled()
        if len(blocks) == 1:
            coefficients = blocks[0] @ w
            w.addmv_(blocks[0].T, coefficients, alpha=-1)
            return coefficients
        inside = [block @ w for block in blocks]
        for block, coefficients in zip(blocks, inside, strict=True):
            w.addmv_(block.T, coefficients, alpha=-1)
        return torch.cat(inside)
