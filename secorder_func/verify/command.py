"""`python -m secorder_func verify package.module:function`: find the user's problem, verify it, print the report."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from secorder_func.nn import functional_loss
from secorder_func.typing import LossFn, Tree
from secorder_func.verify._evidence import quoted
from secorder_func.verify._verify import verify

__all__ = ["TargetError", "UserProblem", "load", "run", "verify_and_print"]

_RETURNS = "(f, params, *args) or (model, loss_fn, inputs, targets)"


class TargetError(Exception):
    """The user's problem cannot be had; the message says why, and what to do."""


class UserProblem(NamedTuple):
    """The arguments of `verify`."""

    f: LossFn
    params: Tree
    args: tuple[Any, ...]


def run(target: str, *, seed: int, rtol: float | None) -> int:
    """Verify the problem that a user's function returns; return 0 if all is well, 1 if not, 2 if it cannot be had."""
    with _current_folder_importable():
        try:
            torch.manual_seed(seed)
            problem = load(target)
        except TargetError as error:
            print(f"verify {target}: {error}", file=sys.stderr)
            return 2
        return verify_and_print(target, problem, seed=seed, rtol=rtol)


def verify_and_print(title: str, problem: UserProblem, *, seed: int, rtol: float | None) -> int:
    """Verify, print the report, return 0 if all is well, 1 if not, 2 if `verify` does not take the arguments."""
    generator = torch.Generator().manual_seed(seed)
    try:
        result = verify(problem.f, problem.params, *problem.args, generator=generator, rtol=rtol)
    except (TypeError, ValueError) as error:  # the arguments, never the loss
        print(error, file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the sign for a product
    print(f"{title}\n\n{result}")
    return 0 if result.ok else 1


def load(target: str) -> UserProblem:
    """Call `package.module:function` and read what it returns.

    Raises
    ------
    TargetError
        There is no such module or function, it raises, or it returns something else.
    """
    module, colon, name = target.partition(":")
    if not (colon and module and name):
        raise TargetError("expected package.module:function, with one colon")
    if module.endswith(".py") or "/" in module or "\\" in module:
        plain = Path(module.replace("\\", "/")).stem
        raise TargetError(
            f"expected a module, not a file. Write {plain}:{name}, in the file's folder"
        )
    return _read(_call(_attribute(_module(module), name), target))


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


def _call(function: Any, target: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise TargetError(f"the function raises {quoted(error)}") from error


def _read(returned: Any) -> UserProblem:
    if not isinstance(returned, (tuple, list)):
        raise TargetError(f"the function must return {_RETURNS}, got {type(returned).__name__}")
    given = f"({', '.join(type(item).__name__ for item in returned)})"
    if not returned or not callable(returned[0]):
        raise TargetError(f"the function must return {_RETURNS}, got {given}")
    if not isinstance(returned[0], nn.Module):
        if len(returned) < 2:
            raise TargetError(
                f"with a loss the function must return (f, params, *args), got {given}"
            )
        f, params, *args = returned
        return UserProblem(f, params, tuple(args))
    if len(returned) != 4:
        expected = "with a module the function must return (model, loss_fn, inputs, targets)"
        raise TargetError(f"{expected}, got {given}")
    model, loss_fn, inputs, targets = returned
    try:
        f, params = functional_loss(model, loss_fn)
    except (TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    return UserProblem(f, params, (inputs, targets))


@contextmanager
def _current_folder_importable() -> Iterator[None]:
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
