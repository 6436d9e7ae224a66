"""Normalisation layers: no writes to running statistics, and right derivatives of every order.

torch's double-backward formulas of the fused layer, batch and instance norms are right, but their own derivatives are
not: third derivatives are 36 % (layer, instance) and 100 % (batch) off in 2.13, by every route. Written
out of means and a reciprocal root, the same functions are right in every composition. They are written out only
where a third derivative may be taken, because the fused kernels are faster. Weight norm is written out always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.dual_norm import is_dual, standardised, standardised_by, usual
from secorder_func.rules.registry import Rules, repairs, takes_dual_numbers
from secorder_func.rules.wrong_third import refuse_reverse_of_forward

__all__ = ["float32_under_autocast", "per_channel"]

_WRONG_THIRD = "third derivatives of the fused kernel are wrong, pytorch#198017"
_TANGENT_DTYPE = "a half-precision input with a float weight gets float tangents, on which jvp(grad) raises (2.13)"


@repairs(F.layer_norm, because=_WRONG_THIRD)
def _layer_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dtype = float32_under_autocast(input)
    if takes_dual_numbers(rules) and usual(input, normalized_shape, weight, bias):
        output = standardised(input, normalized_shape, eps)
        output = output if weight is None else output * weight
        return output if bias is None else output + bias
    if not rules.higher:
        x = _widened(rules, input, weight)
        return F.layer_norm(x, normalized_shape, weight, bias, eps).to(dtype)
    output = _standardised(input, tuple(range(-len(normalized_shape), 0)), eps)
    if weight is not None:
        output = output * weight
    return (output if bias is None else output + bias).to(dtype)


@repairs(F.batch_norm, because="it writes running statistics in training mode; " + _WRONG_THIRD)
def _batch_norm(
    rules: Rules,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if (
        takes_dual_numbers(rules)
        and not training
        and _has_constants(input, running_mean, running_var)
    ):
        assert running_mean is not None
        assert running_var is not None
        return per_channel(standardised_by(input, running_mean, running_var, eps), weight, bias)
    x = _widened(rules, input, weight)
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps).to(
            input.dtype
        )
    if not rules.higher:  # the output of training mode does not depend on the running statistics
        return F.batch_norm(x, None, None, weight, bias, True, momentum, eps).to(input.dtype)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    others = (0, *range(2, input.ndim))
    return per_channel(_standardised(input, others, eps), weight, bias).to(input.dtype)


def _has_constants(input: Tensor, *statistics: Tensor | None) -> bool:
    """Say whether dual numbers are standardised by statistics that have no derivatives."""
    return is_dual(input) and all(
        t is not None and not t.requires_grad and t.shape == input.shape[1:2] for t in statistics
    )


@repairs(F.instance_norm, because="it writes running statistics in training mode; " + _WRONG_THIRD)
def _instance_norm(
    rules: Rules,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x = _widened(rules, input, weight)
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps).to(
            input.dtype
        )
    if not rules.higher:
        return F.instance_norm(x, None, None, weight, bias, True, momentum, eps).to(input.dtype)
    F._verify_spatial_size(input.size())  # type: ignore[attr-defined]
    others = tuple(range(2, input.ndim))
    return per_channel(_standardised(input, others, eps), weight, bias).to(input.dtype)


@repairs(F.group_norm, because=_TANGENT_DTYPE)
def _group_norm(
    rules: Rules,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    x = _widened(rules, input, weight)
    return F.group_norm(x, num_groups, weight, bias, eps).to(float32_under_autocast(input))


@repairs(
    torch._weight_norm,
    because="the second derivative of the fused kernel is wrong by every route (5 to 65 % off in 2.13)",
)
def _weight_norm(rules: Rules, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    refuse_reverse_of_forward(rules, "weight_norm", v, g)
    norms: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norms)


def _widened(rules: Rules, input: Tensor, weight: Tensor | None) -> Tensor:
    """Return the input in the dtype of the weight where its tangent will have that dtype (`_TANGENT_DTYPE`).

    The fused kernels compute in it anyway, and round the output to the dtype of the input.
    """
    if not rules.forward or weight is None or weight.dtype == input.dtype:
        return input
    return input.to(weight.dtype)


def float32_under_autocast(input: Tensor) -> torch.dtype:
    """Return the dtype of a layer or group norm of the input, which autocast on CUDA takes in float32."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    widens = half and input.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if widens else input.dtype


def _standardised(input: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) over `dims`, in float32 for half precision as torch does."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if half else input
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


@repairs(torch.layer_norm, because=_WRONG_THIRD)
def _direct_layer_norm(rules: Rules, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("cudnn_enable", None)
    return _layer_norm(rules, input, *args[:4], **kwargs)


@repairs(
    torch.native_layer_norm, because="its double backward fails without a weight; " + _WRONG_THIRD
)
def _native_layer_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(normalized_shape), 0))
    half = input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if half else input
    mean = x.mean(dims, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    output = ((x - mean) * rstd).to(input.dtype)
    if weight is not None:
        output = output * weight
    output = output if bias is None else output + bias
    return output, mean.detach(), rstd.detach()  # torch differentiates the first only


@repairs(torch.native_batch_norm, because=_WRONG_THIRD)
def _native_batch_norm(
    rules: Rules,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not training or not rules.higher:
        plain: tuple[Tensor, Tensor, Tensor] = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        return plain
    output = _batch_norm(rules, input, None, None, weight, bias, True, momentum, eps)
    others = (0, *range(2, input.ndim))
    variance, mean = torch.var_mean(input.detach(), others, correction=0)
    return output, mean, torch.rsqrt(variance + eps)  # torch differentiates the first only


def _direct(of_channels: Any) -> Any:
    """Return the repair of torch.batch_norm or torch.instance_norm, which order their arguments otherwise."""

    def apply(
        rules: Rules,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        output: Tensor = of_channels(
            rules, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        return output

    return apply


repairs(torch.batch_norm, because=_WRONG_THIRD)(_direct(_batch_norm))
repairs(torch.instance_norm, because=_WRONG_THIRD)(_direct(_instance_norm))


def per_channel(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the channels scaled and shifted."""
    shape: Any = (-1, *[1] * (output.ndim - 2))
    if weight is not None:
        output = output * weight.reshape(shape)
    return output if bias is None else output + bias.reshape(shape)
