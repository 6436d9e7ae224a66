"""Recurrent layers, which are propagated through step by step."""

from __future__ import annotations

from secorder_func.rules.recurrent_steps import WRITTEN_OUT
from secorder_func.taylor.registry import written

__all__: list[str] = []

for _function, _body in WRITTEN_OUT.items():
    written(_function)(_body)
