"""A classifier so small that every matrix of it can be had by other means."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import tree
from secorder_func.report.problem import Problem


@dataclass(frozen=True, eq=False)
class Dense:
    """Matrices of a problem by torch's double backward, entries in the order of `tree.ravel`."""

    problem: Problem

    def hessian(self, rows: slice = slice(None)) -> Tensor:
        """Return the Hessian of the mean loss of some samples."""
        flat, unravel = tree.ravel(self.problem.params)
        x, y = self.problem.inputs[rows], self.problem.targets[rows]
        return torch.autograd.functional.hessian(
            lambda p: F.cross_entropy(self.problem.model_fn(unravel(p), x), y), flat
        )

    def gauss_newton(self) -> Tensor:
        """Return the mean over samples of `J^T (diag p - p p^T) J`."""
        flat, unravel = tree.ravel(self.problem.params)
        J = torch.autograd.functional.jacobian(
            lambda p: self.problem.model_fn(unravel(p), self.problem.inputs), flat
        )
        p = self.problem.model_fn(self.problem.params, self.problem.inputs).softmax(1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return (J.mT @ middle @ J).mean(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def problem(generator: torch.Generator) -> Problem:
    model = nn.Sequential(
        nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 3, dtype=torch.float64)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator))
    inputs = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (7,), generator=generator)
    return Problem.of(model, F.cross_entropy, inputs, targets)


@pytest.fixture
def dense(problem: Problem) -> Dense:
    return Dense(problem)
