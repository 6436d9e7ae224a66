"""Linear solves and Householder products whose forward rules torch cannot differentiate rightly.

Their second derivatives are right in every mode. Where a forward derivative is differentiated again they are written
out of the inverse and of products, which are right in every order of modes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.registry import Rules, forward_is_differentiated, repairs

__all__: list[str] = []

_WRONG = "derivatives of its forward rule are wrong: 30 to 80 % off in 2.13"


@repairs(torch.linalg.solve, because=_WRONG)
def _solve(rules: Rules, A: Tensor, B: Tensor, *, left: bool = True, **kwargs: Any) -> Tensor:
    if not forward_is_differentiated(rules):
        solution: Tensor = torch.linalg.solve(A, B, left=left, **kwargs)
        return solution
    return _by_inverse(A, B, left)


@repairs(torch.linalg.solve_ex, because=_WRONG)
def _solve_ex(rules: Rules, A: Tensor, B: Tensor, *, left: bool = True, **kwargs: Any) -> Any:
    if not forward_is_differentiated(rules):
        return torch.linalg.solve_ex(A, B, left=left, **kwargs)
    info = torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
    return torch.return_types.linalg_solve_ex(  # type: ignore[attr-defined]
        (_by_inverse(A, B, left), info)
    )


@repairs(torch.linalg.tensorsolve, because=_WRONG)
def _tensorsolve(
    rules: Rules, A: Tensor, B: Tensor, dims: tuple[int, ...] | None = None, **kwargs: Any
) -> Tensor:
    if not forward_is_differentiated(rules):
        solution: Tensor = torch.linalg.tensorsolve(A, B, dims, **kwargs)
        return solution
    if dims is not None:
        A = A.movedim(dims, tuple(range(A.ndim - len(dims), A.ndim)))
    shape = A.shape[B.ndim :]
    matrix = A.reshape(B.numel(), math.prod(shape))
    inverse: Tensor = torch.linalg.inv(matrix)
    return (inverse @ B.reshape(-1)).reshape(shape)


def _by_inverse(A: Tensor, B: Tensor, left: bool) -> Tensor:
    inverse: Tensor = torch.linalg.inv(A)
    # torch takes B as a batch of vectors where its shape is that of the rows of A.
    if B.ndim == 1 or (A.ndim == B.ndim + 1 and B.shape == A.shape[:-1]):
        return (inverse @ B.unsqueeze(-1)).squeeze(-1)
    return inverse @ B if left else B @ inverse


@repairs(
    torch.linalg.householder_product,
    torch.orgqr,
    torch.Tensor.orgqr,
    because="derivatives of its forward rule are wrong: by a factor of up to 80 in 2.13",
)
def _householder_product(rules: Rules, A: Tensor, tau: Tensor, **kwargs: Any) -> Tensor:
    if not forward_is_differentiated(rules):
        product: Tensor = torch.linalg.householder_product(A, tau, **kwargs)
        return product
    rows, columns = A.shape[-2:]
    Q = torch.eye(rows, columns, dtype=A.dtype, device=A.device).expand(A.shape)
    for index in reversed(range(tau.shape[-1])):
        below = A[..., index + 1 :, index : index + 1]
        above = torch.zeros_like(A[..., : index + 1, :1]) + _last_is_one(index + 1, A)
        reflector = torch.cat([above, below], -2)  # (..., rows, 1)
        scale = tau[..., index, None, None]
        Q = Q - scale * (reflector @ (reflector.mH @ Q))
    return Q


def _last_is_one(length: int, like: Tensor) -> Tensor:
    return torch.eye(length, dtype=like.dtype, device=like.device)[:, -1:]
