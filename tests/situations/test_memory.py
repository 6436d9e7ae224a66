"""How parameters and inputs lie in memory does not change a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import CurvatureFallbackWarning, functional_loss, hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from tests import oracles
from tests.situations.entries import Case, assert_product, every_entry

CHANNELS_LAST = torch.channels_last


def _conv_net() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model = model.double().to(memory_format=CHANNELS_LAST)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64).to(memory_format=CHANNELS_LAST)
    return Case(model, F.cross_entropy, x, torch.tensor([0, 2, 1]))


@every_entry
def test_a_channels_last_network_has_the_product_of_double_backward(entry: str) -> None:
    case = _conv_net()
    assert not case.model[0].weight.is_contiguous()
    assert_product(entry, case)


def test_a_channels_last_network_has_the_product_of_the_contiguous_one() -> None:
    case = _conv_net()
    f, params = functional_loss(case.model, F.cross_entropy)
    v = oracles.random_like(params, 1)
    hv = hvp(f)(params, v, case.x, case.y)
    plain = {name: p.contiguous() for name, p in params.items()}
    oracles.assert_same(hv, oracles.hvp(f, plain, v, case.x.contiguous(), case.y))
    assert hv["3.weight"].stride() == params["3.weight"].stride()


def _cubic(p: Tensor) -> Tensor:
    return (torch.tanh(p) ** 3).sum() * p[0, 0]


def _transform(p: Tensor, v: Tensor) -> Tensor:
    return hvp(_cubic)(p, v)


def _operator(p: Tensor, v: Tensor) -> Tensor:
    return hessian_operator(_cubic, p) @ v


def _stack(p: Tensor, v: Tensor) -> Tensor:
    return hessian_operator(_cubic, p).mm(torch.stack([v, -v]))[0]


def _flat(p: Tensor, v: Tensor) -> Tensor:
    return (hessian_operator(_cubic, p).flat() @ v.reshape(-1)).reshape(v.shape)


def _closure(p: Tensor, v: Tensor) -> Tensor:
    leaf = p.detach().requires_grad_()
    return exact_hvp(lambda: _cubic(leaf), [leaf], v)


def _closure_on_a_flat_vector(p: Tensor, v: Tensor) -> Tensor:
    leaf = p.detach().requires_grad_()
    return exact_hvp(lambda: _cubic(leaf), [leaf], v.reshape(-1)).reshape(v.shape)


PRODUCTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    _transform,
    _operator,
    _stack,
    _flat,
    _closure,
    _closure_on_a_flat_vector,
]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "v transposed"])
def test_parameters_that_are_not_contiguous_are_exact(layout: str, product: Any) -> None:
    tensors = {
        "transposed": (torch.randn(6, 4).double().t(), torch.randn(4, 6).double()),
        "strided": (torch.randn(8, 12).double()[::2, 1::2], torch.randn(4, 6).double()),
        "v transposed": (torch.randn(4, 6).double(), torch.randn(6, 4).double().t()),
    }
    p, v = tensors[layout]
    assert not (p.is_contiguous() and v.is_contiguous())
    oracles.assert_same(product(p, v), oracles.hvp(_cubic, p, v))


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.parametrize("product", PRODUCTS)
def test_an_expanded_parameter_is_differentiated_entry_by_entry(product: Any) -> None:
    p, v = torch.randn(4, 1).double().expand(4, 6), torch.randn(4, 6).double()
    oracles.assert_same(product(p, v), oracles.hvp(_cubic, p.contiguous(), v))


def test_an_expanded_parameter_costs_the_transform_a_fallback_that_it_admits() -> None:
    p = torch.randn(4, 1).double().expand(4, 6)
    without_rule = lambda p: _cubic(p.cumprod(0))  # noqa: E731
    v = torch.randn(4, 6).double()
    with pytest.warns(CurvatureFallbackWarning, match="single memory location"):
        hv = hvp(without_rule)(p, v)
    oracles.assert_same(hv, oracles.hvp(without_rule, p.contiguous(), v))


def test_parameters_that_overlap_in_memory_are_independent_variables() -> None:
    memory = torch.randn(5).double()
    params = {"a": memory[:3], "b": memory[2:]}

    def f(p: Any) -> Tensor:
        return (p["a"] ** 3).sum() * (p["b"] ** 2).sum()

    v = oracles.random_like(params, 1)
    expected = oracles.hvp(f, {k: p.clone() for k, p in params.items()}, v)
    oracles.assert_same(hvp(f)(params, v), expected)
    oracles.assert_same(hessian_operator(f, params) @ v, expected)
