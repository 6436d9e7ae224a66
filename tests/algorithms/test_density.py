"""Spectral densities and functions of matrices against the eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from secorder_func import (
    LinearOperator,
    hessian_operator,
    matrix_function,
    spectral_density,
    tree,
)
from secorder_func.errors import NonFiniteError
from tests import oracles, problems
from tests.algorithms.matrices import generator, operator, random_matrix, with_spectrum
from tests.algorithms.test_low_rank import flat_operator

VALUES = torch.cat(
    [torch.linspace(0.5, 1.5, 280).double(), torch.tensor([8.0, 9.0, 10.0, -3.0]).double()]
)
A = with_spectrum(VALUES.tolist())
POSITIVE = with_spectrum(VALUES.abs().tolist())


def test_it_is_a_probability_measure_near_to_the_spectrum() -> None:
    density = spectral_density(flat_operator(A), 8, num_steps=64, generator=generator(0))
    oracles.assert_same(density.weights.sum(1), torch.ones(8).double(), 1e-12)
    points = torch.linspace(-6, 13, 4001).double()
    bells = density.density(points).value
    assert float(torch.trapezoid(bells, points)) == pytest.approx(1.0, abs=1e-6)
    distance = float(density.distance_to(VALUES))
    nodes = density.nodes.reshape(-1).numpy()
    weights = density.weights.reshape(-1).numpy()
    assert distance == pytest.approx(wasserstein_distance(nodes, VALUES.numpy(), weights), rel=1e-9)
    assert 0 < distance < 5e-3 * float(VALUES.max() - VALUES.min())
    assert density.num_matvecs == 8 * 64


def test_the_demonstrations_model() -> None:
    from secorder_func import functional_loss
    from secorder_func.report import digits

    data = digits.load(num_train=200, generator=generator(0))
    model = digits.make_model(32, generator=generator(1))
    digits.train(model, data, num_steps=60, advance=lambda steps: None)
    f, params = functional_loss(model, torch.nn.functional.cross_entropy)
    H = hessian_operator(f, params, data.train_inputs, data.train_labels)
    flat, unravel = tree.ravel(params)
    gradient = torch.func.grad(lambda p: f(unravel(p), data.train_inputs, data.train_labels))
    dense = torch.func.vmap(lambda v: torch.func.vjp(gradient, flat)[1](v)[0], chunk_size=64)(
        torch.eye(len(flat), dtype=flat.dtype)
    )
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    density = spectral_density(H, 8, num_steps=64, generator=generator(3))
    width = float(values.max() - values.min())
    assert 0 < float(density.distance_to(values)) <= 1e-3 * width


FUNCTIONS: dict[str, Any] = {
    "square": torch.square,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
    "exp": torch.exp,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_of_functions_are_within_their_errors(name: str) -> None:
    f = FUNCTIONS[name]
    truth = float(f(VALUES.abs()).sum())
    scores = []
    for seed in range(30):
        density = spectral_density(
            flat_operator(POSITIVE), 10, num_steps=50, generator=generator(seed)
        )
        found = density.trace_of(f)
        low, high = found.interval()
        scores.append(float(low) <= truth <= float(high))
        assert float(found.standard_error) < float(f(VALUES.abs()).abs().sum())
    assert sum(scores) >= 24


def test_the_log_determinant_of_a_damped_operator() -> None:
    op = flat_operator(POSITIVE).damped(0.1)
    density = spectral_density(op, 20, num_steps=60, generator=generator(0))
    truth = torch.logdet(POSITIVE + 0.1 * torch.eye(len(POSITIVE)).double())
    found = density.trace_of(torch.log)
    assert abs(float(found.value - truth)) < 5 * float(found.standard_error)


@pytest.mark.parametrize("p", [1, 2, 4.5])
def test_schatten_norms(p: float) -> None:
    density = spectral_density(flat_operator(A), 30, num_steps=60, generator=generator(0))
    found = density.schatten_norm(p)
    truth = float((VALUES.abs() ** p).sum() ** (1 / p))
    assert abs(float(found.value) - truth) < 5 * float(found.standard_error) + 1e-6
    assert 0 < float(found.standard_error) < 0.2 * truth


def test_the_cumulative_distribution() -> None:
    density = spectral_density(flat_operator(A), 30, num_steps=80, generator=generator(0))
    points = torch.tensor([[-10.0, 0.0], [1.0, 20.0]]).double()
    found = density.cumulative(points)
    truth = (VALUES.reshape(-1, 1, 1) <= points).double().mean(0)
    assert found.value.shape == (2, 2)
    assert ((found.value - truth).abs() < 5 * found.standard_error + 0.02).all()
    assert float(found.value[0, 0]) == 0
    assert float(found.value[1, 1]) == pytest.approx(1.0)


@pytest.mark.parametrize("budget", [1, 2 * 284 * 40 * 8, None])
def test_the_memory_does_not_change_the_numbers(budget: int | None) -> None:
    whole = spectral_density(flat_operator(A), 5, num_steps=40, generator=generator(0))
    parts = spectral_density(
        flat_operator(A), 5, num_steps=40, generator=generator(0), memory_budget=budget
    )
    oracles.assert_same(parts.mean_of(torch.sin).value, whole.mean_of(torch.sin).value, 1e-9)


def test_spaces_that_end_early_lose_no_weight() -> None:
    matrix = with_spectrum([2.0] * 30 + [5.0] * 10)
    density = spectral_density(flat_operator(matrix), 3, num_steps=20, generator=generator(0))
    oracles.assert_same(density.weights.sum(1), torch.ones(3).double(), 1e-12)
    kept = density.nodes[density.weights > 1e-12]
    assert torch.minimum((kept - 2).abs(), (kept - 5).abs()).max() < 1e-10
    oracles.assert_same(
        density.trace_of(torch.log).value,
        (density.weights * density.nodes.clamp(min=1).log()).sum(1).mean() * 40,
        1e-10,
    )
    one = LinearOperator(lambda v: 3 * v, torch.ones(()).double())
    assert float(spectral_density(one, 2).trace_of(torch.square).value) == pytest.approx(9.0)


def test_trees_and_curvature() -> None:
    matrix = random_matrix(8)
    density = spectral_density(operator(matrix), 400, generator=generator(0))
    found = density.trace_of(torch.square)
    assert abs(float(found.value - matrix.square().sum())) < 5 * float(found.standard_error)
    p = problems.load("mlp_gelu")
    with torch.no_grad():
        density = spectral_density(hessian_operator(p.f, p.params, *p.args), 40)
    H = oracles.hessian(p.f, p.params, *p.args)
    found = density.trace_of(lambda x: x)
    assert abs(float(found.value - H.trace())) < 5 * float(found.standard_error)


# ------------------------------------------------------------------------------- f(A) b


def dense_function(matrix: Tensor, f: Any) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * f(values)) @ vectors.T


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_times_vectors(name: str) -> None:
    f = FUNCTIONS[name]
    b = torch.randn(len(A)).double()
    found = matrix_function(flat_operator(POSITIVE), f, b, num_steps=60)
    truth = dense_function(POSITIVE, f) @ b
    oracles.assert_same(found.value, truth, 1e-8)
    coarse = matrix_function(flat_operator(POSITIVE), f, b, num_steps=8)
    missing = float((coarse.value - truth).norm())
    assert missing > 1e-9 * float(truth.norm()) or name == "square"  # of degree two
    assert missing < 1e-12 * float(truth.norm()) + 3 * float(coarse.standard_error.norm())


def test_an_inverse_square_root_colours_noise() -> None:
    """Its covariance is the inverse, as a sample of a Laplace approximation needs it."""
    op = operator(random_matrix(9) @ random_matrix(9).T).damped(1.0)
    b = oracles.like(torch.randn(10).double(), op.like)
    once = matrix_function(op, torch.rsqrt, b).value
    twice = matrix_function(op, torch.rsqrt, once).value
    expected = torch.linalg.solve(op.dense(), oracles.flat(b))
    oracles.assert_same(oracles.flat(twice), expected, 1e-9)


def test_bad_functions_and_operators() -> None:
    b = torch.ones(len(A)).double()
    with pytest.raises(ValueError, match=r"f is not finite at the Ritz value -\d"):
        matrix_function(flat_operator(A), torch.sqrt, b)
    with pytest.raises(ValueError, match="b must match params"):
        matrix_function(flat_operator(A), torch.exp, torch.ones(3).double())
    zero = matrix_function(flat_operator(A), torch.exp, torch.zeros(len(A)).double())
    assert not zero.value.any()
    for call in (lambda op: spectral_density(op), lambda op: matrix_function(op, torch.exp, b)):
        with pytest.raises(ValueError, match="the operator is not symmetric"):
            call(flat_operator(A, symmetric=False))
    with pytest.raises(TypeError, match="must be real"):
        spectral_density(LinearOperator(lambda v: v, torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(NonFiniteError, match="NaN"):
        spectral_density(LinearOperator(lambda v: v * math.nan, torch.ones(4)))
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        spectral_density(flat_operator(A), num_steps=0)
    for p in (0, math.inf):
        with pytest.raises(ValueError, match="p must be positive and finite"):
            spectral_density(flat_operator(A), 2).schatten_norm(p)
    with pytest.raises(ValueError, match="width must be positive"):
        spectral_density(flat_operator(A), 2).density(torch.zeros(1), width=-1.0)


def test_what_rounding_hides_is_in_the_error() -> None:
    """Small eigenvalues beside large ones: in float32 nothing is known of them."""
    n = 200
    for dtype, top in ((torch.float32, 1e4), (torch.float64, 1e12)):
        d = torch.cat([torch.full((5,), top), torch.linspace(1e-4, 1e-2, n - 5)]).to(dtype)
        Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(0))).Q
        matrix = ((Q * d.double()) @ Q.T).to(dtype)
        b = torch.randn(n, dtype=torch.float64, generator=generator(1))
        truth = (Q * d.double().rsqrt()) @ (Q.T @ b)
        try:
            found = matrix_function(flat_operator(matrix), torch.rsqrt, b.to(dtype))
        except ValueError:  # a Ritz value is negative by rounding: said as well
            continue
        missing = float((found.value.double() - truth).norm())
        assert missing <= float(found.standard_error.double().norm())


def test_functions_are_checked_and_change_nothing() -> None:
    density = spectral_density(flat_operator(POSITIVE), 4, generator=generator(0))
    nodes = density.nodes.clone()
    twice = density.mean_of(lambda x: x.mul_(2))
    assert torch.equal(density.nodes, nodes)
    oracles.assert_same(twice.value, 2 * density.mean_of(lambda x: x).value, 1e-12)
    for f in (lambda x: x.sum(), lambda x: x.sum(1), lambda x: x + 1j, lambda x: 3):
        with pytest.raises(TypeError, match="f must give a real number for each of"):
            density.mean_of(f)
    b = torch.ones(len(A)).double()
    with pytest.raises(TypeError, match="f must give a real number for each of"):
        matrix_function(flat_operator(POSITIVE), lambda x: x.sum(), b)
    X = torch.randn(60, 20, dtype=torch.float64, generator=generator(2))
    singular = spectral_density(flat_operator(X @ X.T), 3, generator=generator(0))
    with pytest.raises(ValueError, match="f is not finite at the eigenvalue"):
        singular.trace_of(lambda x: torch.where(x.abs() < 1e-9, torch.nan, x.log()))
    for call in (density.cumulative, density.distance_to):
        with pytest.raises(ValueError, match="a number is NaN"):
            call(torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="there are no eigenvalues"):
        density.distance_to(torch.zeros(0))


def test_atoms_at_zero_are_counted_at_zero() -> None:
    X = torch.randn(40, 3, dtype=torch.float64, generator=generator(3))
    density = spectral_density(flat_operator(X @ X.T), 40, generator=generator(0))
    found = density.cumulative(torch.tensor(0.0))
    assert abs(float(found.value) - 37 / 40) < 5 * float(found.standard_error)
    root = matrix_function(flat_operator(X @ X.T), torch.sqrt, torch.ones(40).double()).value
    truth = dense_function(X @ X.T, lambda v: v.clamp(min=0).sqrt()) @ torch.ones(40).double()
    oracles.assert_same(root, truth, 1e-6)


def test_vectors_of_any_size() -> None:
    b = torch.randn(len(A), generator=generator(4))
    f32 = flat_operator(POSITIVE.float())
    unit = matrix_function(f32, torch.sqrt, b).value
    for size in (1e30, 1e-30):
        found = matrix_function(f32, torch.sqrt, size * b).value
        assert oracles.relative_error(found / size, unit) < 1e-5
