"""What closures do besides computing a loss: hide parameters, write state, fail, run elsewhere."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secorder_func.compat.core.hessian_diagonal import hessian_diagonal
from secorder_func.compat.core.hvp import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    hessian_trace,
    model_hvp,
)
from secorder_func.errors import (
    CurvatureFallbackWarning,
    HiddenParameterError,
    NoExactRouteError,
)
from tests import oracles
from tests.compat.closures import double_backward, same, snapshot, stateful


def _w() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)


def _v() -> Tensor:
    return torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)


# ------------------------------------------------------------------------- hidden parameters


class _Cube(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.detach().clone())

    def forward(self) -> Tensor:
        return (self.w * self.w * self.w).sum()


def _cube(x: Tensor) -> Tensor:
    return (x * x * x).sum()


class _OldStyleCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g


class _OnceCube(_OldStyleCube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g


class _OnceCubeForTransforms(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g


def _in_a_thread(compute: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(compute()))
    thread.start()
    thread.join()
    return results[0]


def _hiding(kind: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Return a closure whose value is the sum of cubes of a parameter hidden from the exchange, and the parameter."""
    w = _w()
    early = (w**3).sum()
    if kind.startswith("scripted"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module, function = torch.jit.script(_Cube(w)), torch.jit.script(_cube)
        if kind == "scripted function":
            return lambda: function(w), w
        return module, next(module.parameters())
    return {
        "custom function": lambda: _OldStyleCube.apply(w).sum(),
        "computed before": lambda: early * 1.0,
        "half computed before": lambda: 0.5 * early + 0.5 * (w**3).sum(),
        "in a thread": lambda: _in_a_thread(lambda: (w**3).sum()),
        "only its shape is read": lambda: early * (w.shape[0] / 3) * (w.numel() / 3),
    }[kind], w


HIDDEN = [
    "scripted module",
    "scripted function",
    "custom function",
    "computed before",
    "half computed before",
    "in a thread",
    "only its shape is read",
]


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_parameter_ends_in_double_backward_never_in_zeros(kind: str) -> None:
    (func, w), v = _hiding(kind), _v()
    product = exact_hvp(func, [w], v)
    torch.testing.assert_close(product, 6 * w.detach() * v)
    with pytest.warns(CurvatureFallbackWarning, match="double_backward"):
        trace = hessian_trace(func, [w], num_samples=2)
    assert trace == pytest.approx(6 * w.sum().item())


@pytest.mark.parametrize("kind", ["scripted module", "scripted function", "custom function"])
def test_differences_move_a_hidden_parameter_without_writing_to_it(kind: str) -> None:
    (func, w), v = _hiding(kind), _v()
    storage, before = w.data_ptr(), w.detach().clone()
    with pytest.warns(CurvatureFallbackWarning, match="cannot be exchanged"):
        product = approximate_hvp(func, [w], v)
    torch.testing.assert_close(product, 6 * w.detach() * v, rtol=1e-7, atol=0)
    assert w.data_ptr() == storage
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("kind", ["scripted module", "scripted function"])
def test_torchscript_keeps_its_gradients_afterwards(kind: str) -> None:
    (func, w), v = _hiding(kind), _v()
    exact_hvp(func, [w], v)
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(func(), w)[0], 3 * w.detach() ** 2)


@pytest.mark.parametrize("kind", ["computed before", "half computed before"])
def test_differences_refuse_a_loss_that_cannot_move(kind: str) -> None:
    func, w = _hiding(kind)
    with pytest.raises(HiddenParameterError, match="computed before the closure ran"):
        approximate_hvp(func, [w], _v())


