"""Every module and operator of torch's databases: quadratic forms by second-order propagation, right or refused.

The truth is that of the product, `v . Hv`; the error is measured against `|v| |Hv|`. Of two groups of two vectors each,
the first is a random vector twice.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

import optree
import pytest
import torch
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.registry import WrongForwardRuleError
from secorder_func.transforms.forms import forms_of_loss
from secorder_func.transforms.loss import flat_loss
from tests.coverage.further import further_problems
from tests.coverage.problems import Problem, module_problems, operator_problems
from tests.coverage.reference import SEED, direction, flat, truth_of
from tests.coverage.test_databases import UNDEFINED

pytestmark = pytest.mark.filterwarnings("ignore")

FACTOR = 10
"""How much further than a product a form may be off: products of terms are larger than what they sum to."""
SMALL = 1e-5
"""Below this `|v| |Hv|` counts as so much, for forms that vanish by cancellation."""
ROUNDED = {"half": 1e-2, "bfloat16": 1e-2, "chalf": 1e-2}
"""Functions that round their terms to half precision, and how far a form may then be off."""


def form(problem: Problem, v: Tensor, other: Tensor) -> Tensor:
    """Return `v . Hv` out of a propagation along several vectors."""
    params = optree.tree_map(Tensor.detach, problem.params)
    loss = flat_loss(problem.f, params, (), {}, has_aux=False, where="form")
    stacks = [
        torch.stack([a, a, b, b])
        for a, b in zip(optree.tree_leaves(v), optree.tree_leaves(other), strict=True)
    ]
    draws = [lambda stack=stack: stack for stack in stacks]
    torch.manual_seed(SEED)
    return forms_of_loss(loss, draws, 4, 2)[0][0] / 2


def judged(problems: Iterable[Problem]) -> tuple[dict[str, list[bool | None]], list[str]]:
    """Return by subject whether each form was right, None where it was refused, and what went wrong."""
    verdicts: dict[str, list[bool | None]] = defaultdict(list)
    complaints = []
    for problem in problems:
        leaves = optree.tree_leaves(problem.params)
        dense = all(leaf.layout == torch.strided for leaf in leaves)
        if not leaves or not dense or problem.subject in UNDEFINED:
            continue
        v, other = direction(problem, 5), direction(problem, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = truth_of(problem, v)
            assert truth.value is not None
            try:
                found = form(problem, v, other)
            except (NoExactRouteError, WrongForwardRuleError):
                verdicts[problem.subject].append(None)
                continue
            except Exception as error:
                verdicts[problem.subject].append(None)
                if not isinstance(error, (RuntimeError, NotImplementedError)):
                    complaints.append(f"{problem.name}: {error!r}")
                continue
        vector = flat(v)
        expected = vector @ truth.value
        size = float(vector.norm() * truth.value.norm())
        gap = abs(float(found - expected))
        tolerance = ROUNDED.get(problem.subject, FACTOR * truth.tolerance)
        undefined = not bool(expected.isfinite()) or bool(problem.closure().isnan())
        right = gap <= tolerance * max(size, SMALL) or undefined
        verdicts[problem.subject].append(right)
        if not right:
            complaints.append(f"{problem.name}: {float(found)} for {float(expected)} of {size}")
    return verdicts, complaints


def _check(problems: Iterable[Problem], *, at_least: float) -> None:
    verdicts, complaints = judged(problems)
    assert not complaints, "\n".join(complaints)
    propagated = [subject for subject, found in verdicts.items() if any(found)]
    assert len(propagated) >= at_least * len(verdicts), sorted(set(verdicts) - set(propagated))


def _thinned(problems: Iterable[Problem], step: int) -> Iterable[Problem]:
    return (problem for index, problem in enumerate(problems) if index % step == 0)


def test_a_sample_of_the_modules_has_right_forms() -> None:
    _check(chain(_thinned(module_problems(), 31), further_problems()), at_least=0.9)


def test_one_case_of_every_sixth_operator_has_a_right_form_or_is_refused() -> None:
    _check(_thinned(operator_problems(1), 6), at_least=0.6)


@pytest.mark.slow
def test_all_modules_have_right_forms() -> None:
    _check(module_problems(), at_least=0.95)


@pytest.mark.slow
def test_all_operators_have_right_forms_or_are_refused() -> None:
    _check(operator_problems(20), at_least=0.6)
