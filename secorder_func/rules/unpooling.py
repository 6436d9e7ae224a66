"""Max unpooling where an index occurs twice.

Of two values for one place one is written, but torch's backward gives both its derivative. So the gradient is not that
of the loss, and what is differentiated further is no Hessian: differences of it disagree with double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import unwrapped
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


def _refuse_repeated(function: Callable[..., Tensor], dims: int) -> None:
    @repairs(function, because="with repeated indices its gradient is not that of its output")
    def _unpool(rules: Rules, input: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling() and _repeats(unwrapped(indices), dims):
            raise NoExactRouteError(
                f"{function.__name__} got an index twice, so that torch's gradient of it is not that of its output; "
                "pool without overlap (stride = kernel_size)"
            )
        return function(input, indices, *args, **kwargs)


def _repeats(indices: Tensor, dims: int) -> bool:
    places = indices.flatten(-dims).sort(-1).values
    return bool((places[..., 1:] == places[..., :-1]).any())


for _dims, _name in enumerate(("max_unpool1d", "max_unpool2d", "max_unpool3d"), start=1):
    _refuse_repeated(getattr(F, _name), _dims)
