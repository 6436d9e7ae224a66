"""Random numbers inside the loss: whose mask a product has, and what is left of the global generator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from secorder_func import CurvatureFallbackWarning, functional_loss, hessian_operator, hvp
from secorder_func.compat.core.hvp import approximate_hvp, exact_hvp
from tests import oracles
from tests.situations.entries import (
    ENTRIES,
    GAUSS_NEWTON,
    Case,
    assert_product,
    classification,
    double_backward,
    every_entry,
    gauss_newton,
)


def _dropout() -> Case:
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.4), nn.Linear(30, 3)).double()
    return Case(model, F.cross_entropy, *classification())


def _state_after(call: Callable[[], Any]) -> Tensor:
    torch.manual_seed(5)
    call()
    return torch.get_rng_state()


@every_entry
def test_the_mask_is_that_of_a_plain_evaluation_from_the_same_seed(entry: str) -> None:
    assert_product(entry, _dropout(), seed=7)


@pytest.mark.parametrize("entry", GAUSS_NEWTON)
def test_the_gauss_newton_product_has_one_mask_too(entry: str) -> None:
    case = _dropout()
    v = case.vector()
    torch.manual_seed(7)
    expected = gauss_newton(case, v)
    torch.manual_seed(7)
    oracles.assert_same([h.detach() for h in GAUSS_NEWTON[entry](case, v)], expected)


@pytest.mark.parametrize("entry", {**ENTRIES, **GAUSS_NEWTON})
def test_the_generator_is_left_as_one_evaluation_leaves_it(entry: str) -> None:
    case = _dropout()
    v, once = case.vector(), _state_after(case.closure)
    assert not torch.equal(once, _state_after(lambda: None))
    assert torch.equal(_state_after(lambda: {**ENTRIES, **GAUSS_NEWTON}[entry](case, v)), once)


class _Fails(nn.Module):
    """Draws a mask, then raises."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        F.dropout(self.linear(x), 0.5)
        raise ArithmeticError("mine")


