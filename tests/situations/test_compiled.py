"""`torch.compile` inside the loss and around the product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import NoExactRouteError, functional_loss, hessian_operator, hvp
from tests import oracles
from tests.situations.entries import (
    CLOSURES,
    ENTRIES,
    FUNCTIONAL,
    Case,
    classification,
    double_backward,
    mlp,
)

pytestmark = [
    pytest.mark.slow,
    # Dynamo and its backends warn of their own deprecations while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BACKENDS = ["aot_eager", "inductor"]
BY_DOUBLE_BACKWARD = "exact_hvp with a graph"
OTHERS = [entry for entry in ENTRIES if entry != BY_DOUBLE_BACKWARD]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", FUNCTIONAL)
def test_a_compiled_module_in_functional_loss_is_exact(entry: str, backend: str) -> None:
    model = mlp()
    x, y = classification()
    compiled: Any = torch.compile(model, backend=backend)
    compiled(x)
    case = Case(compiled, F.cross_entropy, x, y, truth=model)
    v = case.vector()
    oracles.assert_same(ENTRIES[entry](case, v), double_backward(case, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", [entry for entry in CLOSURES if entry in OTHERS])
def test_a_compiled_module_in_a_closure_is_exact_and_dynamo_warns(entry: str, backend: str) -> None:
    model = mlp()
    x, y = classification()
    compiled: Any = torch.compile(model, backend=backend)
    compiled(x)
    case = Case(compiled, F.cross_entropy, x, y, truth=model)
    v = case.vector()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        product = ENTRIES[entry](case, v)
    oracles.assert_same(product, double_backward(case, v))
    # Documented: the rules watch modules by a global hook.
    assert any("global hooks on modules" in str(w.message) for w in caught)


def _smooth(output: Tensor) -> Tensor:
    return torch.tanh(output).square().sum() + output.exp().mean()


# Dynamo looks at the .grad of every input, also of those that are no leaves.
# A product of the drop-in says that double backward cannot see through what is compiled.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:.*compiled by torch.compile:secorder_func.errors.CurvatureFallbackWarning"
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", OTHERS)
def test_a_compiled_function_in_the_loss_is_exact(entry: str, backend: str) -> None:
    model, (x, _) = mlp(), classification()
    compiled: Callable[[Tensor], Tensor] = torch.compile(_smooth, backend=backend)
    v = oracles.random_like(list(model.parameters()), 1)
    expected = double_backward(Case(model, lambda output, y: _smooth(output), x), v)
    case = Case(model, lambda output, y: compiled(output), x)
    oracles.assert_same(ENTRIES[entry](case, v), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_through_a_compiled_function_is_refused(backend: str) -> None:
    # Plain torch gives partial sums with "aot_eager", silently.
    model, (x, _) = mlp(), classification()
    compiled: Callable[[Tensor], Tensor] = torch.compile(_smooth, backend=backend)
    case = Case(model, lambda output, y: compiled(output), x)
    with pytest.raises(NoExactRouteError, match=r"compiled by torch\.compile.*made from"):
        ENTRIES[BY_DOUBLE_BACKWARD](case, case.vector())


def test_a_compiled_module_still_trains_after_a_product() -> None:
    model, twin = mlp(), mlp()
    x, y = classification()
    compiled: Any = torch.compile(model, backend="aot_eager")
    case = Case(compiled, F.cross_entropy, x, y)
    for entry in ("hvp", "operator", "exact_hvp"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ENTRIES[entry](case, case.vector())
    F.cross_entropy(compiled(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    oracles.assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_product_of_a_module_is_exact(backend: str) -> None:
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.LayerNorm(4).double(), nn.Tanh())
    x = torch.randn(5, 4).double()
    f, params = functional_loss(model, lambda output, y: output.square().sum())
    v = oracles.random_like(params, 1)
    compiled = torch.compile(hvp(f), backend=backend, fullgraph=True)
    case = Case(model, lambda output, y: output.square().sum(), x)
    expected = double_backward(case, list(v.values()))
    oracles.assert_same(list(compiled(params, v, x, None).values()), expected)
    oracles.assert_same(list(compiled(params, v, x, None).values()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operator_of_a_compiled_loss_is_exact(backend: str) -> None:
    f, params = functional_loss(mlp(), F.cross_entropy)
    x, y = classification()
    v = oracles.random_like(params, 1)
    compiled = torch.compile(lambda p: f(p, x, y), backend=backend)
    op = hessian_operator(compiled, params)
    oracles.assert_same(op @ v, oracles.hvp(f, params, v, x, y))
