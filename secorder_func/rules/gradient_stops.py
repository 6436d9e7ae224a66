"""What stops derivatives in eager torch stops them in forward mode too.

`no_grad` switches reverse mode off and leaves forward mode on, and `.data` leaks tangents; both give wrong
second derivatives silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []

_DATA: Any = torch.Tensor.data


@repairs(
    torch._C._set_grad_enabled,
    because="no_grad does not stop forward mode, pytorch#78961, pytorch#128600",
)
def _set_grad_enabled(rules: Rules, mode: bool) -> None:
    torch._C._set_grad_enabled(mode)
    if rules.forward:
        torch._C._set_fwd_grad_enabled(mode)
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()  # a weight cast under no_grad has no derivatives


@repairs(_DATA.__get__, because=".data leaks derivatives of functorch levels, pytorch#128600")
def _data(rules: Rules, tensor: Tensor) -> Tensor:
    return tensor.detach()