@pytest.mark.parametrize("entry", {**ENTRIES, **GAUSS_NEWTON})
def test_after_an_exception_the_generator_is_as_after_a_plain_evaluation(entry: str) -> None:
    case = Case(_Fails(), F.cross_entropy, *classification())
    v = case.vector()

    def failing(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with pytest.raises(ArithmeticError, match="mine"):
                call()

        return run

    once = _state_after(failing(case.closure))
    product = {**ENTRIES, **GAUSS_NEWTON}[entry]
    assert torch.equal(_state_after(failing(lambda: product(case, v))), once)


class _Reflections(nn.Module):
    """Draws a mask before a function without a forward rule, so that forward mode falls back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1]).double())

    def forward(self, x: Tensor) -> Tensor:
        noisy = F.dropout(torch.sin(self.weight), 0.3)
        return torch.ormqr(torch.eye(4).double(), noisy, x)


def test_a_fallback_repeats_the_mask_and_leaves_one_evaluations_state() -> None:
    x = torch.ones(4, 1).double()
    case = Case(_Reflections(), lambda output, y: (output**3).sum(), x)
    once = _state_after(case.closure)

    def fall_back() -> None:
        with pytest.warns(CurvatureFallbackWarning):
            assert_product("hvp", case, seed=5)

    assert torch.equal(_state_after(fall_back), once)


# -------------------------------------------------------------------------- which products share one


def _reached(products: list[Tensor]) -> Tensor:
    """Say which inputs of the last layer a product reaches: those that the mask has kept."""
    return products[2].abs().sum(0) > 0


def _mask_case() -> Case:
    """Return a loss whose product shows its mask: the last layer's block is zero where it drops."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 30).double(), nn.Linear(30, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            kept = F.dropout(torch.ones(30).double(), 0.5)
            return self.second(torch.tanh(self.first(x)) * kept)

    return Case(Masked(), F.cross_entropy, *classification())


def test_all_products_of_an_operator_have_one_mask() -> None:
    case = _mask_case()
    f, params = functional_loss(case.model, case.loss_fn)
    v, w = (dict(zip(params, case.vector(seed), strict=True)) for seed in (1, 2))
    for mode in ("auto", "forward_over_reverse"):
        op = hessian_operator(f, params, case.x, case.y, mode=mode)
        stacked = op.mm({k: torch.stack([v[k], w[k]]) for k in v})
        torch.manual_seed(99)  # the generator moves on between the products
        products = [op @ v, op @ w, {k: rows[1] for k, rows in stacked.items()}]
        masks = [_reached(list(product.values())) for product in products]
        assert 0 < int(masks[0].sum()) < 30
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        oracles.assert_same(products[2], products[1])


@pytest.mark.parametrize("entry", ["hvp", "hvp in reverse", "exact_hvp", "model_hvp"])
def test_each_call_draws_a_mask_of_its_own(entry: str) -> None:
    case = _mask_case()
    v = case.vector()
    first, second = (ENTRIES[entry](case, v) for _ in range(2))
    assert not torch.equal(_reached(first), _reached(second))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_over_samples_draws_one_mask_or_one_a_sample(randomness: str) -> None:
    case = _mask_case()
    f, params = functional_loss(case.model, case.loss_fn)
    v = dict(zip(params, case.vector(), strict=True))

    def product(x: Tensor, y: Tensor) -> Any:
        return hvp(f)(params, v, x[None], y[None])

    rows = vmap(product, randomness=randomness)(case.x, case.y)["second.weight"]
    masks = rows.abs().sum(1) > 0
    assert bool((masks == masks[0]).all()) is (randomness == "same")
    assert bool(masks.any(1).all())


def test_vmap_with_one_mask_equals_a_loop_over_the_samples() -> None:
    case = _mask_case()
    f, params = functional_loss(case.model, case.loss_fn)
    v = dict(zip(params, case.vector(), strict=True))
    torch.manual_seed(3)
    rows = vmap(lambda x, y: hvp(f)(params, v, x[None], y[None]), randomness="same")(case.x, case.y)
    for index in range(len(case.x)):
        one = Case(case.model, case.loss_fn, case.x[index : index + 1], case.y[index : index + 1])
        torch.manual_seed(3)
        expected = double_backward(one, list(v.values()))
        oracles.assert_same([row[index] for row in rows.values()], expected)


def test_a_module_with_state_and_a_mask_called_by_functional_call_is_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Dropout(0.4), nn.Tanh()).double()
    x, _ = classification()
    params = {name: p.detach() for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())

    def f(p: Any) -> Tensor:
        return functional_call(model, p, (x,)).square().sum()

    v = oracles.random_like(params, 1)
    torch.manual_seed(4)
    expected = oracles.hvp(f, params, v, model=model)
    torch.manual_seed(4)
    oracles.assert_same(hvp(f)(params, v), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_finite_difference_of_a_closure_leaves_one_evaluations_state_after_an_exception() -> None:
    case = Case(_Fails(), F.cross_entropy, *classification())

    def failing(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with pytest.raises(ArithmeticError):
                call()

        return run

    once = _state_after(failing(case.closure))
    v = case.vector()
    estimate = failing(lambda: approximate_hvp(case.closure, case.params, v))
    assert torch.equal(_state_after(estimate), once)


def test_a_private_generator_is_drawn_from_once_where_no_route_fails() -> None:
    generator = torch.Generator()
    w = torch.tensor([0.5, -1.0, 2.0]).double().requires_grad_()

    def draw() -> Tensor:
        return torch.rand(3, dtype=torch.float64, generator=generator)

    generator.manual_seed(1)
    noise, following = draw(), draw()
    generator.manual_seed(1)
    product = exact_hvp(lambda: (draw() * w**3).sum(), [w], torch.ones(3).double())
    torch.testing.assert_close(product, 6 * noise * w.detach())
    assert torch.equal(draw(), following)
