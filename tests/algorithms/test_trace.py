"""Traces: the estimate against its own standard error, the exact one against the matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from secorder_func import (
    Estimate,
    LinearOperator,
    exact_trace,
    ggn_operator,
    hessian_operator,
    hutchinson_trace,
    probes,
)
from tests import oracles, problems
from tests.algorithms.matrices import N, generator, operator, random_matrix

DISTRIBUTIONS: dict[str, Any] = {
    "rademacher": probes.rademacher,
    "normal": probes.normal,
    "sphere": probes.sphere,
    "sparse": probes.sparse_rademacher(0.3),
}
A = random_matrix()


def _off_diagonal_squares(matrix: torch.Tensor) -> float:
    symmetric = (matrix + matrix.T) / 2
    return float((symmetric - symmetric.diag().diag()).square().sum())


# --------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_within_five_standard_errors(name: str, seed: int) -> None:
    estimate = hutchinson_trace(
        operator(A), 400, generator=generator(seed), distribution=DISTRIBUTIONS[name]
    )
    assert abs(float(estimate.value - A.trace())) < 5 * float(estimate.standard_error)
    assert float(estimate.standard_error) < 0.2 * float(A.norm())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_estimate_is_unbiased(name: str) -> None:
    values = torch.stack(
        [
            hutchinson_trace(
                operator(A), 10, generator=generator(seed), distribution=DISTRIBUTIONS[name]
            ).value
            for seed in range(500)
        ]
    )
    assert abs(float(values.mean() - A.trace())) < 5 * float(values.std()) / math.sqrt(500)


def test_a_matrix_that_is_not_symmetric_has_the_trace_of_its_symmetric_part() -> None:
    B = random_matrix(1, symmetric=False)
    estimate = hutchinson_trace(operator(B), 2000, generator=generator(0))
    assert abs(float(estimate.value - B.trace())) < 5 * float(estimate.standard_error)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_the_standard_error_is_that_of_repetitions(count: int) -> None:
    runs = [hutchinson_trace(operator(A), count, generator=generator(s)) for s in range(200)]
    spread = float(torch.stack([run.value for run in runs]).var())
    reported = float(torch.stack([run.standard_error**2 for run in runs]).mean())
    # The relative standard deviation of a variance over 200 repetitions is about sqrt(2 / 200).
    assert spread == pytest.approx(reported, rel=5 * math.sqrt(2 / 200) + 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_is_that_of_the_formula_for_rademacher_probes(seed: int) -> None:
    estimate = hutchinson_trace(operator(A), 4000, generator=generator(seed))
    formula = math.sqrt(2 * _off_diagonal_squares(A) / 4000)
    assert float(estimate.standard_error) == pytest.approx(formula, rel=0.1)


def test_the_standard_error_is_that_of_the_formula_for_normal_probes() -> None:
    estimate = hutchinson_trace(
        operator(A), 4000, generator=generator(0), distribution=probes.normal
    )
    formula = math.sqrt(2 * float(A.square().sum()) / 4000)
    assert float(estimate.standard_error) == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize("count", [2, 64, 200])
def test_the_standard_error_shrinks_with_the_square_root_of_the_count(count: int) -> None:
    runs = [hutchinson_trace(operator(A), count, generator=generator(s)) for s in range(100)]
    mean_square = float(torch.stack([run.standard_error**2 for run in runs]).mean())
    assert mean_square == pytest.approx(2 * _off_diagonal_squares(A) / count, rel=0.5)


def test_one_probe_traces_a_diagonal_matrix_exactly() -> None:
    D = torch.diag(torch.arange(1.0, 11.0).double())
    estimate = hutchinson_trace(operator(D), 1, generator=generator(0))
    assert float(estimate.value) == pytest.approx(55.0, rel=1e-14)


def test_the_standard_error_of_one_probe_is_infinite() -> None:
    assert hutchinson_trace(operator(A), 1).standard_error == math.inf


@pytest.mark.parametrize("count", [2, 3, 100])
def test_a_diagonal_matrix_has_no_error(count: int) -> None:
    D = torch.diag(torch.arange(1.0, 11.0).double())
    estimate = hutchinson_trace(operator(D), count, generator=generator(0))
    assert float(estimate.value) == pytest.approx(55.0, rel=1e-14)
    assert float(estimate.standard_error) < 1e-13


# ----------------------------------------------------------------------------- chunks and generators


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 50, 1000])
def test_the_chunk_does_not_change_the_numbers(name: str, chunk_size: int) -> None:
    draw = DISTRIBUTIONS[name]
    whole = hutchinson_trace(operator(A), 50, generator=generator(3), distribution=draw)
    parts = hutchinson_trace(
        operator(A), 50, generator=generator(3), distribution=draw, chunk_size=chunk_size
    )
    assert float(parts.value) == pytest.approx(float(whole.value), rel=1e-13)
    assert float(parts.standard_error) == pytest.approx(float(whole.standard_error), rel=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 20])
def test_at_most_a_chunk_of_probes_is_multiplied_at_once(chunk_size: int) -> None:
    sizes: list[int] = []
    hutchinson_trace(operator(A, sizes), 10, chunk_size=chunk_size)
    assert max(sizes) == min(chunk_size, 10)
    assert sum(sizes) == 10


def test_the_count_of_products_is_reported() -> None:
    assert hutchinson_trace(operator(A), 13).num_matvecs == 13


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    values = [hutchinson_trace(operator(A), 5, generator=generator(s)).value for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_a_generator_moves_on() -> None:
    g = generator(0)
    first, second = (hutchinson_trace(operator(A), 5, generator=g).value for _ in range(2))
    assert first != second


def test_a_generator_takes_one_value_however_many_probes() -> None:
    g, h = generator(0), generator(0)
    hutchinson_trace(operator(A), 5, generator=g)
    hutchinson_trace(operator(A), 500, generator=h)
    assert torch.equal(g.get_state(), h.get_state())


def test_without_a_generator_the_global_seed_decides() -> None:
    torch.manual_seed(1)
    first = hutchinson_trace(operator(A), 5).value
    torch.manual_seed(1)
    assert hutchinson_trace(operator(A), 5).value == first


def test_with_a_generator_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    hutchinson_trace(operator(A), 5, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_more_probes_begin_with_the_probes_of_fewer() -> None:
    forms: list[torch.Tensor] = []

    def kept(vectors: Any) -> torch.Tensor:
        rows = torch.cat([v.reshape(len(v), -1) for v in oracles.leaves_of(vectors)], 1)
        forms.append(rows)
        return rows.sum(1)

    op = LinearOperator(lambda v: v, torch.zeros(6), quadratic=kept)
    hutchinson_trace(op, 3, generator=generator(0), chunk_size=None)
    hutchinson_trace(op, 8, generator=generator(0), chunk_size=None)
    assert torch.equal(forms[1][:3], forms[0])


def test_a_distribution_of_the_users_own_is_used() -> None:
    def units(seed: int, rows: range, like: Any) -> Any:
        return math.sqrt(4) * torch.eye(4)[[k % 4 for k in rows]]

    D = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    op = LinearOperator(lambda v: D @ v, torch.zeros(4))
    estimate = hutchinson_trace(op, 4, distribution=units)
    assert float(estimate.value) == pytest.approx(10.0)


def test_cheap_quadratic_forms_are_used_instead_of_products() -> None:
    def no_products(v: Any) -> Any:
        raise AssertionError("a product was made")

    op = LinearOperator(
        no_products, torch.zeros(4), quadratic=lambda vectors: 3 * vectors.square().sum(1)
    )
    assert float(hutchinson_trace(op, 5).value) == pytest.approx(12.0)
    assert float(exact_trace(op)) == pytest.approx(12.0)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["mlp_tanh", "softmax_regression", "tied_embeddings"])
def test_traces_of_curvature_are_within_five_standard_errors(name: str, kind: str) -> None:
    problem = problems.load(name)
    if kind == "hessian":
        op = hessian_operator(problem.f, problem.params, *problem.args)
        truth = oracles.hessian(problem.f, problem.params, *problem.args).trace()
    else:
        op = ggn_operator(problem.model_fn, problem.loss_fn, problem.params, *problem.args)
        truth = oracles.ggn(
            problem.model_fn, problem.loss_fn, problem.params, *problem.args
        ).trace()
    estimate = hutchinson_trace(op, 200, generator=generator(1))
    assert abs(float(estimate.value - truth)) < 5 * float(estimate.standard_error)
    assert float(estimate.standard_error) < abs(float(truth))


def test_vmap_of_an_estimate_over_params_equals_a_loop() -> None:
    f = lambda p: p.prod() ** 2 + (p**4).sum()  # noqa: E731
    points = torch.randn(3, 4).double()

    def estimate(p: torch.Tensor) -> torch.Tensor:
        return hutchinson_trace(hessian_operator(f, p), 6, generator=generator(0)).value

    together = torch.func.vmap(estimate, randomness="same")(points)
    oracles.assert_same(together, torch.stack([estimate(p) for p in points]), 1e-12)


def test_the_gradient_of_an_estimate_is_that_of_its_quadratic_forms() -> None:
    p = torch.tensor([1.0, 2.0]).double().requires_grad_()
    estimate = hutchinson_trace(hessian_operator(lambda p: (p**4).sum(), p), 3)
    (slope,) = torch.autograd.grad(estimate.value, p)
    oracles.assert_same(slope, 24 * p.detach())
    assert not estimate.standard_error.requires_grad


# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 10, 11])
def test_the_exact_trace_is_that_of_the_matrix(chunk_size: int | None, symmetric: bool) -> None:
    B = random_matrix(2, symmetric=symmetric)
    trace = exact_trace(operator(B), chunk_size=chunk_size)
    assert trace.shape == ()
    assert float(trace) == pytest.approx(float(B.trace()), rel=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize(
    "name", ["mlp_gelu", "cnn_batchnorm_train", "nested_tree", "tied_embeddings"]
)
def test_the_exact_trace_of_a_hessian_equals_the_oracle(name: str, chunk_size: int | None) -> None:
    problem = problems.load(name)
    op = hessian_operator(problem.f, problem.params, *problem.args)
    H = oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    error = abs(float(exact_trace(op, chunk_size=chunk_size) - H.trace()))
    assert error < 1e-10 * float(H.diag().abs().sum())


def test_the_exact_trace_multiplies_every_unit_vector_once() -> None:
    sizes: list[int] = []
    exact_trace(operator(A, sizes), chunk_size=4)
    assert sizes == [4, 4, 2]
    assert sum(sizes) == N


def test_the_exact_trace_of_an_empty_space_is_zero() -> None:
    assert exact_trace(LinearOperator(lambda v: v, torch.zeros(0))) == 0


# ----------------------------------------------------------------------------------------- results


def test_an_estimate_prints_its_error_and_cost() -> None:
    estimate = hutchinson_trace(operator(torch.eye(10).double()), 4)
    assert str(estimate) == "10 ± 0 (4 products)"


def test_an_estimate_is_frozen() -> None:
    with pytest.raises(AttributeError):
        hutchinson_trace(operator(A), 2).value = 0  # type: ignore[misc]
    assert isinstance(hutchinson_trace(operator(A), 2), Estimate)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_product_is_refused(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"^hutchinson_trace: num_matvecs must be at least 1, got {count}"
    ):
        hutchinson_trace(operator(A), count)


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_of_less_than_one_is_refused(size: int) -> None:
    for call in (lambda: hutchinson_trace(operator(A), 3, chunk_size=size),):
        with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
            call()
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        exact_trace(operator(A), chunk_size=size)


def test_a_complex_space_is_refused() -> None:
    op = LinearOperator(lambda v: v, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^hutchinson_trace: .*real, got torch\.complex64"):
        hutchinson_trace(op, 3)
    with pytest.raises(TypeError, match=r"^exact_trace: .*real, got torch\.complex64"):
        exact_trace(op)