@pytest.mark.parametrize("function", [_OnceCube, _OnceCubeForTransforms])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_that_cannot_be_differentiated_is_refused(
    function: Any, create_graph: bool
) -> None:
    w, v = _w(), _v()

    def func() -> Tensor:
        return (function.apply(w) + w**2).sum()

    silent = torch.autograd.grad(func(), w, create_graph=True)[0]
    partial = torch.autograd.grad(silent, w, v)[0]
    assert not torch.allclose(partial, (6 * w + 2).detach() * v), "torch mended it: retire the rule"
    with pytest.raises(NoExactRouteError, match="once_differentiable"):
        exact_hvp(func, [w], v, create_graph=create_graph)
    with pytest.warns(CurvatureFallbackWarning):
        estimate = approximate_hvp(func, [w], v)
    torch.testing.assert_close(estimate, (6 * w + 2).detach() * v, rtol=1e-7, atol=0)


def test_reentrant_checkpointing_is_refused_with_the_mend() -> None:
    w = _w()

    def func() -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: (x**3).sum(), w, use_reentrant=True)

    with pytest.raises(NoExactRouteError, match="use_reentrant=False"):
        exact_hvp(func, [w], _v())


def test_nonreentrant_checkpointing_works_everywhere() -> None:
    w, v = _w(), _v()

    def func() -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: (x**3).sum(), w, use_reentrant=False)

    expected = 6 * w.detach() * v
    torch.testing.assert_close(exact_hvp(func, [w], v), expected)
    graph = exact_hvp(func, [w], v, create_graph=True)
    torch.testing.assert_close(graph.detach(), expected)
    torch.testing.assert_close(approximate_hvp(func, [w], v), expected, rtol=1e-7, atol=0)


def test_a_function_without_second_derivative_is_named() -> None:
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])

    def func() -> Tensor:
        margin: Tensor = torch.ops.aten.multi_margin_loss(w, y)
        return margin.square()

    for create_graph in (False, True):
        with pytest.raises(NoExactRouteError, match="multi_margin_loss") as caught:
            exact_hvp(func, [w], torch.ones_like(w), create_graph=create_graph)
        assert "finite_difference" in str(caught.value) or "approximate_hvp" in str(caught.value)
    with pytest.raises(NoExactRouteError, match="multi_margin_loss"):
        hessian_trace(func, [w])


def test_a_parameter_computed_from_others_is_differentiated_where_it_is() -> None:
    w, v = _w(), _v()
    doubled = 2 * w
    torch.testing.assert_close(
        exact_hvp(lambda: (doubled**3).sum(), [doubled], v), 6 * doubled.detach() * v
    )


# --------------------------------------------------------------------------- state and failure


