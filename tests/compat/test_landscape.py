"""Loss surfaces of modules: against a copy of the model written in the test, and against the package."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func.compat.analysis import landscape
from secorder_func.compat.analysis.landscape import (
    compute_loss_surface_1d,
    compute_loss_surface_2d,
    create_random_direction,
)
from secorder_func.errors import ArgumentError, CurvatureFallbackWarning
from tests.compat.closures import MODELS, same, snapshot, stateful


def _loop(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    x: Any,
    y: Any,
    directions: list[list[Tensor]],
    points: Tensor,
) -> Tensor:
    """Evaluate a fresh copy of the model at each point, from one random state."""
    state, losses = torch.get_rng_state(), []
    for point in points:
        torch.set_rng_state(state)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for i, p in enumerate(moved.parameters()):
                for number, direction in zip(point.tolist(), directions, strict=True):
                    p.add_(direction[i], alpha=number)
        losses.append(loss_fn(moved(x), y).detach())
    torch.set_rng_state(state)
    return torch.stack(losses)


@pytest.mark.parametrize("name", [*MODELS, "frozen_and_unused", "dropout", "tree_outputs"])
def test_a_curve_is_the_loss_of_moved_copies(name: str) -> None:
    case = stateful(name)
    d = case.vector(1)
    alphas, losses = compute_loss_surface_1d(
        case.model, case.loss_fn, case.x, case.y, d, (-0.5, 0.7), 5
    )
    assert torch.equal(alphas, torch.linspace(-0.5, 0.7, 5))
    expected = _loop(case.model, case.loss_fn, case.x, case.y, [d], alphas[:, None])
    if name == "dropout":
        torch.manual_seed(20240229)
        expected = _loop(case.model, case.loss_fn, case.x, case.y, [d], alphas[:, None])
    assert losses.std() > 0
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)


def test_a_plane_has_alphas_in_rows_and_betas_in_columns() -> None:
    case = stateful("mlp_tanh")
    d, e = case.vector(1), case.vector(2)
    alphas, betas, losses = compute_loss_surface_2d(
        case.model, case.loss_fn, case.x, case.y, d, e, (-1.0, 1.0), (0.0, 0.5), num_points=4
    )
    assert torch.equal(betas, torch.linspace(0.0, 0.5, 4))
    points = torch.cartesian_prod(alphas, betas)
    expected = _loop(case.model, case.loss_fn, case.x, case.y, [d, e], points)
    torch.testing.assert_close(losses, expected.reshape(4, 4))


@pytest.mark.parametrize("name", ["cnn_batchnorm_train", "frozen_and_unused", "encoder_train"])
def test_the_model_is_left_bit_identical(name: str) -> None:
    case = stateful(name)
    case.model(case.x)
    before, d = snapshot(case.model), case.vector()
    places = [p.data_ptr() for p in case.params]
    compute_loss_surface_1d(case.model, case.loss_fn, case.x, case.y, d, num_points=3)
    compute_loss_surface_2d(case.model, case.loss_fn, case.x, case.y, d, d, num_points=2)
    assert same(before, snapshot(case.model))
    assert [p.data_ptr() for p in case.params] == places


@pytest.mark.parametrize(("name", "call"), [("mlp_tanh", 1), ("frozen_and_unused", 3)])
def test_the_model_is_left_bit_identical_when_the_loss_raises(name: str, call: int) -> None:
    case, calls = stateful(name), []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyError("mine")
        return case.loss_fn(outputs, targets)

    before = snapshot(case.model)
    frozen = [p.requires_grad for p in case.params]
    with pytest.raises(KeyError, match="mine"):
        compute_loss_surface_1d(case.model, loss, case.x, case.y, case.vector(), num_points=3)
    assert same(before, snapshot(case.model))
    assert [p.requires_grad for p in case.params] == frozen


def test_the_random_state_is_left_as_one_evaluation_leaves_it() -> None:
    case = stateful("dropout")
    torch.manual_seed(5)
    case.func()
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    compute_loss_surface_1d(case.model, case.loss_fn, case.x, case.y, case.vector(), num_points=3)
    assert torch.equal(torch.get_rng_state(), expected)


class _PartlyScripted(nn.Module):
    """A scripted layer whose parameters no exchange reaches, under no_grad, before an ordinary one."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.inner = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
        self.outer = nn.Linear(4, 1)
        for p in self.inner.parameters():
            p.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.inner(x)
        return self.outer(hidden)


