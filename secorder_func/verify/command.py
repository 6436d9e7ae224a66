"""`python -m secorder_func verify package.module:function`: find the user's problem, verify it, print the report."""

from __future__ import annotations

import io
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from secorder_func import tree
from secorder_func.nn import functional_loss
from secorder_func.typing import LossFn, Tree
from secorder_func.verify._verify import verify
from secorder_func.verify.target import (
    TargetError,
    call_target,
    current_folder_importable,
    data_of,
    quoted,
)

__all__ = ["UserProblem", "load", "run", "verify_and_print"]

_OF_LOSS = "(f, params, *args) or (f, params, batches)"
_OF_MODULE = "(model, loss_fn, inputs, targets) or (model, loss_fn, batches)"
_RETURNS = f"{_OF_LOSS}, or {_OF_MODULE}"


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
    first, *rest = returned
    if not isinstance(first, nn.Module):
        if not rest:
            raise TargetError(f"with a loss the function must return {_OF_LOSS}, got {given}")
        params, *data = rest
        return UserProblem(first, params, _first_batch(data, params))
    if len(rest) not in (2, 3):
        raise TargetError(f"with a module the function must return {_OF_MODULE}, got {given}")
    loss_fn, *data = rest
    try:
        f, params = functional_loss(first, loss_fn)
    except (TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    return UserProblem(f, params, _first_batch(data, params))


def _first_batch(data: list[Any], params: Tree) -> tuple[Any, ...]:
    """Return the only batch, or the first of several, on the device of the parameters."""
    try:
        batch, batches = data_of(data)
        if batches is None:
            assert batch is not None
            return batch
        tensors = tree.tensors_in(params)
        return next(batches.read(tensors[0].device if tensors else None))
    except StopIteration:
        raise TargetError("there are no batches") from None
    except Exception as error:  # whatever the user's data do
        raise TargetError(f"reading the data raises {quoted(error)}") from error
