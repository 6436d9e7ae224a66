"""A product draws the random numbers that one plain evaluation of the loss draws, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import (
    CurvatureFallbackWarning,
    NoExactRouteError,
    ggn_operator,
    ggnvp,
    hessian_operator,
    hvp,
)
from tests import oracles, problems

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]


def _state_after(call: Callable[[], Any]) -> Tensor:
    torch.manual_seed(5)
    call()
    return torch.get_rng_state()


def _dropout() -> tuple[problems.Problem, Any, Tensor]:
    problem = problems.load("dropout")
    v = oracles.random_like(problem.params, 1)
    return problem, v, _state_after(lambda: problem.f(problem.params, *problem.args))


def test_the_plain_evaluation_draws_at_all() -> None:
    _, _, once = _dropout()
    assert not torch.equal(once, _state_after(lambda: None))


@pytest.mark.parametrize("mode", MODES)
def test_hvp_leaves_the_random_state_of_one_evaluation(mode: Any) -> None:
    problem, v, once = _dropout()
    product = hvp(problem.f, mode=mode)
    assert torch.equal(_state_after(lambda: product(problem.params, v, *problem.args)), once)


@pytest.mark.parametrize("mode", MODES)
def test_ggnvp_leaves_the_random_state_of_one_evaluation(mode: Any) -> None:
    problem, v, once = _dropout()
    product = ggnvp(problem.model_fn, problem.loss_fn, mode=mode)
    assert torch.equal(_state_after(lambda: product(problem.params, v, *problem.args)), once)


@pytest.mark.parametrize("mode", MODES)
def test_an_operator_and_its_products_leave_the_random_state_of_one_evaluation(mode: Any) -> None:
    problem, v, once = _dropout()

    def use() -> None:
        op = hessian_operator(problem.f, problem.params, *problem.args, mode=mode)
        op @ v
        op.dense()

    assert torch.equal(_state_after(use), once)


@pytest.mark.parametrize("mode", MODES)
def test_a_ggn_operator_leaves_the_random_state_of_one_evaluation(mode: Any) -> None:
    problem, v, once = _dropout()

    def use() -> None:
        op = ggn_operator(
            problem.model_fn, problem.loss_fn, problem.params, *problem.args, mode=mode
        )
        op @ v
        op.dense()

    assert torch.equal(_state_after(use), once)


P, V = torch.tensor([0.5, -1.0, 2.0, 0.1]).double(), torch.ones(4).double()
Y = torch.zeros(4).double()


def _reflections_with_noise(p: Tensor) -> Tensor:
    noisy = torch.sin(p) * torch.rand(4).double()
    return torch.ormqr(torch.eye(4).double(), noisy, Y[:, None] + 1).square().sum()


def _margin_with_noise(p: Tensor) -> Tensor:
    scores = torch.rand(4).double() * p**2
    margin: Tensor = torch.ops.aten.multi_margin_loss(scores, torch.tensor([1]))
    return margin.square()


def test_a_fallback_leaves_the_random_state_of_one_evaluation() -> None:
    def use() -> None:
        with pytest.warns(CurvatureFallbackWarning):
            hvp(_reflections_with_noise)(P, V)

    assert torch.equal(_state_after(use), _state_after(lambda: _reflections_with_noise(P)))


def test_a_fallback_draws_the_numbers_of_the_first_attempt() -> None:
    torch.manual_seed(5)
    with pytest.warns(CurvatureFallbackWarning):
        hv = hvp(_reflections_with_noise)(P, V)
    torch.manual_seed(5)
    oracles.assert_same(hv, oracles.hvp(_reflections_with_noise, P, V))


def test_the_error_that_no_route_exists_leaves_the_random_state_as_it_was() -> None:
    def use() -> None:
        with pytest.raises(NoExactRouteError):
            hvp(_margin_with_noise)(P, V)

    assert torch.equal(_state_after(use), _state_after(lambda: None))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_over_v_accepts_torchs_randomness_argument(randomness: str) -> None:
    problem, _, _ = _dropout()
    rows = [oracles.random_like(problem.params, seed) for seed in (1, 2)]
    stacked = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    together = torch.func.vmap(
        lambda v: hvp(problem.f)(problem.params, v, *problem.args), randomness=randomness
    )(stacked)
    assert all(float(leaf.norm()) > 0 for leaf in together.values())
