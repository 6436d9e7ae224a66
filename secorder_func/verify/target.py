"""A user's function, `package.module:function`, found and called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from secorder_func.operators import Batches
from secorder_func.verify._evidence import quoted

__all__ = [
    "BATCHES",
    "TargetError",
    "call_target",
    "current_folder_importable",
    "data_of",
    "quoted",
]

BATCHES = "a tuple for one batch, a list of batches, a DataLoader, or Batches"


class TargetError(Exception):
    """The user's problem cannot be had; the message says why, and what to do."""


def call_target(target: str) -> Any:
    """Return what `package.module:function` returns.

    Raises
    ------
    TargetError
        There is no such module or function, or it raises.
    """
    module, colon, name = target.partition(":")
    if not (colon and module and name):
        raise TargetError("expected package.module:function, with one colon")
    if module.endswith(".py") or "/" in module or "\\" in module:
        plain = Path(module.replace("\\", "/")).stem
        raise TargetError(
            f"expected a module, not a file. Write {plain}:{name}, in the file's folder"
        )
    return _call(_attribute(_module(module), name))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise TargetError(f"importing {name} raises {quoted(error)}") from error
        raise TargetError(
            f"there is no module {missing}. Run the command in the folder that has it, "
            "or install its package"
        ) from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise TargetError(f"importing {name} raises {quoted(error)}") from error


def _attribute(module: Any, name: str) -> Any:
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in vars(module):
        close = difflib.get_close_matches(name, functions, n=1)
        mend = f" Did you mean {close[0]}?" if close else ""
        raise TargetError(f"{module.__name__} has no function {name}.{mend}")
    if name not in functions:
        given = type(vars(module)[name]).__name__
        raise TargetError(f"{name} must be a function without arguments, got {given}")
    return vars(module)[name]


def _call(function: Any) -> Any:
    try:
        return function()
    except Exception as error:
        raise TargetError(f"the function raises {quoted(error)}") from error


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let modules of the current folder be imported, as `python -m` does and an installed command does not."""
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def data_of(rest: list[Any]) -> tuple[tuple[Any, ...] | None, Batches | None]:
    """Return the one batch, or the batches: what a user's function returns behind a loss and its parameters.

    Several items are the arguments of one batch, as are no items, a tuple, a tensor, a dict, a number. A list, a
    loader and `Batches` are batches.
    """
    if len(rest) != 1:
        return tuple(rest), None
    (data,) = rest
    if isinstance(data, Batches):
        return None, data
    if isinstance(data, tuple):
        return data, None
    if isinstance(data, (str, bytes)):
        raise TypeError(f"the batches must be {BATCHES}, got {type(data).__name__}")
    if isinstance(data, (Tensor, dict)) or not isinstance(data, Iterable):
        return (data,), None
    return None, Batches(data)
