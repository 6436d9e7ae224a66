"""`compile=True`: products compiled once, for all vectors, parameters and data of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from secorder_func import (
    NoExactRouteError,
    functional_loss,
    functional_model,
    ggn_operator,
    hessian_operator,
    hutchinson_trace,
)
from tests import oracles

pytestmark = [
    pytest.mark.slow,
    # Dynamo and its backends warn of their own deprecations while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


X, Y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _vector(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cos(p) for name, p in params.items()}


def _double_backward(f: Any, params: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradient = torch.autograd.grad(f(leaves, X, Y), list(leaves.values()), create_graph=True)
    product = torch.autograd.grad(gradient, list(leaves.values()), list(v.values()))
    return dict(zip(leaves, product, strict=True))


def test_a_compiled_hessian_is_double_backwards_and_compiles_once() -> None:
    f, params = functional_loss(_model(), nn.MSELoss())
    op = hessian_operator(f, params, X, Y, compile=True)
    assert op.compile_seconds is not None
    assert op.compile_seconds > 0.1
    graphs = _graphs()
    for shift in (0.0, 0.5):
        moved = {name: p + shift for name, p in params.items()}
        again = hessian_operator(f, moved, X, Y, compile=True)
        v = _vector(moved)
        oracles.assert_same(again @ v, _double_backward(f, moved, v))
    assert _graphs() == graphs
    hutchinson_trace(op, 3)
    stacked = {name: torch.stack([p, -p, 2 * p]) for name, p in v.items()}
    oracles.assert_same(
        {n: p[2] for n, p in op.mm(stacked).items()}, op @ {n: 2 * p for n, p in v.items()}
    )
    assert _graphs() == graphs


def test_other_shapes_compile_again() -> None:
    f, params = functional_loss(_model(), nn.MSELoss())
    hessian_operator(f, params, X, Y, compile=True)
    graphs = _graphs()
    hessian_operator(f, params, X[:4], Y[:4], compile=True)
    assert _graphs() == graphs + 1


def test_a_compiled_gauss_newton_matrix_is_the_eager_ones_dense_form() -> None:
    model = _model()
    model_fn, params = functional_model(model)
    op = ggn_operator(model_fn, nn.MSELoss(), params, X, Y, compile=True)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, X))(params)
    flat = torch.cat([jacobian[name].reshape(12, -1) for name in sorted(params)], 1)
    torch.testing.assert_close(op.dense(), 2 / 12 * flat.T @ flat)


def test_sums_and_flat_forms_of_compiled_operators_work() -> None:
    f, params = functional_loss(_model(), nn.MSELoss())
    op = hessian_operator(f, params, X, Y, compile=True)
    eager = hessian_operator(f, params, X, Y)
    torch.testing.assert_close((op + op).flat().dense(), 2 * eager.dense())


def test_more_functions_than_dynamo_compiles_of_one_code() -> None:
    p = torch.tensor([0.3, -0.7], dtype=torch.float64)
    for power in range(2, 12):
        op = hessian_operator(lambda p, power=power: (p**power).sum(), p, compile=True)
        expected = (power * (power - 1) * p ** (power - 2)).diag()
        torch.testing.assert_close(op.dense(), expected)


def test_a_parameter_changed_in_place_is_an_error() -> None:
    p = torch.ones(2, dtype=torch.float64)
    op = hessian_operator(lambda p: (p**3).sum(), p, compile=True)
    p.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        op @ p


def _broken_graph(p: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return (p**2).sum()


@pytest.mark.parametrize(
    ("f", "pattern"),
    [
        (lambda p: (nn.functional.dropout(p, 0.5) ** 2).sum(), "draws random numbers"),
        (_broken_graph, "torch.compile cannot make"),
        (lambda p: (p.data * p**2).sum(), "differs from the eager one"),
    ],
)
def test_what_compiling_gets_wrong_or_cannot_is_refused(f: Any, pattern: str) -> None:
    with pytest.raises(NoExactRouteError, match=pattern):
        hessian_operator(f, torch.ones(3), compile=True)


def test_inside_a_transform_compiling_is_refused() -> None:
    def trace(p: Tensor) -> Tensor:
        return hessian_operator(lambda q: (q**3).sum(), p, compile=True).dense().trace()

    with pytest.raises(ValueError, match="inside a transform"):
        torch.func.grad(trace)(torch.ones(2))
