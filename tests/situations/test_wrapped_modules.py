"""Parametrised, tied, shared and hooked modules, and nn.DataParallel on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from secorder_func import functional_loss, functional_model, hvp
from secorder_func.compat.core.hvp import exact_hvp
from secorder_func.errors import ArgumentError
from tests import oracles
from tests.compat.closures import same, snapshot
from tests.situations.entries import (
    CLOSURES,
    ENTRIES,
    FUNCTIONAL,
    GAUSS_NEWTON,
    Case,
    assert_product,
    classification,
    double_backward,
    every_closure,
    every_entry,
    gauss_newton,
    mlp,
)


def _case(model: nn.Module, truth: nn.Module | None = None) -> Case:
    return Case(model, F.cross_entropy, *classification(), truth=truth)


class Squashed(nn.Module):
    """A parametrisation of the user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * torch.tanh(weight)


def _parametrised() -> nn.Module:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Squashed())
    return model


def _spectral() -> nn.Module:
    model = mlp()
    parametrizations.spectral_norm(model[0])
    return model


def _old_spectral() -> nn.Module:
    model = mlp()
    nn.utils.spectral_norm(model[0])
    return model


def _orthogonal() -> nn.Module:
    model = mlp()
    parametrizations.orthogonal(model[0])
    return model


def _shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)).double()


def _tied_weights() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3)).double()


def _data_parallel() -> nn.Module:
    return nn.DataParallel(mlp())


MODULES: dict[str, Callable[[], nn.Module]] = {
    f.__name__[1:]: f
    for f in (
        _parametrised,
        _spectral,
        _old_spectral,
        _orthogonal,
        _shared_layer,
        _tied_weights,
        _data_parallel,
    )
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm. is deprecated:FutureWarning")  # by torch
@pytest.mark.parametrize("name", MODULES)
@every_entry
def test_a_product_is_exact_and_leaves_the_module_bit_identical(entry: str, name: str) -> None:
    torch.manual_seed(0)
    case = _case(MODULES[name]())
    case.closure().backward()
    v = case.vector()
    expected = double_backward(case, v)
    before = snapshot(case.model)
    product = ENTRIES[entry](case, v)
    assert same(before, snapshot(case.model))
    oracles.assert_same(product, expected)
    assert all(type(p) is nn.Parameter for p in case.params)


@pytest.mark.parametrize("name", ["shared_layer", "tied_weights", "data_parallel", "parametrised"])
@pytest.mark.parametrize("entry", GAUSS_NEWTON)
def test_gauss_newton_products_are_exact(entry: str, name: str) -> None:
    torch.manual_seed(0)
    case = _case(MODULES[name]())
    v = case.vector()
    oracles.assert_same(GAUSS_NEWTON[entry](case, v), gauss_newton(case, v))


class WrittenOutWeightNorm(nn.Module):
    """g v / |v| row by row, with the parameters of a layer with weight norm: torch's double backward is wrong."""

    def __init__(self, layer: nn.Linear, g: nn.Parameter, v: nn.Parameter) -> None:
        super().__init__()
        self.bias, self.g, self.v = layer.bias, g, v

    def forward(self, x: Tensor) -> Tensor:
        norms = self.v.square().sum(1, keepdim=True).sqrt()
        return F.linear(x, self.g * self.v / norms, self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")  # by torch
@pytest.mark.parametrize("kind", ["parametrisation", "old style"])
@every_entry
def test_weight_norm_is_that_of_the_formula(entry: str, kind: str) -> None:
    model = mlp()
    if kind == "old style":
        layer = nn.utils.weight_norm(model[0])
        written_out = WrittenOutWeightNorm(layer, layer.weight_g, layer.weight_v)
    else:
        layer = parametrizations.weight_norm(model[0])
        originals = layer.parametrizations.weight
        written_out = WrittenOutWeightNorm(layer, originals.original0, originals.original1)
    case = _case(model, nn.Sequential(written_out, *model[1:]))
    assert [id(p) for p in case.truth.parameters()] == [id(p) for p in case.params]
    assert_product(entry, case)


# ---------------------------------------------------------------------------------- shared modules


def test_a_module_held_under_two_names_keeps_its_parameters() -> None:
    model = _shared_layer()
    own = list(model.parameters())
    model_fn, params = functional_model(model)
    x, _ = classification()
    model_fn(params, x)
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))


def test_a_shared_buffer_is_read_and_left_in_every_place() -> None:
    norm = nn.BatchNorm1d(4).double()
    model = nn.Sequential(nn.Linear(4, 4).double(), norm, nn.Tanh(), norm, nn.Tanh())
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    f, params = functional_loss(model, lambda output, y: (output**3).sum())
    x, _ = classification()
    v = oracles.random_like(params, 1)
    hv = hvp(f)(params, v, x, None)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model[1] is model[3]
    assert set(params) == {"0.bias", "1.weight", "1.bias"}
    case = Case(model, lambda output, y: (output**3).sum(), x)
    full = dict(zip([n for n, _ in model.named_parameters()], case.params, strict=True))
    rows = [v.get(name, torch.zeros_like(p)) for name, p in full.items()]
    model[0].weight.requires_grad_()
    expected = dict(zip(full, double_backward(case, rows), strict=True))
    oracles.assert_same(hv, {name: expected[name] for name in params})


