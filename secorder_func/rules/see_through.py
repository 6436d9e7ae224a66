"""Let a mode see what happens inside a Python function of torch.

`torch.nn.functional` offers each of its Python functions to the active mode as a whole. A mode that
declines runs the body with itself switched off, because switched on it would be offered the same function for
ever. The way out is a copy of the function whose check for overrides says no: its body then runs under the
mode, which is offered the functions that the body calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

__all__ = ["see_through"]

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def see_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that never offers itself to a mode."""
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function} is not written in Python")
    names = {**function.__globals__, **dict.fromkeys(_CHECKS, _never)}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False
