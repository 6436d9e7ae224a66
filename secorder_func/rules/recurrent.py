"""Recurrent layers without their fused kernel."""

from __future__ import annotations

from typing import Any

import torch

from secorder_func.rules.levels import mapping
from secorder_func.rules.recurrent_steps import WRITTEN_OUT
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []


@repairs(
    torch.lstm,
    because="its oneDNN kernel (single and half precision, CPU) has no forward rule; vmap has none for it",
)
def _lstm(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return torch.lstm(*args, **kwargs)
    if mapping():
        return WRITTEN_OUT[torch.lstm](*args, **kwargs)
    fused = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return torch.lstm(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)


def _mapped(function: Any) -> None:
    @repairs(function, because="vmap has no rule for it")
    def _step_by_step(rules: Rules, *args: Any, **kwargs: Any) -> Any:
        if mapping():
            return WRITTEN_OUT[function](*args, **kwargs)
        return function(*args, **kwargs)


for _function in (torch.gru, torch.rnn_tanh, torch.rnn_relu):
    _mapped(_function)