class _Moody(nn.Module):
    """A module that writes to a buffer, an attribute and a counter, and may fail afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.register_buffer("mean", torch.zeros(3))
        self.last: Any = None
        self.calls = 0
        self.failure: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.mean[0] = 7.0
        self.last = self.inner(x)
        if self.failure is not None:
            raise self.failure
        return self.last


class _UserError(RuntimeError):
    pass


CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor, list[Tensor]], Any]] = {
    "exact_hvp": lambda m, x, y, v: exact_hvp(lambda: F.mse_loss(m(x), y), list(m.parameters()), v),
    "exact_hvp with a graph": lambda m, x, y, v: exact_hvp(
        lambda: F.mse_loss(m(x), y), list(m.parameters()), v, create_graph=True
    ),
    "approximate_hvp": lambda m, x, y, v: approximate_hvp(
        lambda: F.mse_loss(m(x), y), list(m.parameters()), v, num_samples=2
    ),
    "model_hvp": lambda m, x, y, v: model_hvp(m, F.mse_loss, x, y, v),
    "gauss_newton_product": lambda m, x, y, v: gauss_newton_product(m, F.mse_loss, x, y, v),
    "gauss_newton_product with a graph": lambda m, x, y, v: gauss_newton_product(
        m, F.mse_loss, x, y, v, create_graph=True
    ),
    "hessian_trace": lambda m, x, y, v: hessian_trace(
        lambda: F.mse_loss(m(x), y), list(m.parameters()), 2
    ),
    "hessian_diagonal": lambda m, x, y, v: hessian_diagonal(
        lambda: F.mse_loss(m(x), y), list(m.parameters())
    ),
}


def _moody() -> tuple[_Moody, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = _Moody().double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    F.mse_loss(model(x), y).backward()  # there are gradients, which must stay
    v = [torch.randn_like(p) for p in model.parameters()]
    return model, x, y, v


@pytest.mark.parametrize("name", CALLS)
def test_what_the_model_writes_does_not_outlive_the_call(name: str) -> None:
    model, x, y, v = _moody()
    before = snapshot(model)
    CALLS[name](model, x, y, v)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "failure", [_UserError("mine"), KeyError("mine"), KeyboardInterrupt("mine")]
)
@pytest.mark.parametrize("name", CALLS)
def test_a_closure_that_raises_leaves_everything_and_its_own_error(
    name: str, failure: BaseException
) -> None:
    model, x, y, v = _moody()
    model.failure = failure
    before = snapshot(model)
    with pytest.raises(type(failure), match="mine"):
        CALLS[name](model, x, y, v)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "write",
    [lambda w: w.data.mul_(2.0), lambda w: torch.no_grad()(w.mul_)(2.0)],
    ids=["through .data", "under no_grad"],
)
@pytest.mark.parametrize("product", [exact_hvp, approximate_hvp])
def test_a_loss_that_writes_to_a_parameter_is_refused(
    write: Callable[[Tensor], Any], product: Callable[..., Any]
) -> None:
    w = _w()
    before = w.detach().clone()

    def func() -> Tensor:
        write(w)
        return (w**3).sum()

    with pytest.raises(RuntimeError, match="writes to a parameter in place"):
        product(func, [w], _v())
    assert torch.equal(w.detach(), before)


def test_products_do_not_depend_on_the_callers_grad_mode() -> None:
    w, v = _w(), _v()
    expected = 6 * w.detach() * v
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            product = exact_hvp(lambda: (w**3).sum(), [w], v)
            estimate = approximate_hvp(lambda: (w**3).sum(), [w], v)
        torch.testing.assert_close(product, expected)
        torch.testing.assert_close(estimate, expected, rtol=1e-7, atol=0)
        assert not product.requires_grad


def test_state_of_an_ordinary_training_step_is_undisturbed() -> None:
    case = stateful("mlp_tanh")
    case.func().backward()
    gradients = [p.grad.clone() for p in case.params]
    exact_hvp(case.func, case.params, case.vector())
    assert all(torch.equal(p.grad, g) for p, g in zip(case.params, gradients, strict=True))
    for p in case.params:
        p.grad = None


@pytest.mark.parametrize("name", CALLS)
def test_gradients_survive_a_closure_that_clears_them(name: str) -> None:
    model, x, y, v = _moody()
    before = snapshot(model)
    kept = {n: p.grad for n, p in model.named_parameters()}
    forward = model.forward

    def clearing(inputs: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=False)
        return forward(inputs)

    object.__setattr__(model, "forward", clearing)
    CALLS[name](model, x, y, v)
    object.__delattr__(model, "forward")
    assert all(kept[n] is p.grad for n, p in model.named_parameters())
    assert same(before, snapshot(model))


@pytest.mark.parametrize("product", [exact_hvp, approximate_hvp])
def test_a_closure_that_calls_backward_is_told_so(product: Callable[..., Any]) -> None:
    w = _w()
    w.grad = torch.ones_like(w)

    def func() -> Tensor:
        loss = (w**3).sum()
        loss.backward()
        return loss

    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=r"calls backward\(\)"):
            product(func, [w], _v())
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize(
    "layer", [nn.LeakyReLU(0.3, inplace=True), nn.ELU(inplace=True), nn.Dropout(0.5, inplace=True)]
)
def test_a_layer_that_works_in_place_on_the_input_leaves_it(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(4, 3), nn.Tanh()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    params, before = list(model.parameters()), x.clone()
    v = [torch.randn_like(p) for p in params]

    def func() -> Tensor:
        torch.manual_seed(3)
        return model(x).square().sum()

    def on_a_copy() -> Tensor:
        torch.manual_seed(3)
        return model(before.clone()).square().sum()

    expected = double_backward(on_a_copy, params, v)
    for create_graph in (False, True):
        found = exact_hvp(func, params, v, create_graph=create_graph)
        oracles.assert_same([h.detach() for h in found], expected)
    oracles.assert_same(approximate_hvp(func, params, v), expected, 1e-7)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: setattr(w, "data", w.detach() * 2),
        lambda w: torch._foreach_mul_([w.detach()], 2.0),
        lambda w: w.detach().view(-1)[0].zero_(),
        lambda w: F.relu(w.detach(), inplace=True),
    ],
    ids=["data", "foreach", "view", "inplace"],
)
@pytest.mark.parametrize("product", [exact_hvp, approximate_hvp])
def test_every_way_of_writing_to_a_parameter_is_refused(
    product: Callable[..., Any], write: Callable[[Tensor], Any]
) -> None:
    w = _w()
    before, storage = w.detach().clone(), w.data_ptr()

    def func() -> Tensor:
        write(w)
        return (w**3).sum()

    with pytest.raises(RuntimeError, match="writes to a parameter in place"):
        product(func, [w], _v())
    assert torch.equal(w.detach(), before)
    assert w.data_ptr() == storage


def test_an_embedding_that_renormalises_is_refused_until_it_need_not() -> None:
    layer = nn.Embedding(5, 3, max_norm=1.0, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(10)
    before, tokens = layer.weight.detach().clone(), torch.tensor([0, 1, 1])
    params, v = [layer.weight], [torch.ones(5, 3, dtype=torch.float64)]
    with pytest.raises(ValueError, match="Evaluate the model once before"):
        exact_hvp(lambda: (layer(tokens) ** 3).sum(), params, v)
    assert torch.equal(layer.weight.detach(), before)
    layer(tokens)
    rows = torch.zeros(5, 1, dtype=torch.float64).index_add_(
        0, tokens, torch.ones(3, 1, dtype=torch.float64)
    )
    (found,) = exact_hvp(lambda: (layer(tokens) ** 3).sum(), params, v)
    torch.testing.assert_close(found, 6 * layer.weight.detach() * rows)


def test_parameters_that_depend_on_each_other_are_differentiated_together() -> None:
    w = _w()
    u = w**2
    v = [_v(), _v().flip(0)]
    found = exact_hvp(lambda: (u**3).sum() + (w**3).sum(), [w, u], v)
    expected = double_backward(
        lambda: (u**3).sum() + (w**3).sum(), [w, u], v
    )  # u's graph still serves
    oracles.assert_same(found, expected)


def test_a_gradient_penalty_through_layer_norm_is_exact() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]

    def func() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    class Norm(nn.Module):
        def __init__(self, like: nn.LayerNorm) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = like.weight, like.bias, like.eps

        def forward(self, h: Tensor) -> Tensor:
            c = h - h.mean(-1, keepdim=True)
            return (
                c / (c.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias
            )

    written_out = nn.Sequential(model[0], Norm(model[1]), model[2], model[3])

    def truth() -> Tensor:
        (slope,) = torch.autograd.grad(written_out(x).sum(), x, create_graph=True)
        return slope.square().sum()

    expected = double_backward(truth, params, v)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureFallbackWarning)
        for create_graph in (False, True):
            found = exact_hvp(func, params, v, create_graph=create_graph)
            oracles.assert_same([h.detach() for h in found], expected)
        oracles.assert_same(approximate_hvp(func, params, v), expected, 1e-7)


def test_with_a_graph_a_parameter_that_is_used_without_a_derivative_has_zeros() -> None:
    w, u = _w(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    func = lambda: (w > 0).sum() * (u**3).sum()  # noqa: E731
    assert torch.equal(exact_hvp(func, [w], _v(), create_graph=True), torch.zeros_like(w))
    (hu,) = exact_hvp(func, [u], [u.detach()], create_graph=True)
    assert torch.equal(hu, 6.0 * (w > 0).sum() * torch.ones_like(u))
