"""Functions of each entry: first and second derivatives in closed form, of those that are in most losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.registry import NotCoveredError, forms
from secorder_func.taylor.second_order.registry import Jets, Pair, closed, curved

__all__: list[str] = []

Derivatives = Callable[[Tensor, Tensor], tuple[Any, Any]]
"""(input, output) -> first and second derivative."""


def _tanh(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 - y * y
    return slope, -2 * y * slope


def _sigmoid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    slope = y * (1 - y)
    return slope, slope * (1 - 2 * y)


def _silu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    share = x.sigmoid()
    rest = 1 - share
    return share + y * rest, share * rest * (2 + x - 2 * y)


def _gelu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    density = (x * x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    below = torch.special.ndtr(x)
    return below + x * density, density * (2 - x * x)


def _exp(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y, y


def _log(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 / x
    return slope, -slope * slope


def _square(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    return 2 * x, 2.0


def _sin(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.cos(), -y


def _cos(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return -x.sin(), -y


def _relu(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
    return (y > 0).to(y.dtype), None


def _register(derivatives: Derivatives, *functions: Any) -> None:
    @closed(*functions)
    def push(t: Jets, out: Tensor, input: Tensor, **options: Any) -> Pair:
        if out.is_complex() or options.keys() - {"inplace"}:
            raise NotCoveredError("complex entries, or options")
        return curved(t, input, *derivatives(input, out))


_register(_tanh, *forms("tanh"))
_register(_sigmoid, *forms("sigmoid", "expit"))
_register(_exp, *forms("exp"))
_register(_log, *forms("log"))
_register(_square, *forms("square"))
_register(_sin, *forms("sin"))
_register(_cos, *forms("cos"))
_register(_relu, *forms("relu"))
_register(_silu, F.silu, torch._C._nn.silu)


@closed(F.gelu, torch._C._nn.gelu)
def _gelu_of_both_kinds(t: Jets, out: Tensor, input: Tensor, approximate: str = "none") -> Pair:
    if approximate != "none":
        raise NotCoveredError("the approximation")
    return curved(t, input, *_gelu(input, out))
