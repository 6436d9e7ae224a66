"""Squared gradients of losses and of log-likelihoods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secorder_func.compat.approximations.fisher_diagonal import (
    empirical_fisher_diagonal,
    generalized_fisher_diagonal,
)
from secorder_func.compat.approximations.fisher_trace import (
    empirical_fisher_trace,
    generalized_fisher_trace,
)
from secorder_func.errors import ArgumentError, ArgumentTypeError, NoExactRouteError
from tests import oracles
from tests.compat.closures import same, snapshot, stateful

EMPIRICAL = [empirical_fisher_diagonal, empirical_fisher_trace]
GENERALIZED = [generalized_fisher_diagonal, generalized_fisher_trace]


def _classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_train", "lstm", "encoder_eval"])
def test_the_empirical_diagonal_and_trace_are_squares_of_the_gradient(name: str) -> None:
    case = stateful(name)
    with oracles.untouched(case.model):
        expected = [g**2 for g in torch.autograd.grad(case.func(), case.params)]
    found = empirical_fisher_diagonal(case.model, case.loss_fn, case.x, case.y)
    assert sum(e.sum() for e in expected) > 0
    oracles.assert_same([d.detach() for d in found], expected)
    trace = empirical_fisher_trace(case.model, case.loss_fn, case.x, case.y, num_samples=7)
    assert (trace.shape, trace.requires_grad) == ((), False)
    torch.testing.assert_close(trace, sum(e.sum() for e in expected), rtol=1e-10, atol=0.0)


def test_one_sample_gives_the_per_sample_fisher_and_a_mean_of_several_does_not() -> None:
    model, x, y = _classifier()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, x), y)

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    per_sample = [rows[name].square() for name in params]
    one = empirical_fisher_diagonal(model, F.cross_entropy, x[:1], y[:1])
    oracles.assert_same([d.detach() for d in one], [r[0] for r in per_sample])
    several = empirical_fisher_diagonal(model, F.cross_entropy, x, y)
    assert (
        oracles.relative_error([d.detach() for d in several], [r.mean(0) for r in per_sample]) > 0.1
    )


def test_the_empirical_diagonal_carries_a_right_graph_also_under_no_grad() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)
    x, y = torch.tensor([[0.5, 3.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            (diagonal,) = empirical_fisher_diagonal(model, lambda o, t: (o**3).sum(), x, y)
        # gradient g = 3 s^2 x with s = x.w; d(sum g^2)/dw = 36 s^3 |x|^2 x
        s = (x[0] * w).sum()
        torch.testing.assert_close(diagonal.detach(), 9 * s**4 * x**2)
        (slope,) = torch.autograd.grad(diagonal.sum(), model.weight)
        torch.testing.assert_close(slope, 36 * s**3 * x.square().sum() * x)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_where_no_second_derivative_exists_values_are_right_and_differentiating_them_raises() -> (
    None
):
    model, x, y = nn.Linear(3, 1).double(), torch.randn(4, 3).double(), torch.randn(4, 1).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (_Once.apply(output) - target).square().sum()

    found = empirical_fisher_diagonal(model, loss, x, y)
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    oracles.assert_same([d.detach() for d in found], [g**2 for g in expected])
    with pytest.raises(NoExactRouteError, match="once_differentiable"):
        torch.autograd.grad(found[0].sum(), model.weight)


@pytest.mark.parametrize("loss_type", ["nll", "NLL"])
def test_the_generalized_diagonal_and_trace_are_squares_of_the_summed_gradient(
    loss_type: str,
) -> None:
    model, x, y = _classifier()
    outputs = model(x)
    loss = F.cross_entropy(outputs, y, reduction="sum")
    expected = [
        g**2 for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    ]
    for _ in range(2):  # the graph of the outputs is kept
        found = generalized_fisher_diagonal(model, outputs, y, loss_type)
        oracles.assert_same(found, expected)
        assert not any(d.requires_grad for d in found)
    trace = generalized_fisher_trace(model, outputs, y, loss_type, num_samples=3)
    torch.testing.assert_close(trace, sum(e.sum() for e in expected), rtol=1e-10, atol=0.0)
    outputs.sum().backward()


def test_the_generalized_functions_with_a_graph_have_the_derivative_of_finite_differences() -> None:
    model, x, y = _classifier()
    bias, step = model[0].bias, 1e-5

    def trace(**options: Any) -> Tensor:
        return generalized_fisher_trace(model, model(x), y, **options)

    with torch.no_grad():
        value = trace
        (slope,) = torch.autograd.grad(_with_grad(value, create_graph=True), bias)
    diagonal = generalized_fisher_diagonal(model, model(x), y, create_graph=True)
    (other,) = torch.autograd.grad(sum(d.sum() for d in diagonal), bias)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * step
        ends.append(trace())
        with torch.no_grad():
            bias[0] -= sign * step
    torch.testing.assert_close(slope[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other, slope)


def _with_grad(function: Any, **options: Any) -> Tensor:
    with torch.enable_grad():
        return function(**options)


class _Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4).double().requires_grad_(False)
        self.used = nn.Linear(4, 3).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


def test_frozen_and_unused_parameters_get_zeros() -> None:
    model, (_, x, y) = _Partly(), _classifier()
    for found in (
        empirical_fisher_diagonal(model, F.cross_entropy, x, y),
        generalized_fisher_diagonal(model, model(x), y),
        generalized_fisher_diagonal(model, model(x), y, create_graph=True),
    ):
        assert [d.shape for d in found] == [p.shape for p in model.parameters()]
        assert [bool(d.count_nonzero()) for d in found] == [False, False, True, True, False, False]
    for trace in (
        empirical_fisher_trace(model, F.cross_entropy, x, y),
        generalized_fisher_trace(model, model(x), y),
    ):
        assert trace > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_traces_are_of_the_dtype_of_the_parameters_and_at_least_float32(dtype: torch.dtype) -> None:
    model, x, y = _classifier()
    model, x = model.to(dtype), x.to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    assert empirical_fisher_trace(model, F.cross_entropy, x, y).dtype == expected
    assert generalized_fisher_trace(model, model(x), y).dtype == expected


@pytest.mark.parametrize("function", EMPIRICAL)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(function: Any, fails: bool) -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)
    ).double()
    _, x, y = _classifier()
    before = snapshot(model)
    torch.manual_seed(5)
    with torch.no_grad(), oracles.untouched(model):
        model(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails:
            raise KeyError("mine")
        return F.cross_entropy(output, target)

    if fails:
        with pytest.raises(KeyError, match="mine"):
            function(model, loss, x, y)
    else:
        function(model, loss, x, y)
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", EMPIRICAL)
def test_wrong_arguments_of_the_empirical_functions_are_named(function: Any) -> None:
    model, x, y = _classifier()
    for args, error, pattern in (
        ((None, F.cross_entropy, x, y), ArgumentTypeError, "model must be"),
        ((model, None, x, y), ArgumentTypeError, "loss_fn must be"),
        ((nn.Tanh(), F.cross_entropy, x, y), ArgumentError, "params is empty"),
        (
            (_classifier()[0].requires_grad_(False), F.cross_entropy, x, y),
            ArgumentError,
            "no parameter",
        ),
        ((model, lambda o, t: o, x, y), ArgumentError, "one element"),
        ((model, lambda o, t: x.sum(), x, y), ArgumentError, "does not depend"),
        ((model, lambda o, t: 1.0, x, y), ArgumentTypeError, "must be a tensor"),
        (
            (nn.Linear(3, 3, dtype=torch.complex64), lambda o, t: o.abs().sum(), x.cfloat(), y),
            ArgumentError,
            "real",
        ),
    ):
        with pytest.raises(error, match=f"{function.__name__}: .*{pattern}"):
            function(*args)


@pytest.mark.parametrize("function", GENERALIZED)
def test_wrong_arguments_of_the_generalized_functions_are_named(function: Any) -> None:
    model, x, y = _classifier()
    outputs = model(x)
    for args, error, pattern in (
        ((None, outputs, y), ArgumentTypeError, "model must be"),
        ((model, outputs, y, "mse"), NotImplementedError, "loss_type must be 'nll', got 'mse'"),
        ((model, outputs, y, None), ArgumentTypeError, "loss_type must be a string"),
        ((model, outputs[0], y), NotImplementedError, r"got \(3,\) and \(6,\)"),
        ((model, outputs, outputs), NotImplementedError, r"got \(6, 3\) and \(6, 3\)"),
        ((model, None, y), ArgumentTypeError, "outputs must be a tensor"),
        ((model, outputs.detach(), y), ArgumentError, "carry no graph"),
        ((_classifier()[0], outputs, y), ArgumentError, "do not depend on any parameter"),
    ):
        with pytest.raises(error, match=f"{function.__name__}: .*{pattern}"):
            function(*args)


@pytest.mark.parametrize("count", [0, -1])
def test_traces_refuse_fewer_than_one_sample(count: int) -> None:
    model, x, y = _classifier()
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        empirical_fisher_trace(model, F.cross_entropy, x, y, num_samples=count)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        generalized_fisher_trace(model, model(x), y, num_samples=count)


def test_a_graph_of_outputs_that_cannot_be_differentiated_twice_is_refused() -> None:
    model, x, y = _classifier()
    outputs = _Once.apply(model(x))
    found = generalized_fisher_diagonal(model, outputs, y)
    assert all(d.count_nonzero() for d in found)
    with pytest.raises(NoExactRouteError, match="once_differentiable"):
        generalized_fisher_diagonal(model, outputs, y, create_graph=True)