class _Transposed(torch.autograd.Function):
    """A custom function that reads a parameter by another name for its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: Any) -> Tensor:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            return x @ holder[0].detach().T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError


class _Secretive(nn.Module):
    """One parameter that no torch function of the forward pass is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(_Transposed.apply(x, [self.first.weight])))


def _hiding(kind: str) -> nn.Module:
    return {
        "scripted": lambda: _PartlyScripted(frozen=False),
        "frozen scripted": lambda: _PartlyScripted(frozen=True),
        "custom function": _Secretive,
    }[kind]().double()


@pytest.mark.parametrize("kind", ["scripted", "frozen scripted", "custom function"])
def test_a_hidden_parameter_moves_too(kind: str) -> None:
    model, loss_fn = _hiding(kind), nn.MSELoss()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    d = create_random_direction(model)
    hidden = [
        t if p.shape[-1] == 3 else torch.zeros_like(t)
        for p, t in zip(model.parameters(), d, strict=True)
    ]
    before = [(p.data_ptr(), p.detach().clone(), p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureFallbackWarning)
        alphas, losses = compute_loss_surface_1d(model, loss_fn, x, y, hidden, num_points=4)
    expected = []
    with torch.no_grad():
        for alpha in alphas.tolist():
            for p, t in zip(model.parameters(), hidden, strict=True):
                p.add_(t, alpha=alpha)
            expected.append(loss_fn(model(x), y))
            for p, (_, value, _) in zip(model.parameters(), before, strict=True):
                p.copy_(value)
    assert losses.std() > 1e-4
    torch.testing.assert_close(losses, torch.stack(expected))
    for p, (place, value, requires) in zip(model.parameters(), before, strict=True):
        assert p.data_ptr() == place
        assert p.requires_grad == requires
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=0)


def test_a_scripted_model_says_that_its_data_were_set_aside() -> None:
    model = _hiding("scripted")
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    d = create_random_direction(model)
    with pytest.warns(CurvatureFallbackWarning, match="set aside"):
        compute_loss_surface_1d(model, nn.MSELoss(), x, y, d, num_points=2)


def test_a_compiled_model_is_the_module_in_it() -> None:
    case = stateful("mlp_tanh")
    d = case.vector()
    compiled: Any = torch.compile(case.model, backend="eager")
    expected = compute_loss_surface_1d(case.model, case.loss_fn, case.x, case.y, d, num_points=3)
    found = compute_loss_surface_1d(compiled, case.loss_fn, case.x, case.y, d, num_points=3)
    assert torch.equal(found[1], expected[1])


def test_an_unused_parameter_raises_no_warning() -> None:
    case = stateful("frozen_and_unused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_loss_surface_1d(
            case.model, case.loss_fn, case.x, case.y, case.vector(), num_points=2
        )


def test_no_grad_and_inference_mode_around_the_call_change_nothing() -> None:
    case = stateful("mlp_tanh")
    args = (case.model, case.loss_fn, case.x, case.y, case.vector())
    expected = compute_loss_surface_1d(*args, num_points=3)[1]
    with torch.no_grad():
        assert torch.equal(compute_loss_surface_1d(*args, num_points=3)[1], expected)
    with torch.inference_mode():
        assert torch.equal(compute_loss_surface_1d(*args, num_points=3)[1], expected)


def test_losses_are_in_the_dtype_of_the_loss_and_at_least_in_the_default_one() -> None:
    model = nn.Linear(2, 1)
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        model, x, y = model.to(dtype), torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype)
        d = create_random_direction(model)
        alphas, losses = compute_loss_surface_1d(model, nn.MSELoss(), x, y, d, num_points=2)
        assert (alphas.dtype, losses.dtype) == (torch.float32, expected)
        assert losses[0] != losses[1]


def test_no_point_gives_empty_tensors() -> None:
    case = stateful("mlp_tanh")
    d = case.vector()
    alphas, losses = compute_loss_surface_1d(
        case.model, case.loss_fn, case.x, case.y, d, num_points=0
    )
    assert alphas.shape == losses.shape == (0,)


