"""Every row of the contract about the form of arguments and results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from secorder_func.compat.core import hessian_diagonal as _diagonal_name
from secorder_func.compat.core.hessian_diagonal import hessian_diagonal
from secorder_func.compat.core.hessian_trace import hessian_trace as exact_hessian_trace
from secorder_func.compat.core.hvp import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    hessian_trace,
    model_hvp,
)
from tests import oracles
from tests.compat.closures import double_backward, stateful

Product = Callable[..., Any]


def _by_closure(product: Product) -> Product:
    return lambda case, v: product(case.func, case.params, v)


def _by_model(product: Product) -> Product:
    return lambda case, v: product(case.model, case.loss_fn, case.x, case.y, v)


PRODUCTS = {
    "exact_hvp": _by_closure(exact_hvp),
    "approximate_hvp": _by_closure(approximate_hvp),
    "model_hvp": _by_model(model_hvp),
    "gauss_newton_product": _by_model(gauss_newton_product),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


@each_product
def test_a_list_gives_a_list(name: str) -> None:
    case = stateful("mlp_tanh")
    for form in (list, tuple):
        product = PRODUCTS[name](case, form(case.vector()))
        assert type(product) is list
        assert [h.shape for h in product] == [p.shape for p in case.params]


@each_product
def test_a_flat_vector_gives_the_same_numbers_flat(name: str) -> None:
    case = stateful("mlp_tanh")
    v = case.vector()
    flat = PRODUCTS[name](case, parameters_to_vector(v))
    listed = parameters_to_vector(PRODUCTS[name](case, v))
    assert flat.shape == listed.shape
    torch.testing.assert_close(flat, listed, rtol=1e-9, atol=1e-12)
    assert flat.norm() > 0


def test_one_tensor_for_one_parameter_gives_one_tensor() -> None:
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, dtype=torch.float64)
    shaped = exact_hvp(lambda: (w**3).sum(), [w], v)
    torch.testing.assert_close(shaped, 6 * w.detach() * v)
    flat = exact_hvp(lambda: (w**3).sum(), [w], v.reshape(-1))
    torch.testing.assert_close(flat, shaped.reshape(-1))
    assert isinstance(exact_hvp(lambda: (w**3).sum(), [w], [v]), list)


BAD_VECTORS = {
    "wrong shape of one leaf": (
        lambda v: [v[0].T, *v[1:]],
        r"v\[0\].*[Ee]xpected shape \(6, 4\), got \(4, 6\)",
    ),
    "too few": (lambda v: v[:-1], r"[Ee]xpected 4, got 3"),
    "too many": (lambda v: [*v, v[0]], r"[Ee]xpected 4, got 5"),
    "one tensor, not flat": (lambda v: v[0], r"got \(6, 4\)"),
    "flat of the wrong length": (lambda v: parameters_to_vector(v)[:-1], r"got \(\d+,\)"),
    "wrong dtype": (lambda v: [t.float() for t in v], r"v\[0\].*float64.*float32"),
    "flat of the wrong dtype": (lambda v: parameters_to_vector(v).float(), "float64.*float32"),
    "not tensors": (lambda v: [t.tolist() for t in v], r"v\[0\] must be a tensor, got list"),
    "a dict": (lambda v: dict(enumerate(v)), "got dict"),
    "a number": (lambda v: 3.0, "got float"),
    "another device": (lambda v: [t.to("meta") for t in v], "device cpu, got meta"),
}


@each_product
@pytest.mark.parametrize("kind", BAD_VECTORS)
def test_a_bad_vector_is_refused_with_the_place_and_both_shapes(name: str, kind: str) -> None:
    case = stateful("mlp_tanh")
    spoil, pattern = BAD_VECTORS[kind]
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=f"(?s){name}: .*{pattern}"):
            PRODUCTS[name](case, spoil(case.vector()))


BY_PARAMS = {
    "exact_hvp": lambda func, params, v: exact_hvp(func, params, v),
    "approximate_hvp": lambda func, params, v: approximate_hvp(func, params, v),
    "hessian_trace": lambda func, params, v: hessian_trace(func, params),
    "hessian_diagonal": lambda func, params, v: hessian_diagonal(func, params),
}
each_closure = pytest.mark.parametrize("name", BY_PARAMS)


def _w() -> Tensor:
    return torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


@each_closure
def test_a_parameter_listed_twice_is_refused(name: str) -> None:
    w = _w()
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=rf"{name}: params\[1\] is the same tensor as params\[0\]"):
            BY_PARAMS[name](lambda: (w**3).sum(), [w, w], [w.detach()] * 2)


@each_closure
@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ([], "params is empty"),
        ([3.0], r"params\[0\] must be a tensor, got float"),
        ([torch.tensor([1, 2])], r"params\[0\] must be floating or complex, got torch.int64"),
        (7, "params must be a list of tensors, got int"),
        ({"w": torch.ones(1)}, "params must be a list of tensors, got dict"),
    ],
)
def test_bad_params_are_refused(name: str, params: Any, pattern: str) -> None:
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=f"{name}: {pattern}"):
            BY_PARAMS[name](lambda: torch.zeros(()), params, [])


@pytest.mark.parametrize("name", ["exact_hvp", "approximate_hvp", "hessian_trace"])
def test_a_listed_parameter_without_gradient_is_refused(name: str) -> None:
    w, frozen = _w(), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{name}: params\[1\] has requires_grad=False"):
        BY_PARAMS[name](lambda: (w**3 * frozen).sum(), [w, frozen], [w.detach(), frozen])


@each_closure
@pytest.mark.parametrize(
    ("loss", "pattern"),
    [
        (lambda w: w**3, r"one element, got shape \(2,\)"),
        (lambda w: 3.0, "got float"),
        (lambda w: None, "got NoneType"),
        (lambda w: (w**3).sum().to(torch.complex128), "must be real.*complex128"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(name: str, loss: Any, pattern: str) -> None:
    w = _w()
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=f"{name}: .*{pattern}"):
            BY_PARAMS[name](lambda: loss(w), [w], [torch.ones_like(w)])


@each_closure
def test_a_loss_of_one_element_may_have_any_shape(name: str) -> None:
    w = _w()
    v = [torch.ones_like(w)]
    for shape in ((), (1,), (1, 1)):
        found = BY_PARAMS[name](lambda shape=shape: (w**3).sum().reshape(shape), [w], v)
        value = found if isinstance(found, float) else found[0].sum().item()
        assert value == pytest.approx(18.0, rel=1e-7)


@each_closure
@pytest.mark.parametrize("loss", [lambda w: torch.ones(()), lambda w: (w.detach() ** 3).sum()])
def test_a_loss_that_depends_on_no_parameter_is_refused(name: str, loss: Any) -> None:
    w = _w()
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=f"{name}: the loss does not depend on any parameter"):
            BY_PARAMS[name](lambda: loss(w), [w], [torch.ones_like(w)])


def test_an_unused_parameter_gets_zeros() -> None:
    w, unused = _w(), _w()
    v = [torch.ones_like(w), torch.ones_like(w)]
    for product in (
        exact_hvp(lambda: (w**3).sum(), [w, unused], v),
        exact_hvp(lambda: (w**3).sum(), [w, unused], v, create_graph=True),
        approximate_hvp(lambda: (w**3).sum(), [w, unused], v),
        hessian_diagonal(lambda: (w**3).sum(), [w, unused]),
    ):
        torch.testing.assert_close(product[0].detach(), 6 * w.detach(), rtol=1e-7, atol=0)
        assert torch.equal(product[1].detach(), torch.zeros_like(w))


def test_frozen_parameters_of_a_model_get_zeros() -> None:
    case = stateful("mlp_tanh")
    first = case.params[0]
    try:
        first.requires_grad_(False)
        v = case.vector()
        expected = double_backward(case.func, case.params[1:], v[1:])
        for product in (
            model_hvp(case.model, case.loss_fn, case.x, case.y, v),
            model_hvp(case.model, case.loss_fn, case.x, case.y, v, create_graph=True),
        ):
            assert torch.equal(product[0], torch.zeros_like(first))
            oracles.assert_same([h.detach() for h in product[1:]], expected)
        gauss_newton = gauss_newton_product(case.model, case.loss_fn, case.x, case.y, v)
        assert gauss_newton[0].count_nonzero() == 0
        assert gauss_newton[1].count_nonzero() > 0
    finally:
        first.requires_grad_(True)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (
            lambda w: approximate_hvp(lambda: (w**3).sum(), [w], w.detach(), num_samples=0),
            "num_samples",
        ),
        (lambda w: hessian_trace(lambda: (w**3).sum(), [w], num_samples=0), "num_samples"),
    ],
)
def test_a_count_below_one_is_refused(call: Any, pattern: str) -> None:
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=f"{pattern} must be at least 1, got 0"):
            call(_w())


def test_signatures_are_the_documented_ones() -> None:
    def names(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        return [(p.name, None if p.default is p.empty else p.default) for p in parameters]

    assert names(exact_hvp) == [
        ("func", None),
        ("params", None),
        ("v", None),
        ("create_graph", False),
    ]
    assert names(approximate_hvp) == [
        ("func", None),
        ("params", None),
        ("v", None),
        ("num_samples", 1),
        ("damping", 0.0),
    ]
    model = [("model", None), ("loss_fn", None), ("x", None), ("y", None), ("v", None)]
    assert names(model_hvp) == [*model, ("create_graph", False)]
    assert names(gauss_newton_product) == [*model, ("create_graph", False)]
    assert names(hessian_trace) == [
        ("func", None),
        ("params", None),
        ("num_samples", 10),
        ("create_graph", False),
        ("sparse", False),
    ]


def test_the_package_offers_functions_under_the_names_of_their_modules() -> None:
    assert _diagonal_name is hessian_diagonal
    from secorder_func.compat import core

    assert core.hessian_trace is exact_hessian_trace


def test_a_parameter_generator_is_a_list_too() -> None:
    model = nn.Linear(2, 1, dtype=torch.float64)
    x = torch.ones(1, 2, dtype=torch.float64)
    v = oracles.random_like(list(model.parameters()), 0)
    product = exact_hvp(lambda: (model(x) ** 2).sum(), model.parameters(), v)  # type: ignore[arg-type]
    oracles.assert_same(
        product, double_backward(lambda: (model(x) ** 2).sum(), list(model.parameters()), v)
    )
