"""The documented products give the right numbers on every kind of model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from secorder_func.compat.core.hvp import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    model_hvp,
)
from tests import oracles, problems
from tests.compat.closures import MODELS, double_backward, same, snapshot, stateful


@pytest.mark.parametrize("name", MODELS)
def test_exact_hvp_is_double_backward(name: str) -> None:
    case = stateful(name)
    v = case.vector()
    expected = double_backward(case.func, case.params, v, case.model)
    oracles.assert_same(exact_hvp(case.func, case.params, v), expected)


@pytest.mark.parametrize("name", MODELS)
def test_exact_hvp_with_a_graph_is_double_backward(name: str) -> None:
    case = stateful(name)
    v = case.vector(1)
    expected = double_backward(case.func, case.params, v, case.model)
    product = exact_hvp(case.func, case.params, v, create_graph=True)
    oracles.assert_same([h.detach() for h in product], expected)


@pytest.mark.parametrize("name", MODELS)
def test_model_hvp_is_double_backward(name: str) -> None:
    case = stateful(name)
    v = case.vector(2)
    expected = double_backward(case.func, case.params, v, case.model)
    product = model_hvp(case.model, case.loss_fn, case.x, case.y, v)
    oracles.assert_same(product, expected)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "tree_outputs", "mlp_nonconvex", "mlp_mse_sum"])
def test_gauss_newton_product_is_the_dense_matrix_times_v(name: str, create_graph: bool) -> None:
    case, problem = stateful(name), problems.load(name)
    G = oracles.ggn(
        problem.model_fn, problem.loss_fn, problem.params, *problem.args, model=case.model
    )
    named = dict(zip(dict(case.model.named_parameters()), case.vector(3), strict=True))
    expected = oracles.like(G @ oracles.flat(named), named)
    product = gauss_newton_product(
        case.model, case.loss_fn, case.x, case.y, list(named.values()), create_graph=create_graph
    )
    found = dict(zip(named, (h.detach() for h in product), strict=True))
    oracles.assert_same(found, expected)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_train", "encoder_eval"])
def test_a_product_leaves_the_model_bit_identical(name: str) -> None:
    case = stateful(name)
    case.model(case.x)
    before, v = snapshot(case.model), case.vector()
    exact_hvp(case.func, case.params, v)
    exact_hvp(case.func, case.params, v, create_graph=True)
    approximate_hvp(case.func, case.params, v, num_samples=2)
    model_hvp(case.model, case.loss_fn, case.x, case.y, v)
    gauss_newton_product(case.model, case.loss_fn, case.x, case.y, v)
    gauss_newton_product(case.model, case.loss_fn, case.x, case.y, v, create_graph=True)
    assert same(before, snapshot(case.model))


@pytest.mark.parametrize("name", ["mlp_tanh", "layer_norm", "cnn_batchnorm_train", "instance_norm"])
def test_a_product_with_a_graph_has_right_third_derivatives(name: str) -> None:
    case = stateful(name)
    v, u = case.vector(4), case.vector(5)
    product = exact_hvp(case.func, case.params, v, create_graph=True)
    form = sum((h * a).sum() for h, a in zip(product, v, strict=True))
    third = torch.autograd.grad(form, case.params, allow_unused=True)
    slope = sum((t * a).sum() for t, a in zip(third, u, strict=True) if t is not None)

    def vHv(params: list[torch.Tensor]) -> torch.Tensor:
        kept = [p.detach().clone() for p in case.params]
        with torch.no_grad():
            for p, q in zip(case.params, params, strict=True):
                p.copy_(q)
        h = double_backward(case.func, case.params, v, case.model)
        with torch.no_grad():
            for p, q in zip(case.params, kept, strict=True):
                p.copy_(q)
        return oracles.dot(v, h)

    point = [p.detach().clone() for p in case.params]
    expected = oracles.directional_derivative(vHv, point, u)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_the_graph_reaches_what_the_closure_captures() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    h = exact_hvp(lambda: scale**2 * (w**3).sum(), [w], v, create_graph=True)
    by_scale, by_v = torch.autograd.grad(h.sum(), [scale, v])
    assert by_scale.item() == pytest.approx(2 * 3 * 6 * (1.0 * 1.0 + 2.0 * 0.5))
    torch.testing.assert_close(by_v, 9 * 6 * w.detach())


class TestApproximate:
    """approximate_hvp, within what it promises."""

    @staticmethod
    def _network(activation: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(20, 40), activation(), nn.Linear(40, 30), activation(), nn.Linear(30, 5)
        )
        return model.to(dtype), torch.randn(16, 20, dtype=dtype)

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Mish])
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
    def test_it_is_accurate_and_not_worse_with_more_samples(
        self, activation: type[nn.Module], dtype: torch.dtype, bound: float
    ) -> None:
        model, x = self._network(activation, dtype)
        params = list(model.parameters())
        v = oracles.random_like(params, 7)
        loss_fn, y = nn.CrossEntropyLoss(), torch.arange(16) % 5
        exact = double_backward(lambda: loss_fn(model(x), y), params, v)
        errors = [
            oracles.relative_error(
                approximate_hvp(lambda: loss_fn(model(x), y), params, v, num_samples=n), exact
            )
            for n in (1, 2, 3, 5, 10)
        ]
        assert max(errors) < bound
        assert max(errors[1:]) < 1.25 * errors[0]

    def test_damping_adds_a_multiple_of_v(self) -> None:
        case = stateful("mlp_tanh")
        v = case.vector()
        plain = approximate_hvp(case.func, case.params, v)
        damped = approximate_hvp(case.func, case.params, v, damping=0.25)
        for a, b, t in zip(damped, plain, v, strict=True):
            torch.testing.assert_close(a - b, 0.25 * t, rtol=1e-9, atol=1e-12)

    def test_both_ends_of_a_difference_draw_the_same_dropout_mask(self) -> None:
        case = stateful("dropout")
        v = case.vector()
        torch.manual_seed(3)
        exact = double_backward(case.func, case.params, v)
        torch.manual_seed(3)
        oracles.assert_same(approximate_hvp(case.func, case.params, v, num_samples=3), exact, 1e-7)

    def test_a_zero_vector_gives_zeros(self) -> None:
        case = stateful("mlp_tanh")
        zeros = [torch.zeros_like(p) for p in case.params]
        assert all(h.count_nonzero() == 0 for h in approximate_hvp(case.func, case.params, zeros))


def test_the_random_state_is_left_as_one_evaluation_leaves_it() -> None:
    case = stateful("dropout")
    v = case.vector()
    torch.manual_seed(5)
    case.func()
    expected = torch.get_rng_state()
    for product in (
        lambda: exact_hvp(case.func, case.params, v),
        lambda: exact_hvp(case.func, case.params, v, create_graph=True),
        lambda: approximate_hvp(case.func, case.params, v, num_samples=3),
        lambda: gauss_newton_product(case.model, case.loss_fn, case.x, case.y, v),
    ):
        torch.manual_seed(5)
        product()
        assert torch.equal(torch.get_rng_state(), expected)


def test_no_warning_on_ordinary_models() -> None:
    case = stateful("encoder_train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_hvp(case.func, case.params, case.vector())