def test_a_random_direction_has_norm_one_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    direction = create_random_direction(model)
    shapes = [(d.shape, d.dtype) for d in direction]
    assert shapes == [(p.shape, p.dtype) for p in model.parameters()]
    norms = sorted(float(d.norm()) for d in direction)
    assert norms == pytest.approx([0.0, 1.0, 1.0, 1.0, 1.0])
    assert not any(d.requires_grad for d in direction)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"direction": []}, "direction must have one tensor for each parameter"),
        ({"direction": [torch.zeros(1, 2)]}, "Expected 2, got 1"),
        ({"direction": [torch.zeros(2, 1), torch.zeros(1)]}, r"direction\[0\].*shape"),
        ({"direction": [torch.zeros(1, 2).double(), torch.zeros(1)]}, r"direction\[0\].*float64"),
        ({"model": lambda x: x}, "model must be a torch.nn.Module"),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"num_points": 2.5}, "num_points"),
        ({"num_points": -1}, "num_points"),
        ({"alpha_range": 1.0}, "alpha_range must be a pair"),
        ({"alpha_range": (0.0, "1")}, r"alpha_range\[1\]"),
        ({"loss_fn": lambda outputs, targets: outputs}, "one element"),
    ],
)
def test_a_bad_argument_is_named(change: dict[str, Any], text: str) -> None:
    good: dict[str, Any] = {
        "model": nn.Linear(2, 1),
        "loss_fn": nn.MSELoss(),
        "inputs": torch.ones(3, 2),
        "targets": torch.ones(3, 1),
        "direction": [torch.zeros(1, 2), torch.zeros(1)],
    }
    with pytest.raises(ArgumentError, match=text):
        compute_loss_surface_1d(**{**good, **change})


# ------------------------------------------------------------------------------ the package


def _package() -> Any:
    pytest.importorskip("torch_secorder")
    return importlib.import_module("torch_secorder.analysis.landscape")


def _network() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(16, 5), torch.randint(3, (16,))


@pytest.mark.peers
@pytest.mark.parametrize("name", landscape.__all__)
def test_signatures_are_the_packages(name: str) -> None:
    theirs = inspect.signature(getattr(_package(), name)).parameters.values()
    ours = inspect.signature(getattr(landscape, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


@pytest.mark.peers
def test_surfaces_and_directions_are_the_packages() -> None:
    package, (model, *rest) = _package(), _network()
    torch.manual_seed(0)
    theirs = package.create_random_direction(model)
    torch.manual_seed(0)
    d = create_random_direction(model)
    assert all(torch.equal(a, b) for a, b in zip(d, theirs, strict=True))
    e = create_random_direction(model)
    for ours, other in [
        (
            compute_loss_surface_1d(model, *rest, d),
            package.compute_loss_surface_1d(model, *rest, d),
        ),
        (
            compute_loss_surface_2d(model, *rest, d, e, num_points=4),
            package.compute_loss_surface_2d(model, *rest, d, e, num_points=4),
        ),
    ]:
        assert isinstance(ours, tuple)
        assert [(t.dtype, t.shape) for t in ours] == [(t.dtype, t.shape) for t in other]
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.peers
def test_the_package_leaves_a_model_moved_when_the_loss_raises() -> None:
    package, (model, _, x, y) = _package(), _network()
    d = create_random_direction(model)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("mine")

    for module, moved in ((package, True), (landscape, False)):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(KeyError):
            module.compute_loss_surface_1d(model, loss, x, y, d)
        kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert kept is not moved


@pytest.mark.peers
def test_the_package_moves_running_statistics_and_draws_new_masks() -> None:
    package = _package()
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x, y = torch.randn(16, 5), torch.randn(16, 1)
    still = [torch.zeros_like(p) for p in model.parameters()]
    for module, moves in ((landscape, False), (package, True)):
        mean = model[1].running_mean.clone()
        losses = module.compute_loss_surface_1d(model, nn.MSELoss(), x, y, still, num_points=4)[1]
        assert (len(losses.unique()) > 1) is moves
        assert torch.equal(mean, model[1].running_mean) is not moves


@pytest.mark.peers
def test_the_package_moves_some_parameters_only_along_a_short_direction() -> None:
    package, (model, *rest) = _package(), _network()
    d = create_random_direction(model)
    package.compute_loss_surface_1d(model, *rest, d[:1], num_points=2)
    with pytest.raises(ArgumentError, match="Expected 4, got 1"):
        compute_loss_surface_1d(model, *rest, d[:1], num_points=2)


@pytest.mark.peers
def test_the_package_rounds_double_losses_to_single() -> None:
    package, (model, loss_fn, x, y) = _package(), _network()
    model, x = model.double(), x.double()
    d = create_random_direction(model)
    theirs = package.compute_loss_surface_1d(model, loss_fn, x, y, d, num_points=3)[1]
    ours = compute_loss_surface_1d(model, loss_fn, x, y, d, num_points=3)[1]
    assert (theirs.dtype, ours.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
