"""Recurrent layers without their fused kernel."""

from __future__ import annotations

from typing import Any

import torch

from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    torch.lstm, because="its oneDNN kernel (single and half precision, CPU) has no forward rule"
)
def _lstm(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return torch.lstm(*args, **kwargs)
    fused = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return torch.lstm(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)
