"""A backward pass that evaluates parts of the loss again does so under the rules.

Activation checkpointing runs its segment again when its gradient is taken. torch offers `autograd.grad` to a mode as a
whole, like a function of `torch.nn.functional`, and would run that segment with the rules switched off.
"""

from __future__ import annotations

from typing import Any

import torch

from secorder_func.rules.registry import DifferentiatesInside, Rules, repairs
from secorder_func.rules.see_through import see_through

__all__ = ["grad_under_rules"]

grad_under_rules = see_through(torch.autograd.grad)
"""torch.autograd.grad, which lets the rules in force see what its backward pass evaluates."""


@repairs(torch.autograd.grad, because="checkpointed segments run again inside it")
def _autograd_grad(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return torch.autograd.grad(*args, **kwargs)
    if kwargs.get("create_graph") and not rules.higher:
        raise DifferentiatesInside
    with rules.on():
        return grad_under_rules(*args, **kwargs)
