"""Transposed convolutions with output padding, whose third derivatives raise in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


def _written_out(convolve: Any) -> None:
    @repairs(
        convolve, because="its third derivatives raise where output_padding is not zero (2.13)"
    )
    def _conv_transpose(
        rules: Rules,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        axes = weight.ndim - 2
        extra = _each(output_padding, axes)
        if not rules.higher or not any(extra):
            plain: Tensor = convolve(
                input, weight, bias, stride, padding, output_padding, groups, dilation
            )
            return plain
        whole = convolve(input, weight, None, stride, 0, 0, groups, dilation)
        # Padding crops both ends of an axis; output padding crops its last end less, or adds zeros there.
        ends = [
            end
            for crop, more in zip(_each(padding, axes), extra, strict=True)
            for end in (more - crop, -crop)
        ]
        output = F.pad(whole, ends[::-1])
        return output if bias is None else output + bias.reshape(-1, *[1] * axes)


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


for _convolve in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
    _written_out(_convolve)
