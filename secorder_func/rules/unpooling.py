"""Max unpooling as a scatter, refused where an index occurs twice.

Of two values for one place one is written, but torch's backward gives both its derivative. So the gradient is not that
of the loss, and what is differentiated further is no Hessian: differences of it disagree with double backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _ntuple

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import unwrapped
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


def _as_scatter(function: Callable[..., Tensor], dims: int) -> None:
    several = _ntuple(dims)

    @repairs(function, because="with repeated indices its gradient is not that of its output")
    def _unpool(
        rules: Rules,
        input: Tensor,
        indices: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        output_size: Any = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return function(input, indices, kernel_size, stride, padding, output_size)
        if _repeats(unwrapped(indices), dims):
            raise NoExactRouteError(
                f"{function.__name__} got an index twice, so that torch's gradient of it is not that of its output; "
                "pool without overlap (stride = kernel_size)"
            )
        kernel, steps = several(kernel_size), several(kernel_size if stride is None else stride)
        size = F._unpool_output_size(input, kernel, steps, several(padding), output_size)  # type: ignore[attr-defined]
        places, values = indices.flatten(-dims), input.flatten(-dims)
        lead = input.shape[:-dims]
        output = values.new_zeros((*lead, math.prod(size[-dims:])))
        return output.scatter(-1, places, values).reshape(*lead, *size[-dims:])


def _repeats(indices: Tensor, dims: int) -> bool:
    places = indices.flatten(-dims).sort(-1).values
    return bool((places[..., 1:] == places[..., :-1]).any())


for _dims, _name in enumerate(("max_unpool1d", "max_unpool2d", "max_unpool3d"), start=1):
    _as_scatter(getattr(F, _name), _dims)
