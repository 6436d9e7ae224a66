"""Ways of looking at an evaluation of a loss: what it calls, and with nothing held constant.

Each is a `TorchFunctionMode` that goes around the user's function, inside the library's rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FirstNotFinite", "HoldingNothing", "Shape", "Watch"]

_TENSOR: Any = torch.Tensor
_GET_DATA = _TENSOR.data.__get__
_SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled

_HOLDS: dict[Any, str] = {
    _TENSOR.detach: "detach()",
    torch.detach: "detach()",
    _GET_DATA: ".data",
}
_NUMBERS: dict[Any, str] = {
    _TENSOR.item: ".item()",
    _TENSOR.tolist: ".tolist()",
    _TENSOR.numpy: ".numpy()",
    _TENSOR.__float__: "float()",
    _TENSOR.__int__: "int()",
    _TENSOR.__array__: "a NumPy array",
}

_COMPARED = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
Shape = tuple[int, ...]


class Watch(TorchFunctionMode):
    """Notes what holds a part of the loss constant, and the coarsest floating dtype that is computed in.

    Attributes
    ----------
    holds
        `detach()`, `.data` and `no_grad` where they meet what depends on parameters.
    numbers
        Conversions of what depends on parameters to plain numbers.
    cuts
        Functions that make whole numbers or truth values of what depends on parameters.
    broadcast
        The shapes of outputs and targets that a loss function of torch compares although they differ.
    eps
        The largest unit roundoff among the results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.holds: set[str] = set()
        self.numbers: set[str] = set()
        self.cuts: set[str] = set()
        self.broadcast: dict[tuple[Shape, Shape], None] = {}
        self.eps = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _SET_GRAD_ENABLED and args and not args[0]:
            self.holds.add("no_grad")
        elif args and isinstance(args[0], Tensor) and args[0].requires_grad:
            if func in _HOLDS:
                self.holds.add(_HOLDS[func])
            elif func in _NUMBERS:
                self.numbers.add(_NUMBERS[func])
        result = func(*args, **(kwargs or {}))
        if func in _COMPARED:
            self._compare(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        elif args and isinstance(args[0], Tensor) and args[0].requires_grad and _is_whole(result):
            self.cuts.add(getattr(func, "__name__", str(func)).strip("_"))
        return result

    def _compare(
        self, input: Any, target: Any, *_: Any, reduction: str = "mean", **__: Any
    ) -> None:
        if reduction == "none":  # who reduces it may mean all pairs
            return
        shapes = [tuple(t.shape) for t in (input, target) if isinstance(t, Tensor)]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            self.broadcast[shapes[0], shapes[1]] = None


def _is_whole(result: Any) -> bool:
    """Say whether a result has no derivative, or a part of it, as the indices beside a maximum."""
    parts = result if isinstance(result, tuple) else (result,)
    return any(
        isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex()) for t in parts
    )


class FirstNotFinite(TorchFunctionMode):
    """Notes the first function that returns NaN or infinity; it looks at every number."""

    def __init__(self) -> None:
        super().__init__()
        self.function = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.function and isinstance(result, Tensor) and not torch.isfinite(result).all():
            self.function = getattr(func, "__name__", str(func))
        return result


class HoldingNothing(TorchFunctionMode):
    """Lets derivatives through `detach`, `.data` and `no_grad`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _HOLDS:
            return args[0]
        if func is _SET_GRAD_ENABLED:
            return None
        return func(*args, **(kwargs or {}))
