"""`python -m secorder_func verify package.module:function`: find the user's problem, verify it, print the report."""

from __future__ import annotations

import io
import sys
from typing import Any, NamedTuple

import torch

from secorder_func import tree
from secorder_func.typing import LossFn, Tree
from secorder_func.verify import returned
from secorder_func.verify._verify import verify
from secorder_func.verify.target import TargetError, call_target, current_folder_importable

__all__ = ["UserProblem", "load", "run", "verify_and_print"]


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
    given = returned.read(call_target(target))
    return UserProblem(given.f, given.params, returned.first_batch(given, lambda: _read(given)))


def _read(given: returned.Returned) -> tuple[Any, ...]:
    """Return the only batch, or the first of several, on the device of the parameters."""
    if given.batches is None:
        assert given.batch is not None
        return given.batch
    tensors = tree.tensors_in(given.params)
    return next(given.batches.read(tensors[0].device if tensors else None))
