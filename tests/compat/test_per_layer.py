"""Curvature layer by layer against dense blocks by plain autograd."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func.compat.core.per_layer_curvature import (
    get_layer_curvature_stats,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)
from secorder_func.errors import ArgumentError, ArgumentTypeError
from tests import oracles
from tests.compat.closures import same, snapshot, stateful

FUNCTIONS = [per_layer_hessian_diagonal, per_layer_fisher_diagonal]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


def _quartic(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(4).sum()


def _block_diagonal(loss: Tensor, params: list[Tensor]) -> Tensor:
    """Return the diagonal of a block by one backward pass for each entry."""
    first = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    entries = []
    for p, g in zip(params, first, strict=True):
        for index in range(p.numel()):
            second = None
            if g is not None and g.requires_grad:
                (second,) = torch.autograd.grad(
                    g.reshape(-1)[index], p, retain_graph=True, allow_unused=True
                )
            entries.append(
                torch.zeros((), dtype=p.dtype) if second is None else second.reshape(-1)[index]
            )
    return torch.stack(entries)


def _squares(loss: Tensor, params: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, params, retain_graph=True)
    return torch.cat([g.reshape(-1) ** 2 for g in found])


ORACLES: list[Any] = [
    (per_layer_hessian_diagonal, _block_diagonal),
    (per_layer_fisher_diagonal, _squares),
]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("function", "oracle"), ORACLES)
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_train"])
def test_each_layer_has_the_diagonal_of_its_block(
    name: str, function: Any, oracle: Any, create_graph: bool
) -> None:
    case = stateful(name)
    found = function(case.model, case.loss_fn, case.x, case.y, create_graph=create_graph)
    layers = {
        key: list(module.parameters())
        for key, module in case.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    assert list(found) == list(layers)
    with oracles.untouched(case.model):
        loss = case.func()
        blocks = {key: oracle(loss, params) for key, params in layers.items()}
    for key, expected in blocks.items():
        assert expected.abs().max() > 0
        oracles.assert_same(found[key].detach(), expected)
        assert found[key].requires_grad is create_graph


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_with_a_graph_have_the_derivative_of_finite_differences(function: Any) -> None:
    model, (x, y) = _model(), _data()
    bias, step = model[0].bias, 1e-5
    total = function(model, _quartic, x, y, create_graph=True)["2"].sum()
    (slope,) = torch.autograd.grad(total, bias)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * step
        ends.append(function(model, _quartic, x, y)["2"].sum())
        with torch.no_grad():
            bias[0] -= sign * step
    torch.testing.assert_close(slope[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("function", "oracle"), ORACLES)
def test_frozen_parameters_of_a_layer_have_their_entries_and_stay_frozen(
    function: Any, oracle: Any
) -> None:
    model, (x, y) = _model(), _data()
    loss = _quartic(model(x), y)
    expected = oracle(loss, list(model[0].parameters()))
    model[0].requires_grad_(False)
    oracles.assert_same(function(model, _quartic, x, y)["0"], expected)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_a_frozen_layer_that_hides_its_parameters_has_its_entries() -> None:
    model, (x, y) = _model(), _data()
    expected = _block_diagonal(_quartic(model(x), y), list(model[0].parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model[0] = torch.jit.script(model[0])
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = per_layer_hessian_diagonal(model, _quartic, x, y, layer_types=[torch.jit.ScriptModule])
    oracles.assert_same(found["0"], expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_a_result_do_not_reach_frozen_parameters(function: Any) -> None:
    model, (x, y) = _model(), _data()
    model[0].weight.requires_grad_(False)
    function(model, _quartic, x, y, create_graph=True)["0"].sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad.count_nonzero()


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
        with torch.no_grad():
            self.unused.weight.fill_(math.inf)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unused_layer_has_zeros_whose_derivative_is_zero(
    function: Any, create_graph: bool
) -> None:
    model, (x, y) = _Unused(), _data()
    found = function(model, _quartic, x, y, create_graph=create_graph)
    assert found["used"].count_nonzero() == 8
    assert torch.equal(found["unused"].detach(), torch.zeros(6, dtype=torch.float64))
    if create_graph:
        slopes = torch.autograd.grad(found["unused"].sum(), list(model.unused.parameters()))
        assert all(torch.equal(s, torch.zeros_like(s)) for s in slopes)
    only = function(model.used, lambda output, target: _quartic(output, target), x, y)
    assert list(only) == [""]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_if_all_layers_are_unused_all_entries_are_zeros(function: Any) -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    found = function(model, lambda output, target: (x**2).sum(), torch.zeros(1, 3).double(), None)
    assert torch.equal(found[""], torch.zeros(8, dtype=torch.float64))


def test_a_constant_diagonal_with_a_graph_has_derivative_zero() -> None:
    model, (x, y) = nn.Linear(3, 2).double(), _data()
    found = per_layer_hessian_diagonal(model, nn.MSELoss(), x, y, create_graph=True)[""]
    torch.testing.assert_close(found[-2:].detach(), torch.ones(2, dtype=torch.float64))
    slopes = torch.autograd.grad(found.sum(), list(model.parameters()))
    assert all(torch.equal(s, torch.zeros_like(s)) for s in slopes)


@pytest.mark.parametrize(("function", "oracle"), ORACLES)
def test_tied_layers_and_a_container_have_the_entries_of_all_uses(
    function: Any, oracle: Any
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    found = function(model, _quartic, x, y, layer_types=[nn.Linear, nn.Sequential])
    loss = _quartic(model(x), y)
    assert list(found) == ["", "0", "2"]
    for key, module in (("", model), ("0", model[0]), ("2", model[2])):
        oracles.assert_same(found[key], oracle(loss, list(module.parameters())))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layers_without_parameters_have_empty_tensors(function: Any) -> None:
    model, (x, y) = _model(), _data()
    found = function(model, _quartic, x, y, layer_types=[nn.Tanh])
    assert list(found) == ["1"]
    assert found["1"].shape == (0,)
    assert function(model, _quartic, x, y, layer_types=[nn.Conv2d]) == {}
    assert function(model, _quartic, x, y, layer_types=[]) == {}


def test_all_layers_see_one_dropout_mask_and_the_random_state_moves_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = _data()
    torch.manual_seed(3)
    loss = _quartic(model(x), y)
    after = torch.get_rng_state()
    for function, oracle in ORACLES:
        torch.manual_seed(3)
        found = function(model, _quartic, x, y)
        assert torch.equal(torch.get_rng_state(), after)
        for key in ("0", "2"):
            oracles.assert_same(
                found[key], oracle(loss, list(model.get_submodule(key).parameters()))
            )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(function: Any, fails: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = _data()
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = snapshot(model)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails:
            raise KeyError("mine")
        return _quartic(output, target)

    if fails:
        with pytest.raises(KeyError, match="mine"):
            function(model, loss, x, y)
    else:
        with torch.no_grad():
            function(model, loss, x, y)
    assert same(before, snapshot(model))
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_arguments_are_named(function: Any) -> None:
    model, (x, y) = _model(), _data()
    for args, options, pattern in (
        ((None, _quartic, x, y), {}, "model must be"),
        ((model, None, x, y), {}, "loss_fn must be"),
        ((model, _quartic, x, y), {"layer_types": ["Linear"]}, "layer_types must be"),
    ):
        with pytest.raises(ArgumentTypeError, match=f"{function.__name__}: {pattern}"):
            function(*args, **options)
    with pytest.raises(ArgumentError, match="one element"):
        function(model, lambda output, target: output, x, y)
    with pytest.raises(ArgumentError, match=r"must be real, params\[0\] is torch.complex64"):
        function(nn.Linear(3, 2, dtype=torch.complex64), lambda o, t: o.abs().sum(), x.cfloat(), y)


# ------------------------------------------------------------------------------- statistics


def test_the_statistics_are_those_of_the_formulas() -> None:
    entries = torch.tensor([[1.0, 2.0], [4.0, 5.0]], dtype=torch.float16, requires_grad=True)
    stats = get_layer_curvature_stats({"layer": entries})["layer"]
    assert stats == {"mean": 3.0, "std": pytest.approx(math.sqrt(10 / 3)), "max": 5.0, "min": 1.0}
    assert all(type(value) is float for value in stats.values())


def test_what_is_not_defined_is_nan_without_a_warning() -> None:
    stats = get_layer_curvature_stats({"one": torch.tensor(2.0), "none": torch.empty(0)})
    assert (stats["one"]["mean"], stats["one"]["max"], stats["one"]["min"]) == (2.0, 2.0, 2.0)
    assert math.isnan(stats["one"]["std"])
    assert all(math.isnan(value) for value in stats["none"].values())
    assert get_layer_curvature_stats({}) == {}


def test_nan_entries_show_in_all_statistics() -> None:
    stats = get_layer_curvature_stats({"bad": torch.tensor([1.0, math.nan])})["bad"]
    assert all(math.isnan(value) for value in stats.values())


@pytest.mark.parametrize(
    ("layers", "error", "pattern"),
    [
        ([torch.ones(2)], ArgumentTypeError, "must be a dict"),
        ({"a": [torch.ones(2)]}, ArgumentTypeError, "layer 'a' must have a tensor, got list"),
        ({"a": torch.ones(2, dtype=torch.int64)}, ArgumentError, "real and floating"),
    ],
)
def test_wrong_layers_are_named(layers: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        get_layer_curvature_stats(layers)
