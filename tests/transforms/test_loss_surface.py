"""The loss over lines and planes through the parameters, against formulas and plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import functional_loss, loss_surface
from tests import oracles, problems

NAMES = [name for name in problems.names(random=False) if name != "bfloat16"]


def _grid(count: int = 3) -> Tensor:
    line = torch.linspace(-0.3, 0.4, count, dtype=torch.float64)
    return torch.stack(torch.meshgrid(line, 2 * line, indexing="ij"), -1)


def _loop(f: Any, params: Any, directions: Any, points: Tensor, args: Any) -> Tensor:
    """Evaluate point by point, from one random state."""
    state, losses = torch.get_rng_state(), []
    for point in points.reshape(-1, points.shape[-1]):
        torch.set_rng_state(state)
        at = params
        for number, direction in zip(point.tolist(), directions, strict=True):
            at = oracles.shifted(at, number, direction)
        losses.append(f(at, *args).detach().reshape(()))
    torch.set_rng_state(state)
    return torch.stack(losses).reshape(points.shape[:-1])


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_surface_is_the_loss_at_every_point(name: str, chunk_size: int | None) -> None:
    problem = problems.load(name)
    f = problem.f
    directions = [oracles.random_like(problem.params, seed) for seed in (1, 2)]
    with oracles.untouched(problem.model):
        expected = _loop(f, problem.params, directions, _grid(), problem.args)
    found = loss_surface(f, chunk_size=chunk_size)(
        problem.params, directions, _grid(), *problem.args
    )
    assert found.dtype == expected.dtype
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=max(problem.rtol, 1e-10), atol=1e-12)


def test_the_surface_of_a_quadratic_is_its_formula() -> None:
    problem = problems.load("quadratic")
    assert problem.hessian is not None
    p = problem.params
    u, v = (oracles.random_like(p, seed) for seed in (1, 2))
    gradient = torch.func.grad(problem.f)(p)
    grid = _grid(4)
    a, b = grid.unbind(-1)
    H = problem.hessian
    bent = 0.5 * (a**2 * (u @ H @ u) + 2 * a * b * (u @ H @ v) + b**2 * (v @ H @ v))
    expected = problem.f(p) + a * (gradient @ u) + b * (gradient @ v) + bent
    torch.testing.assert_close(loss_surface(problem.f)(p, (u, v), grid), expected)


def test_half_precision_keeps_its_dtype() -> None:
    problem = problems.load("bfloat16")
    d = oracles.random_like(problem.params, 1)
    points = torch.linspace(-1, 1, 5)[:, None]
    losses = loss_surface(problem.f)(problem.params, [d], points, *problem.args)
    assert losses.dtype == torch.bfloat16
    wide = oracles.shifted(problem.params, 0.0, d)
    assert losses[2] == problem.f(wide, *problem.args)


def test_three_directions_and_keys_in_another_order() -> None:
    params = {"b": torch.tensor(1.0), "a": torch.zeros(2)}
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(0.0)}
    two = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(0.0)}
    three = {"b": torch.tensor(1.0), "a": torch.zeros(2)}
    points = torch.tensor([[2.0, 3.0, 4.0]])
    f = lambda p: p["a"][0] + 10 * p["a"][1] + 100 * p["b"]  # noqa: E731
    assert loss_surface(f)(params, [one, two, three], points).tolist() == [2 + 30 + 500]


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_every_point_sees_the_mask_of_one_evaluation(chunk_size: int) -> None:
    problem = problems.load("dropout")
    d = oracles.random_like(problem.params, 1)
    points = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    torch.manual_seed(3)
    expected = _loop(problem.f, problem.params, [d], points, problem.args)
    problem.f(problem.params, *problem.args)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = loss_surface(problem.f, chunk_size=chunk_size)(
        problem.params, [d], points, *problem.args
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_do_not_move() -> None:
    problem = problems.load("cnn_batchnorm_train")
    assert problem.model is not None
    model = copy.deepcopy(problem.model)
    f, params = functional_loss(model, F.cross_entropy)
    before = copy.deepcopy(model.state_dict())
    d = oracles.random_like(params, 1)
    loss_surface(f)(params, [d], torch.linspace(-1, 1, 4)[:, None], *problem.args)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_control_flow_on_numbers_goes_point_by_point() -> None:
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(p)
        return p.sum() if p.sum() > 0 else 10 * p.sum()

    points = torch.tensor([[-1.0], [1.0]])
    losses = loss_surface(f)(torch.zeros(2), [torch.ones(2)], points)
    assert losses.tolist() == [-20.0, 2.0]
    assert len(calls) == 3  # one attempt of all at once


def test_nan_and_infinity_are_returned() -> None:
    points = torch.tensor([[-1.0], [0.0], [1.0]])
    losses = loss_surface(lambda p: p.log().sum())(torch.zeros(1), [torch.ones(1)], points)
    assert losses[0].isnan()
    assert losses[1] == -torch.inf
    assert losses[2] == 0


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_the_losses_are_differentiable_in_everything_that_is_passed(
    chunk_size: int | None,
) -> None:
    p, d, c, x = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in ([1.0, 2.0], [0.5, -1.0], [[-1.0], [2.0], [0.3]], 3.0)
    )
    losses = loss_surface(lambda p, x: x * (p**3).sum(), chunk_size=chunk_size)(p, [d], c, x)
    at = p + c * d
    expected = torch.autograd.grad((x * (at**3).sum(1)).square().sum(), (p, d, c, x))
    found = torch.autograd.grad(losses.square().sum(), (p, d, c, x))
    torch.testing.assert_close(found, expected)


def test_no_graph_is_kept_where_none_is_asked_for() -> None:
    p, d = torch.ones(2, requires_grad=True), torch.ones(2)
    points = torch.zeros(1, 1)
    captured = torch.ones((), requires_grad=True)
    assert loss_surface(lambda p: p.sum())(p, [d], points).requires_grad
    with torch.no_grad():
        assert not loss_surface(lambda p: p.sum())(p, [d], points).requires_grad
    constant = loss_surface(lambda p: captured * p.sum())(p.detach(), [d], points)
    assert not constant.requires_grad


def test_it_composes_with_grad_vmap_and_jvp() -> None:
    p, d = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    surface = loss_surface(lambda p: (p**3).sum())
    points = torch.linspace(-1, 1, 4)[:, None]
    at = p + points * d
    gradient = torch.func.grad(lambda p: surface(p, [d], points).sum())(p)
    torch.testing.assert_close(gradient, (3 * at**2).sum(0))
    many = torch.func.vmap(lambda p: surface(p, [d], points))(torch.stack([p, 2 * p]))
    torch.testing.assert_close(many[0], (at**3).sum(1))
    slopes = torch.func.jvp(lambda c: surface(p, [d], c), (points,), (torch.ones_like(points),))[1]
    torch.testing.assert_close(slopes, 3 * (at**2) @ d)


def test_it_compiles_in_one_graph() -> None:
    surface = loss_surface(lambda p: (p**3).sum())
    p, d, points = torch.ones(2), torch.ones(2), torch.linspace(-1, 1, 4)[:, None]
    compiled = torch.compile(lambda p: surface(p, [d], points), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(p), 2 * (1 + points[:, 0]) ** 3)


def test_it_works_in_inference_mode() -> None:
    with torch.inference_mode():
        p = torch.ones(2)
        losses = loss_surface(lambda p: p.sum())(p, [p], torch.tensor([[0.0], [1.0]]))
    assert losses.tolist() == [2.0, 4.0]


def test_no_point_gives_no_loss() -> None:
    p = torch.zeros(2, dtype=torch.float64)
    losses = loss_surface(lambda p: p.sum())(p, [p, p], torch.zeros(3, 0, 2))
    assert (losses.shape, losses.dtype) == ((3, 0), torch.float64)


def test_an_error_of_the_loss_is_its_own_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(model.state_dict())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("mine")

    f, params = functional_loss(model, loss)
    with pytest.raises(RuntimeError, match="mine"):
        loss_surface(f)(params, [params], torch.zeros(3, 1), torch.randn(4, 2), None)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


P = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("directions", "coordinates", "kind", "text"),
    [
        ([P, {"w": torch.zeros(3)}], torch.zeros(1, 2), ValueError, r"directions\[1\].*\['w'\]"),
        ([{"v": torch.zeros(2)}], torch.zeros(1, 1), TypeError, r"directions\[0\].*structure"),
        ([{"w": torch.zeros(2).double()}], torch.zeros(1, 1), ValueError, "float64"),
        (P, torch.zeros(1, 1), TypeError, "a list or a tuple of trees"),
        ([], torch.zeros(1, 0), ValueError, "at least one direction"),
        ([P], torch.zeros(3), ValueError, r"Expected shape \(..., 1\), got \(3,\)"),
        ([P], torch.zeros(()), ValueError, r"got \(\)"),
        ([P], [[0.0]], TypeError, "must be a tensor, got list"),
        ([P], torch.zeros(1, 1, dtype=torch.complex64), ValueError, "real numbers"),
    ],
)
def test_a_bad_argument_is_named(directions: Any, coordinates: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        loss_surface(lambda p: p["w"].sum())(P, directions, coordinates)


@pytest.mark.parametrize("chunk_size", [0, 1.5])
def test_a_bad_chunk_is_refused(chunk_size: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        loss_surface(lambda p: p.sum(), chunk_size=chunk_size)


def test_a_loss_of_several_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="one element"):
        loss_surface(lambda p: p)(torch.zeros(2), [torch.zeros(2)], torch.zeros(2, 1))


def test_a_write_to_the_parameters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="writes to a parameter"):
        loss_surface(lambda p: p.mul_(2).sum())(torch.zeros(2), [torch.zeros(2)], torch.zeros(2, 1))
