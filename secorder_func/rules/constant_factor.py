"""Products of a constant matrix, the inputs, with parameters that are dual numbers.

torch gives the constant a tangent of zeros and multiplies with it, forward and backward: 9 products of matrices in
place of 6 for a first layer, a fifth of a Hessian-vector product of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from secorder_func.rules.registry import Rules, repairs, takes_dual_numbers

__all__: list[str] = []

_WASTE = "plain dual numbers multiply with a constant's tangent of zeros"
_WORTH_IT = 2**20
"""Multiplications from which less of them makes up for a function in Python."""


@repairs(F.linear, because=_WASTE)
def _linear(rules: Rules, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (
        takes_dual_numbers(rules) and weight.ndim == 2 and _is_constant_factor(input, weight.t())
    ):
        return F.linear(input, weight, bias)
    product: Tensor = _times(input, weight.t())
    return product if bias is None else product + bias


def _matmul(rules: Rules, input: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not (takes_dual_numbers(rules) and _is_constant_factor(input, other)):
        return torch.matmul(input, other, **kwargs)
    product: Tensor = _times(input, other)
    return product


_TENSOR: Any = torch.Tensor
repairs(torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__, because=_WASTE)(_matmul)


def _is_constant_factor(factor: Tensor, matrix: Any) -> bool:
    """Say whether this is a usual product, large enough, and its first factor has no derivative."""
    return (
        isinstance(matrix, Tensor)
        and factor.ndim >= 2
        and matrix.ndim == 2
        and factor.numel() * matrix.shape[1] >= _WORTH_IT
        and factor.shape[-1] == matrix.shape[0]
        and factor.dtype == matrix.dtype
        and factor.is_floating_point()
        and factor.layout == matrix.layout == torch.strided
        and not factor.requires_grad
        and matrix.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(factor.device.type)
        and forward_ad.unpack_dual(factor).tangent is None
    )


class _ConstantTimes(torch.autograd.Function):
    """`x @ M` for dual numbers `M`."""

    keeps_tangents = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x @ M

    @staticmethod
    def jvp(ctx: Any, x: None, M: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return factor @ M  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).mT
        value, tangent = (
            None if part is None else rows @ part.reshape(-1, part.shape[-1])
            for part in forward_ad.unpack_dual(g)
        )
        assert value is not None
        return None, value if tangent is None else forward_ad.make_dual(value, tangent)


_times: Any = _ConstantTimes.apply
