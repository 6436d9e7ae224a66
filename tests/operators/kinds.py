"""The two curvature operators of a problem and their dense oracles, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secorder_func import LinearOperator, ggn_operator, hessian_operator
from tests import oracles, problems


def hessian_of(problem: problems.Problem, mode: Any = "auto") -> LinearOperator:
    return hessian_operator(problem.f, problem.params, *problem.args, mode=mode)


def ggn_of(problem: problems.Problem, mode: Any = "auto") -> LinearOperator:
    return ggn_operator(problem.model_fn, problem.loss_fn, problem.params, *problem.args, mode=mode)


def dense_of(name: str, kind: str) -> Tensor:
    problem = problems.load(name)
    torch.manual_seed(5)
    if kind == "hessian":
        return oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    return oracles.ggn(
        problem.model_fn, problem.loss_fn, problem.params, *problem.args, model=problem.model
    )


KINDS = {"hessian": hessian_of, "ggn": ggn_of}
