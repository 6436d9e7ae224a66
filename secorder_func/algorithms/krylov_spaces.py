"""Krylov spaces of several vectors, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.estimate import State
from secorder_func.errors import NonFiniteError, message
from secorder_func.operators import LinearOperator

__all__ = ["KrylovSpaces"]


class KrylovSpaces:
    """The projected matrices of the Krylov spaces of some unit vectors, and their orthonormal vectors.

    Parameters
    ----------
    op
        A real symmetric operator.
    q
        Unit vectors, `(vectors, n)`.
    steps
        How many products with each.
    where
        The public function, for messages.
    """

    def __init__(self, op: LinearOperator, q: Tensor, steps: int, where: str) -> None:
        self._op, self._steps, self._where = op, steps, where
        self._unravel = tree.ravel(op.like)[1]
        count, n = q.shape
        self.Q = q.new_zeros(count, steps, n)
        self._T = q.new_zeros(2, count, steps)  # diagonal, and beside it
        self._scale = q.new_zeros(count)
        self._next = q
        self.done = 0

    def run(self) -> None:
        """Make all steps, or those that are missing."""
        while self.done < self._steps:
            self._step()
            running.further(len(self._next))

    def projected(self) -> Tensor:
        """Return the projected matrices, `(vectors, steps, steps)`, tridiagonal, float64, on the CPU.

        A space that ends before has zeros from there on, which the first vector does not see. One synchronisation in
        all.
        """
        both = self._T[:, :, : self.done].cpu().double()
        if not bool(both.isfinite().all()):
            problem = "a product has NaN or infinite entries"
            raise NonFiniteError(message(self._where, problem, "Check the loss and its gradient"))
        T = torch.diag_embed(both[0])
        if self.done > 1:
            T = T + torch.diag_embed(both[1][:, :-1], 1) + torch.diag_embed(both[1][:, :-1], -1)
        return T

    def state(self) -> State:
        """Return what it takes to go on."""
        return {
            "Q": self.Q[:, : self.done].clone(),
            "T": self._T[:, :, : self.done].clone(),
            "scale": self._scale,
            "next": self._next,
        }

    def resume(self, state: State) -> None:
        """Go on from a state."""
        self.done = state["Q"].shape[1]
        self.Q[:, : self.done], self._T[:, :, : self.done] = state["Q"], state["T"]
        self._scale, self._next = state["scale"], state["next"]

    def _step(self) -> None:
        q, j = self._next, self.done
        eps, tiny = torch.finfo(q.dtype).eps, torch.finfo(q.dtype).tiny
        w = tree.ravel(self._op.mm(self._unravel(q)), batch_dims=1)[0].detach().to(q)
        self.Q[:, j] = q
        self._T[0, :, j] = (q * w).sum(1)
        self._scale = torch.maximum(self._scale, torch.linalg.vector_norm(w, dim=1))
        basis = self.Q[:, : j + 1]
        for _ in range(2):
            w = w - (basis.mT @ (basis @ w.unsqueeze(2))).squeeze(2)
        length = torch.linalg.vector_norm(w, dim=1)
        length = torch.where(length > 10 * eps * self._scale, length, torch.zeros_like(length))
        self._T[1, :, j] = length
        self._next = torch.where(
            length.unsqueeze(1) > 0, w / length.clamp(min=tiny).unsqueeze(1), 0.0
        )
        self.done += 1
