"""torch's activations, by the fused kernels of their backward passes.

The Jacobian is diagonal, or symmetric (softmax), so that the kernel which multiplies a cotangent multiplies a term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.norms import unreduced
from secorder_func.taylor.products import total
from secorder_func.taylor.registry import (
    NotCoveredError,
    Terms,
    forms,
    tangent,
    together,
    written,
)

__all__: list[str] = []

_aten: Any = torch.ops.aten


@tangent(*forms("relu"), kind="selection", by_output=True)
def _relu(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    return _aten.threshold_backward(t(input), out.detach(), 0)


@tangent(*forms("tanh"), kind="elementwise")
def _tanh(t: Terms, out: Tensor, input: Tensor) -> Any:
    if out.is_complex():
        return t(input) * (1 - out * out)
    return _aten.tanh_backward(t(input), out)


@tangent(*forms("sigmoid", "expit"), kind="elementwise")
def _sigmoid(t: Terms, out: Tensor, input: Tensor) -> Any:
    if out.is_complex():
        return t(input) * (out * (1 - out))
    return _aten.sigmoid_backward(t(input), out)


@tangent(F.gelu, torch._C._nn.gelu, kind="elementwise")
def _gelu(t: Terms, out: Tensor, input: Tensor, approximate: str = "none") -> Any:
    return _aten.gelu_backward(t(input), input, approximate=approximate)


@tangent(F.silu, torch._C._nn.silu, kind="elementwise")
def _silu(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    share = input.sigmoid()
    return t(input) * (share + out * (1 - share))


@tangent(F.mish, torch._C._nn.mish, kind="elementwise")
def _mish(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    bent = F.softplus(input).tanh()
    return t(input) * (bent + input * (1 - bent * bent) * input.sigmoid())


@tangent(F.softplus, kind="elementwise")
def _softplus(t: Terms, out: Tensor, input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    return _aten.softplus_backward(t(input), input, beta, threshold)


@tangent(F.logsigmoid, kind="elementwise")
def _logsigmoid(t: Terms, out: Tensor, input: Tensor) -> Any:
    return t(input) * (-input).sigmoid()


@tangent(*forms("logit"), kind="elementwise")
def _logit(t: Terms, out: Tensor, input: Tensor, eps: float | None = None) -> Any:
    slope = 1 / (input * (1 - input))
    if eps is not None:
        slope = torch.where((input >= eps) & (input <= 1 - eps), slope, 0.0)
    return t(input) * slope


# ------------------------------------------------------------------------ of pieces


def _of_pieces(term: Any, input: Tensor, negative: Any) -> Any:
    """Return the term where the input is positive, elsewhere a multiple of it."""
    return torch.where(input > 0, term, term * negative)


def _below(input: Tensor) -> Tensor:
    """Return what is negative, without a derivative at zero, as torch has it."""
    return torch.where(input < 0, input, 0.0)


@tangent(*forms("leaky_relu"), kind="elementwise")
def _leaky_relu(
    t: Terms, out: Tensor, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Any:
    return _of_pieces(t(input), input, negative_slope)


@tangent(F.elu, kind="elementwise")
def _elu(t: Terms, out: Tensor, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _of_pieces(t(input), input, alpha * _below(input).exp())


@tangent(*forms("celu"), kind="elementwise")
def _celu(t: Terms, out: Tensor, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _of_pieces(t(input), input, (_below(input) / alpha).exp())


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@tangent(*forms("selu"), kind="elementwise")
def _selu(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    return _SELU_SCALE * _of_pieces(t(input), input, _SELU_ALPHA * _below(input).exp())


@tangent(*forms("prelu"), kind="bilinear")
def _prelu(t: Terms, out: Tensor, input: Tensor, weight: Tensor) -> Any:
    term, slope = t(input), t(weight)
    shape = (1, -1, *[1] * (input.ndim - 2)) if input.ndim > 1 else (-1,)
    spread = weight.reshape(shape) if weight.numel() > 1 else weight.reshape(())
    parts = []
    if term is not None:
        parts.append(_of_pieces(term, input, spread))
    if slope is not None:
        slope = slope.reshape(spread.shape)
        parts.append(slope * torch.where(input > 0, 0.0, input))
    return total(*parts)


@together(*forms("rrelu"), kind="selection")
def _rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Any]:
    if training:
        slopes: Any = torch.ones_like(input, requires_grad=False)
        out = _aten.rrelu_with_noise(input, slopes, lower, upper, True)
    else:
        slopes = (lower + upper) / 2
        out = F.leaky_relu(input, slopes)
    return out, lambda t: _of_pieces(t(input), input, slopes)


@tangent(F.hardtanh, kind="elementwise")
def _hardtanh(
    t: Terms,
    out: Tensor,
    input: Tensor,
    min_val: float = -1,
    max_val: float = 1,
    inplace: bool = False,
) -> Any:
    return t(input) * ((input > min_val) & (input < max_val))


@tangent(F.relu6, kind="elementwise")
def _relu6(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    return t(input) * ((input > 0) & (input < 6))


@tangent(F.hardsigmoid, kind="elementwise")
def _hardsigmoid(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    return t(input) * ((input > -3) & (input < 3)) / 6


@tangent(F.hardswish, kind="elementwise")
def _hardswish(t: Terms, out: Tensor, input: Tensor, inplace: bool = False) -> Any:
    inside = (input / 3 + 0.5).to(input.dtype)
    slope = torch.where(input <= -3, 0.0, torch.where(input < 3, inside, 1.0))
    return t(input) * slope


@tangent(*forms("hardshrink"), F.softshrink, kind="elementwise")
def _shrink(t: Terms, out: Tensor, input: Tensor, lambd: float = 0.5) -> Any:
    return t(input) * (input.abs() > lambd)


@tangent(*forms("threshold"), kind="elementwise")
def _threshold(
    t: Terms, out: Tensor, input: Tensor, threshold: float, value: float, inplace: bool = False
) -> Any:
    return t(input) * (input > threshold)


@written(F.tanhshrink)
def _tanhshrink(input: Tensor) -> Tensor:
    return input - input.tanh()


@written(F.softsign)
def _softsign(input: Tensor) -> Tensor:
    return input / (input.abs() + 1)


@written(F.glu)
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


# --------------------------------------------------------------------------------- softmax


def _term_along(t: Terms, out: Tensor, input: Tensor, dim: Any) -> Tensor:
    """Return the term of the argument in the dtype of the output."""
    if dim is None:
        raise NotCoveredError("along no dimension")
    term: Tensor = t(input).to(out.dtype)
    return term


@tangent(*forms("softmax"), kind="symmetric")
def _softmax(
    t: Terms, out: Tensor, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    return _aten._softmax_backward_data(_term_along(t, out, input, dim), out, dim, out.dtype)


@tangent(F.softmin, kind="symmetric")
def _softmin(t: Terms, out: Tensor, input: Tensor, dim: Any = None, *args: Any, **kw: Any) -> Any:
    return -_softmax(t, out, input, dim)


@tangent(*forms("log_softmax"), kind="closed")
def _log_softmax(
    t: Terms, out: Tensor, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    term = _term_along(t, out, input, dim)
    return term - (out.exp() * term).sum(dim, keepdim=True)


@tangent(*forms("logsumexp"), kind="closed")
def _logsumexp(t: Terms, out: Tensor, input: Tensor, dim: Any, keepdim: bool = False) -> Any:
    top = unreduced(out, input, dim, keepdim)
    shares = (input - torch.where(top.isfinite(), top, 0.0)).exp()
    return (shares * t(input)).sum(dim, keepdim)
