"""Krylov spaces of several vectors, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import NonFiniteError, message
from secorder_func.operators import LinearOperator

__all__ = ["krylov_spaces"]


def krylov_spaces(op: LinearOperator, q: Tensor, steps: int, where: str) -> tuple[Tensor, Tensor]:
    """Return the projected matrices of the Krylov spaces of some unit vectors and their orthonormal vectors.

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

    Returns
    -------
    tuple
        `(vectors, steps, steps)`, tridiagonal, float64, on the CPU; `(vectors, steps, n)`. A space that ends before has
        zeros from there on, which the first vector does not see. One synchronisation in all.
    """
    unravel = tree.ravel(op.like)[1]
    count, n = q.shape
    Q = q.new_zeros(count, steps, n)
    diagonal, off = q.new_zeros(count, steps), q.new_zeros(count, steps)
    eps, tiny = torch.finfo(q.dtype).eps, torch.finfo(q.dtype).tiny
    scale = q.new_zeros(count)
    for j in range(steps):
        Q[:, j] = q
        w = tree.ravel(op.mm(unravel(q)), batch_dims=1)[0].detach().to(q)
        diagonal[:, j] = (q * w).sum(1)
        scale = torch.maximum(scale, torch.linalg.vector_norm(w, dim=1))
        basis = Q[:, : j + 1]
        for _ in range(2):
            w = w - (basis.mT @ (basis @ w.unsqueeze(2))).squeeze(2)
        length = torch.linalg.vector_norm(w, dim=1)
        length = torch.where(length > 10 * eps * scale, length, torch.zeros_like(length))
        off[:, j] = length
        q = torch.where(length.unsqueeze(1) > 0, w / length.clamp(min=tiny).unsqueeze(1), 0.0)
    both = torch.stack([diagonal, off]).cpu().double()
    if not bool(both.isfinite().all()):
        problem = "a product has NaN or infinite entries"
        raise NonFiniteError(message(where, problem, "Check the loss and its gradient"))
    T = torch.diag_embed(both[0])
    if steps > 1:
        T = T + torch.diag_embed(both[1][:, :-1], 1) + torch.diag_embed(both[1][:, :-1], -1)
    return T, Q
