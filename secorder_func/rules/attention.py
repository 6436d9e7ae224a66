"""Attention on the math kernel.

The fused kernels of `scaled_dot_product_attention` have no second derivative in any mode. The composite
kernel computes the same function out of matmul and softmax and is differentiable any number of times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from secorder_func.rules.registry import Rules, forward_is_differentiated, repairs
from secorder_func.rules.see_through import see_through

__all__: list[str] = []

_FUSED = "the fused kernels have no second derivative, pytorch#116350, pytorch#117629"


@repairs(F.scaled_dot_product_attention, because=_FUSED)
def _scaled_dot_product_attention(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if (
        attn_mask is not None and attn_mask.dtype == torch.bool
    ):  # the composite kernel adds its mask
        zeros = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = zeros.masked_fill(attn_mask.logical_not(), -math.inf)
    idle = None
    if attn_mask is not None and forward_is_differentiated(rules):
        # A row that attends to nothing gives zeros, but NaN in derivatives of torch's forward rule.
        idle = (attn_mask == -math.inf).all(-1, keepdim=True)
        attn_mask = attn_mask.masked_fill(idle, 0.0)
    output: Tensor = torch.ops.aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return output if idle is None else output.masked_fill(idle, 0.0)


_multi_head_attention = see_through(F.multi_head_attention_forward)


@repairs(F.multi_head_attention_forward, because="it calls the fused kernels: " + _FUSED)
def _multi_head_attention_forward(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # Dynamo cannot trace the body under a mode (2.13)
        with sdpa_kernel(SDPBackend.MATH):
            return F.multi_head_attention_forward(*args, **kwargs)
    with rules.on():
        return _multi_head_attention(*args, **kwargs)
