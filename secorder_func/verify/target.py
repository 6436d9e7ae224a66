"""A user's function, `package.module:function`, found and called."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secorder_func.verify._causes import listed
from secorder_func.verify._evidence import quoted

__all__ = [
    "BATCHES",
    "TargetError",
    "call_target",
    "current_folder_importable",
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
    if name not in vars(module):
        raise TargetError(_of_missing(module, name))
    if not callable(vars(module)[name]):
        given = type(vars(module)[name]).__name__
        raise TargetError(f"{name} must be a function without arguments, got {given}")
    return vars(module)[name]


def _of_missing(module: Any, name: str) -> str:
    """Say where the function may be that a module does not have."""
    title = module.__name__
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        folder = Path(next(iter(module.__path__)))
        return (
            f"{title} is the folder {folder}, not a module. Run the command inside of it, or name "
            f"{title}.{_file_with(folder, name)}:{name}"
        )
    close = difflib.get_close_matches(
        name, [k for k, v in vars(module).items() if callable(v)], n=1
    )
    if close:
        return f"{title} has no function {name}. Did you mean {close[0]}?"
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == title and not key.startswith("_")
    ]
    there = f"It has {listed(own)}" if own else "It defines no function"
    return f"{title} has no function {name}. {there}"


def _file_with(folder: Path, name: str) -> str:
    """Return the name of a file of a folder that defines a function, `FILE` if there is none."""
    for file in sorted(folder.glob("*.py")):
        if re.search(rf"^def {re.escape(name)}\(", file.read_text(errors="ignore"), re.MULTILINE):
            return file.stem
    return "FILE"


def _call(function: Any) -> Any:
    name = getattr(function, "__name__", "the function")
    try:
        inspect.signature(function).bind()
    except ValueError:  # it has no signature
        pass
    except TypeError as error:
        raise TargetError(f"{name} must be a function without arguments: {error}") from error
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
