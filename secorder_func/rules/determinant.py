"""Determinants with right derivatives of every order, in every order of modes.

torch's forward rules of the determinants are right, their own derivatives are not. An LU factorisation, whose
derivatives are right, has the determinant on its diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import differentiating_levels, unwrapped
from secorder_func.rules.registry import Rules, forward_is_differentiated, repairs

__all__: list[str] = []

_WRONG_FORWARD = "derivatives of its forward rule are wrong: 10 to 200 % off in 2.13"


@repairs(
    torch.det,
    torch.linalg.det,
    torch.Tensor.det,
    because="its second derivatives are NaN in a quarter of cases under torch.func's transforms (2.13); "
    + _WRONG_FORWARD,
)
def _det(rules: Rules, input: Tensor, **kwargs: Any) -> Tensor:
    if not rules.higher and not _in_torch_func():
        plain: Tensor = torch.linalg.det(input, **kwargs)
        return plain
    diagonal, parity = _pivots(input)
    _refuse_singular(diagonal)
    sign, logabsdet = _sign(diagonal, parity), diagonal.abs().log().sum(-1)
    return sign * logabsdet.exp()


@repairs(torch.slogdet, torch.linalg.slogdet, torch.Tensor.slogdet, because=_WRONG_FORWARD)
def _slogdet(rules: Rules, input: Tensor, **kwargs: Any) -> Any:
    if not forward_is_differentiated(rules):
        return torch.linalg.slogdet(input, **kwargs)
    diagonal, parity = _pivots(input)
    values = (_sign(diagonal, parity), diagonal.abs().log().sum(-1))
    return torch.return_types.linalg_slogdet(values)  # type: ignore[attr-defined]


@repairs(torch.logdet, torch.Tensor.logdet, because=_WRONG_FORWARD)
def _logdet(rules: Rules, input: Tensor) -> Tensor:
    if not forward_is_differentiated(rules):
        return torch.logdet(input)
    diagonal, parity = _pivots(input)
    sign, logabsdet = _sign(diagonal, parity), diagonal.abs().log().sum(-1)
    if input.is_complex():
        return logabsdet + sign.log()
    return torch.where(sign < 0, torch.full_like(logabsdet, torch.nan), logabsdet)


def _in_torch_func() -> bool:
    return torch.compiler.is_compiling() or bool(differentiating_levels())


def _pivots(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal of U in A = P L U and the sign of P."""
    factors, rows, _ = torch.linalg.lu_factor_ex(input)
    places = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    swaps = (rows != places).sum(-1)
    diagonal: Tensor = factors.diagonal(dim1=-2, dim2=-1)
    return diagonal, (1 - 2 * (swaps % 2)).to(diagonal.dtype)


def _sign(diagonal: Tensor, parity: Tensor) -> Tensor:
    """Return the sign of a determinant; of a real one it is a constant."""
    sign: Tensor = parity
    for entry in (diagonal / diagonal.abs()).unbind(-1):
        sign = sign * (entry if diagonal.is_complex() else entry.detach())
    return sign


def _refuse_singular(diagonal: Tensor) -> None:
    if torch.compiler.is_compiling() or diagonal.device.type == "meta" or not diagonal.numel():
        return
    sizes = unwrapped(diagonal).detach().abs()
    rounding = 10 * sizes.shape[-1] * torch.finfo(sizes.dtype).eps
    if bool((sizes <= rounding * sizes.amax(-1, keepdim=True)).any()):
        raise NoExactRouteError(
            "torch.func has no right second derivative of the determinant of a singular matrix, and no mode a third; "
            "expand it in its entries"
        )
