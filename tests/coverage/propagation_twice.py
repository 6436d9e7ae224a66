"""Which functions pass second-order terms by torch's own forward rule, differentiated, and are right.

`make proven` writes `secorder_func/taylor/second_order/proven.py`: the functions without a rule of ours whose forms
were right, or refused, in every case of torch's databases, and right in one at least; only such that are also right
where a backward pass follows, because that was proved on more cases.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from secorder_func.taylor.proven import NAMES
from secorder_func.taylor.second_order import general, propagation
from tests.coverage.further import further_problems
from tests.coverage.problems import operator_problems
from tests.coverage.propagation import name_of
from tests.coverage.test_second_order import judged

FILE = Path(general.__file__).with_name("proven.py")
PAGE = '''\
"""Functions whose forward rule in torch is right when it is differentiated forward, by a sweep of torch's databases.

Written by `make proven`; the tests prove each again.
"""

__all__ = ["NAMES"]

NAMES: tuple[str, ...] = (
{lines})
'''


class _Everything:
    def __contains__(self, function: Any) -> bool:
        return bool(name_of(function))


@contextmanager
def everything_allowed() -> Iterator[set[Any]]:
    """Let every function without a rule pass terms by torch's own; yield the functions that did."""
    used: set[Any] = set()
    by_torch = propagation.bent_by_torch

    def noted(t: Any, func: Any, *rest: Any) -> Any:
        used.add(func)
        return by_torch(t, func, *rest)

    before = propagation.PROVEN_TWICE
    propagation.PROVEN_TWICE, propagation.bent_by_torch = _Everything(), noted  # type: ignore[assignment]
    try:
        yield used
    finally:
        propagation.PROVEN_TWICE, propagation.bent_by_torch = before, by_torch


def proven() -> list[str]:
    """Return the names of the functions that torch's own rule was right for."""
    verdicts: dict[str, list[bool | None]] = defaultdict(list)
    for problem in chain(further_problems(), operator_problems(20), operator_problems(3, seed=1)):
        with everything_allowed() as used:
            found, _ = judged([problem])
        for function in used:
            verdicts[name_of(function)] += [v for each in found.values() for v in each]
    return sorted(
        name
        for name, found in verdicts.items()
        if name in NAMES and any(found) and all(v is not False for v in found)
    )


def main() -> None:
    """Prove and write."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = proven()
    FILE.write_text(
        PAGE.format(lines="".join(f'    "{name}",\n' for name in names)), encoding="utf-8"
    )
    print(f"{FILE}: {len(names)} functions")


if __name__ == "__main__":
    main()