def test_part_of_the_parameters_of_a_shared_layer_reaches_both_its_places() -> None:
    model = _shared_layer()
    f, params = functional_loss(model, F.cross_entropy)
    x, y = classification()
    part = {"0.weight": params["0.weight"]}
    v = oracles.random_like(part, 1)
    whole = {n: v.get(n, torch.zeros_like(p)) for n, p in params.items()}
    expected = double_backward(_case(model), list(whole.values()))
    oracles.assert_same(
        hvp(f)(part, v, x, y), {"0.weight": dict(zip(params, expected, strict=True))["0.weight"]}
    )


def test_what_data_parallel_wraps_is_taken_under_its_own_names() -> None:
    _, params = functional_loss(nn.DataParallel(mlp()), F.cross_entropy)
    assert list(params) == ["0.weight", "0.bias", "2.weight", "2.bias"]


# ------------------------------------------------------------------------------------------- hooks


def _with_forward_hooks() -> nn.Module:
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: output + output**2)
    model[2].register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True)
    return model


@every_entry
def test_forward_hooks_are_part_of_the_function(entry: str) -> None:
    case = _case(_with_forward_hooks())
    assert_product(entry, case)
    without = _case(mlp())
    expected = double_backward(without, without.vector())
    assert oracles.relative_error(ENTRIES[entry](case, case.vector()), expected) > 1e-2


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@every_closure
def test_backward_hooks_of_modules_send_closures_to_double_backward(entry: str) -> None:
    model = mlp()
    model[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    model[1].register_full_backward_pre_hook(lambda module, outputs: None)
    assert_product(entry, _case(model))


@every_entry
def test_hooks_that_wait_for_the_gradient_of_a_parameter_never_run(entry: str) -> None:
    model, calls = mlp(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    assert_product(entry, _case(model))
    assert not calls


class Hooked(nn.Module):
    """A network that hooks an intermediate result, as code that watches or clips gradients does."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.hook = mlp(), hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner[0](x)
        if h.requires_grad:
            h.register_hook(self.hook)
        return self.inner[2](torch.tanh(h))


@every_entry
def test_a_hook_that_watches_a_gradient_is_fine(entry: str) -> None:
    seen: list[Any] = []
    case = _case(Hooked(lambda gradient: seen.append(gradient.shape)))
    assert_product(entry, case)
    assert seen


@pytest.mark.parametrize("entry", [*FUNCTIONAL, "exact_hvp", "model_hvp"])
def test_a_hook_that_changes_a_gradient_is_refused(entry: str) -> None:
    # Forward over reverse gives J v, reverse over reverse Jᵀ v of the changed gradient, whose J is not symmetric.
    case = _case(Hooked(lambda gradient: gradient.clamp(-0.01, 0.01)))
    with pytest.raises(ArgumentError, match="hook in the loss changes a gradient"):
        ENTRIES[entry](case, case.vector())


def test_a_hook_on_a_parameter_is_no_part_of_the_function() -> None:
    plain, hooked = _case(mlp()), _case(mlp())
    for p in hooked.params:
        p.register_hook(lambda gradient: 3 * gradient)
    v = plain.vector()
    for entry in [*FUNCTIONAL, "exact_hvp", "model_hvp"]:
        oracles.assert_same(ENTRIES[entry](hooked, v), double_backward(plain, v))


def test_a_global_forward_hook_of_the_user_sees_the_evaluations() -> None:
    case, seen = _case(mlp()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    try:
        for entry in (*FUNCTIONAL, *CLOSURES):
            seen.clear()
            assert_product(entry, case)
            assert "Linear" in seen
    finally:
        handle.remove()


def test_a_module_list_that_is_no_attribute_of_the_module_is_reached() -> None:
    class Unregistered(nn.Module):
        """Calls its layers through a plain list and a lambda, which a copy of the module would miss."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            self.order = [self.first, self.second]
            self.last = lambda h: self.second(h)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.order[0](x)))

    case = _case(Unregistered().double())
    for entry in ENTRIES:
        assert_product(entry, case)
    w = case.params[0]
    assert float(exact_hvp(case.closure, [w], torch.ones_like(w)).norm()) > 0


def test_a_hook_on_a_parameter_is_no_part_of_the_function_by_double_backward() -> None:
    plain, hooked = _case(mlp()), _case(mlp())
    for p in hooked.params:
        p.register_hook(lambda gradient: 3 * gradient)
    v = plain.vector()
    oracles.assert_same(ENTRIES["exact_hvp with a graph"](hooked, v), double_backward(plain, v))
    (hooked.params[0].sum()).backward()
    assert torch.equal(hooked.params[0].grad, torch.full_like(hooked.params[0], 3.0))  # still there


def test_a_hook_that_changes_a_gradient_is_refused_by_double_backward_with_its_own_error() -> None:
    case = _case(Hooked(lambda g: g.clamp(-0.01, 0.01)))
    with pytest.raises(ArgumentError, match="hook in the loss changes a gradient"):
        ENTRIES["exact_hvp with a graph"](case, case.vector())


def test_a_loss_of_other_tensors_only_is_refused_by_double_backward_too() -> None:
    w, u = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        exact_hvp(lambda: (u**3).sum(), [w], torch.ones(2), create_graph=True)
