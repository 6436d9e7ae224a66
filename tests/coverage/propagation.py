"""Which functions pass a propagated term by torch's own forward rule, and are right when that is differentiated.

`make proven` writes `secorder_func/taylor/proven.py`: the functions without a rule of ours that were right, or refused,
in every case of torch's databases, alone and under vmap, and right in one at least. It takes about ten minutes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import resolve_name

from secorder_func.taylor import general, propagation
from tests.coverage.entry_points import Verdict, by_mode, judge, mapped_by_mode
from tests.coverage.further import further_problems
from tests.coverage.problems import Problem, module_problems, operator_problems
from tests.coverage.test_databases import UNDEFINED

FILE = Path(general.__file__).with_name("proven.py")
PAGE = '''\
"""Functions whose forward rule in torch is right when it is differentiated, by a sweep of torch's databases.

Written by `make proven`; the tests prove each again.
"""

__all__ = ["NAMES"]

NAMES = (
{lines})
'''
MODE = "reverse_over_forward"
WAYS = {"alone": by_mode(MODE), "mapped": mapped_by_mode(MODE)}


class _Everything:
    def __contains__(self, function: Any) -> bool:
        return True


@contextmanager
def everything_allowed() -> Iterator[list[Any]]:
    """Let every function without a rule pass a term by torch's own; yield the functions that did."""
    used: list[Any] = []
    by_torch = propagation.pushed_by_torch

    def noted(func: Any, args: Any, kwargs: Any, *terms: Any) -> Any:
        try:
            found = by_torch(func, args, kwargs, *terms)
        except RuntimeError as error:
            if "non-empty output" not in str(error):
                raise
            return func(*args, **kwargs), None  # a question to a tensor, not a function of it
        if any(isinstance(x, Tensor) and x.requires_grad for x in optree.tree_leaves(found[0])):
            used.append(func)
        return found

    before = propagation.PROVEN
    propagation.PROVEN, propagation.pushed_by_torch = _Everything(), noted  # type: ignore[assignment]
    try:
        yield used
    finally:
        propagation.PROVEN, propagation.pushed_by_torch = before, by_torch


def problems() -> Iterator[Problem]:
    """Yield all problems of the databases that can be judged."""
    cases = chain(
        module_problems(), further_problems(), operator_problems(20), operator_problems(3, seed=1)
    )
    for problem in cases:
        leaves = optree.tree_leaves(problem.params)
        dense = all(leaf.layout == torch.strided for leaf in leaves)
        if leaves and dense and problem.subject not in UNDEFINED:
            yield problem


def proven() -> list[str]:
    """Return the names of the functions that torch's own rule was right for."""
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    for problem in problems():
        for way, route in WAYS.items():
            with everything_allowed() as used:
                _, found = judge(problem, {way: route})
            for function in set(used):
                verdicts[name_of(function)].append(found[way])
    return sorted(
        name
        for name, found in verdicts.items()
        if name and any(v.right for v in found) and all(v.right is not False for v in found)
    )


def name_of(function: Any) -> str:
    """Return where torch has a function, from `torch.` on; nothing for what has no place there."""
    name = resolve_name(function) or ""
    name = name.removeprefix("torch.")
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return name if name and found == function else ""


def main() -> None:
    """Prove and write."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = proven()
    lines = "".join(f'    "{name}",\n' for name in names)
    FILE.write_text(PAGE.format(lines=lines), encoding="utf-8")
    print(f"{FILE}: {len(names)} functions")


if __name__ == "__main__":
    main()
