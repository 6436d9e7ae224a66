"""`python -m secorder_func verify package.module:function`: find the user's problem, verify it, print the report."""

from __future__ import annotations

import io
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from secorder_func.nn import functional_loss
from secorder_func.typing import LossFn, Tree
from secorder_func.verify._verify import verify
from secorder_func.verify.target import TargetError, call_target, current_folder_importable

__all__ = ["UserProblem", "load", "run", "verify_and_print"]

_RETURNS = "(f, params, *args) or (model, loss_fn, inputs, targets)"


class UserProblem(NamedTuple):
    """The arguments of `verify`."""

    f: LossFn
    params: Tree
    args: tuple[Any, ...]


def run(target: str, *, seed: int, rtol: float | None) -> int:
    """Verify the problem that a user's function returns; return 0 if all is well, 1 if not, 2 if it cannot be had."""
    with current_folder_importable():
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
    """Call `package.module:function` and read what it returns; raise `TargetError` where that cannot be."""
    return _read(call_target(target))


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
