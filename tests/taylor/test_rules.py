"""Every rule of ours against double backward by plain autograd, and that it is ours which is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secorder_func import ggn_operator, ggnvp, hvp, rule_kinds
from tests import oracles
from tests.taylor.functions import BINARY, PRODUCTS, UNARY

MODE: Any = "reverse_over_forward"
Fn = Callable[..., Any]

WIDE = st.lists(st.integers(2, 4), min_size=2, max_size=3).map(tuple)
PAIRS = st.sampled_from([((3,), (3,)), ((2, 3), (3,)), ((), (2, 2)), ((2, 1), (1, 3))])
SEEDS = st.integers(0, 2**16)


def _loss(function: Fn) -> Fn:
    """Return a loss that is neither linear in an output nor the same in all its entries, of leaves in a list."""

    def f(tensors: list[Tensor]) -> Tensor:
        # An inner layer, so that the second derivatives of what comes before count as well.
        out = function(*(x + 0.1 * x.sin() for x in tensors)).to(torch.float64)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
        return (weights * out).sum() + 0.3 * out.pow(3).sum()

    return f


def _check(function: Fn, shapes: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, v = (
        [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        for _ in range(2)
    )
    f = _loss(function)
    expected = oracles.hvp(f, p, v)
    assert rule_kinds(f)(p).closed, rule_kinds(f)(p)
    oracles.assert_same(hvp(f, mode=MODE)(p, v), expected, 1e-10)


@pytest.mark.parametrize("name", UNARY)
@settings(max_examples=5)
@given(shape=WIDE, seed=SEEDS)
def test_a_function_of_one_tensor(name: str, shape: tuple[int, ...], seed: int) -> None:
    if name != "dtypes":  # which rounds, see below
        _check(UNARY[name], [shape], seed)


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=8)
@given(shapes=PAIRS, seed=SEEDS)
def test_a_function_of_two_tensors_that_broadcast(name: str, shapes: Any, seed: int) -> None:
    _check(BINARY[name], shapes, seed)


@pytest.mark.parametrize("name", PRODUCTS)
@settings(max_examples=3)
@given(seed=SEEDS)
def test_a_layer(name: str, seed: int) -> None:
    _check(*PRODUCTS[name], seed)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [*UNARY, *BINARY, *PRODUCTS])
def test_mapped_over_vectors(name: str) -> None:
    if name in PRODUCTS:
        function, shapes = PRODUCTS[name]
    else:
        function, shapes = {**UNARY, **BINARY}[name], [(2, 3)] * (2 if name in BINARY else 1)
    generator = torch.Generator().manual_seed(0)
    p = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    vectors = [torch.randn(2, *x.shape, dtype=torch.float64, generator=generator) for x in p]
    f = _loss(function)
    found = torch.func.vmap(hvp(f, mode=MODE), in_dims=(None, 0))(p, vectors)
    expected = [oracles.hvp(f, p, [v[k] for v in vectors]) for k in range(2)]
    rtol = 1e-6 if name == "dtypes" else 1e-10
    oracles.assert_same(found, [torch.stack(rows) for rows in zip(*expected, strict=True)], rtol)


def test_a_rule_keeps_the_precision_of_a_dtype_on_the_way() -> None:
    p, v = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    f = _loss(UNARY["dtypes"])
    oracles.assert_same(hvp(f, mode=MODE)([p], [v]), oracles.hvp(f, [p], [v]), 1e-6)


def test_a_product_with_zero_by_a_wrong_rule_would_not_pass() -> None:
    """The losses above have products that are far from zero, and depend on the second derivative of the function."""
    for name in ("gelu", "softmax", "layer_norm", "selections"):
        p, v = [torch.randn(3, 4).double()], [torch.randn(3, 4).double()]
        assert oracles.flat(oracles.hvp(_loss(UNARY[name]), p, v)).norm() > 1e-3


def test_the_gauss_newton_product_takes_the_same_rules() -> None:
    w, u = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))

    def model(w: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm((x @ w).sin(), (3,))

    loss = torch.nn.functional.cross_entropy
    J = torch.autograd.functional.jacobian(lambda w: model(w, x), w).reshape(15, 12)
    H = torch.autograd.functional.hessian(lambda z: loss(z, y), model(w, x)).reshape(15, 15)
    expected = (J.T @ H @ J @ u.reshape(-1)).reshape(4, 3)
    oracles.assert_same(ggnvp(model, loss, mode=MODE)(w, u, x, y), expected, 1e-10)
    oracles.assert_same(ggn_operator(model, loss, w, x, y, mode=MODE) @ u, expected, 1e-10)
