"""One product of one problem through each way into the library, several probes at once where the way allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from secorder_func import CurvatureFallbackWarning, hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from tests.coverage.problems import Problem
from tests.coverage.reference import SEED, Truth, direction, flat, truth_of

Tree = Any


def transform(problem: Problem, v: Tree, other: Tree) -> Tree:
    """Return the product by the functional transform."""
    return hvp(problem.f)(_detached(problem), v)


def operator(problem: Problem, v: Tree, other: Tree) -> Tree:
    """Return it as the first of two products with one operator."""
    return _first(hessian_operator(problem.f, _detached(problem)).mm(_stacked(v, other)))


def mapped(problem: Problem, v: Tree, other: Tree) -> Tree:
    """Return it as the first of two mapped over the vectors."""
    over = torch.func.vmap(hvp(problem.f), in_dims=(None, 0), randomness="same")
    return _first(over(_detached(problem), _stacked(v, other)))


def adapter(problem: Problem, v: Tree, other: Tree) -> Tree:
    """Return the product by the drop-in, a list in the order of the leaves."""
    leaves = optree.tree_leaves(problem.params)
    return exact_hvp(problem.closure, leaves, optree.tree_leaves(v))


ENTRY_POINTS: dict[str, Callable[[Problem, Tree, Tree], Tree]] = {
    "transform": transform,
    "operator": operator,
    "mapped": mapped,
    "adapter": adapter,
}


def by_mode(mode: Any) -> Callable[[Problem, Tree, Tree], Tree]:
    """Return the entry point of the functional transform in a named mode."""
    return lambda problem, v, other: hvp(problem.f, mode=mode)(_detached(problem), v)


def mapped_by_mode(mode: Any) -> Callable[[Problem, Tree, Tree], Tree]:
    """Return the first of two products mapped over the vectors, in a named mode."""

    def route(problem: Problem, v: Tree, other: Tree) -> Tree:
        over = torch.func.vmap(hvp(problem.f, mode=mode), in_dims=(None, 0), randomness="same")
        return _first(over(_detached(problem), _stacked(v, other)))

    return route


@dataclass(frozen=True)
class Verdict:
    """`right` is None where the library raised, and `error` is what it raised."""

    right: bool | None
    error: Exception | None = None


def judge(
    problem: Problem, entry_points: dict[str, Callable[[Problem, Tree, Tree], Tree]]
) -> tuple[Truth, dict[str, Verdict]]:
    """Return the truth about one random product, and the verdict on each entry point."""
    v, other = direction(problem, 5), direction(problem, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the functions in its databases
        truth = truth_of(problem, v)
        verdicts = {name: _verdict(problem, f, v, other, truth) for name, f in entry_points.items()}
    return truth, verdicts


def _verdict(problem: Problem, entry: Any, v: Tree, other: Tree, truth: Truth) -> Verdict:
    torch.manual_seed(SEED)
    warnings.simplefilter("ignore", CurvatureFallbackWarning)
    try:
        answer = entry(problem, v, other)
    except Exception as error:
        return Verdict(None, error)
    return Verdict(truth.value is not None and truth.accepts(answer))


def _detached(problem: Problem) -> Tree:
    return optree.tree_map(Tensor.detach, problem.params)


def _stacked(v: Tree, other: Tree) -> Tree:
    return optree.tree_map(lambda a, b: torch.stack([a, b]), v, other)


def _first(stacked: Tree) -> Tree:
    return optree.tree_map(lambda leaf: leaf[0], stacked)


__all__ = ["ENTRY_POINTS", "Verdict", "by_mode", "flat", "judge", "mapped_by_mode"]
