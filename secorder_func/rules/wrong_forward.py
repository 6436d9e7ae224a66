"""Functions whose forward rule in torch gives wrong second derivatives, silently.

Under forward mode they raise `WrongForwardRuleError`, upon which `"auto"` takes reverse over reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from secorder_func.rules.registry import Rules, WrongForwardRuleError, repairs

__all__: list[str] = []


def _refuse_forward(function: Callable[..., Any], only: Callable[..., bool] | None = None) -> None:
    @repairs(function, because="its forward rule gives wrong second derivatives, pytorch#198017")
    def _refuse(rules: Rules, *args: Any, **kwargs: Any) -> Any:
        if rules.forward and (only is None or only(*args, **kwargs)):
            raise WrongForwardRuleError(
                f"torch's forward rule of {function.__name__} gives wrong second derivatives"
            )
        return function(*args, **kwargs)


def _is_product(*args: Any, **kwargs: Any) -> bool:
    return kwargs.get("reduce", args[4] if len(args) > 4 else None) == "prod"


for _function in (torch.scatter_reduce, torch.Tensor.scatter_reduce, torch.Tensor.scatter_reduce_):
    _refuse_forward(_function, only=_is_product)

for _name in ("triangular_solve", "cholesky_inverse", "cholesky_solve"):
    _refuse_forward(getattr(torch, _name))
    _refuse_forward(getattr(torch.Tensor, _name))
