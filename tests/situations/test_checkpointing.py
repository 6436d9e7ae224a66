"""Activation checkpointing with `use_reentrant=False`: closures are exact by double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from secorder_func import CurvatureFallbackWarning
from secorder_func.compat.core.hvp import approximate_hvp
from tests import oracles
from tests.situations.entries import (
    CLOSURES,
    ENTRIES,
    GAUSS_NEWTON,
    Case,
    assert_product,
    classification,
    double_backward,
    every_closure,
    gauss_newton,
)

pytestmark = pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")


class Checkpointed(nn.Module):
    """A network whose first half is evaluated again in the backward pass."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, **options: Any) -> None:
        super().__init__()
        norm_layer = nn.LayerNorm(6) if norm else nn.Identity()
        self.segment = nn.Sequential(
            nn.Linear(4, 6), norm_layer, nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6)
        )
        self.head = nn.Linear(6, 3)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.segment, x, use_reentrant=False, **self.options) ** 2)


def _case(**options: Any) -> Case:
    torch.manual_seed(0)
    return Case(Checkpointed(**options).double(), F.cross_entropy, *classification())


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "without early stop": {"early_stop": False},
    "norm": {"norm": True},
    "dropout": {"dropout": 0.4},
    "dropout without early stop": {"dropout": 0.4, "early_stop": False},
    "without determinism check": {"determinism_check": "none"},
}


@pytest.mark.parametrize("options", OPTIONS)
@every_closure
def test_closures_are_exact_with_the_mask_of_one_evaluation(entry: str, options: str) -> None:
    assert_product(entry, _case(**OPTIONS[options]), seed=7)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_answer_is_that_of_the_network_without_checkpointing(options: str) -> None:
    case = _case(**OPTIONS[options])

    class Plain(nn.Module):
        def __init__(self, model: Checkpointed) -> None:
            super().__init__()
            self.segment, self.head = model.segment, model.head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.segment(x) ** 2)

    plain = Case(case.model, case.loss_fn, case.x, case.y, truth=Plain(case.model))
    assert_product("exact_hvp", plain, seed=7)


def test_a_gauss_newton_product_is_exact() -> None:
    case = _case()
    v = case.vector()
    found = GAUSS_NEWTON["gauss_newton_product"](case, v)
    oracles.assert_same(found, gauss_newton(case, v))


@every_closure
def test_the_random_state_is_that_of_one_evaluation(entry: str) -> None:
    case = _case(dropout=0.4)
    v = case.vector()

    def state_after(call: Callable[[], Any]) -> Tensor:
        torch.manual_seed(5)
        call()
        return torch.get_rng_state()

    once = state_after(case.closure)
    assert torch.equal(state_after(lambda: ENTRIES[entry](case, v)), once)


def test_a_product_and_a_training_step_do_not_disturb_each_other() -> None:
    case, twin = _case(), _case()
    loss = case.closure()
    for entry in CLOSURES:
        ENTRIES[entry](case, case.vector())
    loss.backward()
    twin.closure().backward()
    oracles.assert_same([p.grad for p in case.params], [p.grad for p in twin.params])


@every_closure
def test_a_sequence_of_segments_is_exact(entry: str) -> None:
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()).double()

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    x, _ = classification()
    case = Case(Segments(), lambda z, y: z.square().sum(), x, truth=layers)
    assert_product(entry, case)


def test_differences_evaluate_a_segment_at_the_shifted_parameters() -> None:
    case = _case(norm=True)
    v = case.vector()
    estimate = approximate_hvp(case.closure, case.params, v)
    oracles.assert_same(estimate, double_backward(case, v), rtol=1e-7)


def test_the_fallback_is_admitted() -> None:
    case = _case()
    with pytest.warns(CurvatureFallbackWarning, match="double_backward"):
        ENTRIES["hvp"](case, case.vector())
