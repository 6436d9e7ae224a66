"""Diagonals: the estimate against its own standard error, the exact one against the matrix."""

from __future__ import annotations

import math
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from secorder_func import (
    LinearOperator,
    exact_diagonal,
    hessian_operator,
    hutchinson_diagonal,
    probes,
)
from tests import oracles, problems
from tests.algorithms.matrices import LIKE, generator, operator, random_matrix

DISTRIBUTIONS: dict[str, Any] = {
    "rademacher": probes.rademacher,
    "normal": probes.normal,
    "sphere": probes.sphere,
    "sparse": probes.sparse_rademacher(0.3),
}
A = random_matrix(5)
OFF_DIAGONAL = A - A.diag().diag()


def _z_scores(estimate: Any) -> Tensor:
    return (oracles.flat(estimate.value) - A.diag()) / oracles.flat(estimate.standard_error)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_entry_is_within_five_standard_errors(name: str, seed: int) -> None:
    estimate = hutchinson_diagonal(
        operator(A), 500, generator=generator(seed), distribution=DISTRIBUTIONS[name]
    )
    assert (_z_scores(estimate).abs() < 5).all()
    assert (oracles.flat(estimate.standard_error) < 1.5).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_estimate_is_unbiased(name: str) -> None:
    values = torch.stack(
        [
            oracles.flat(
                hutchinson_diagonal(
                    operator(A), 10, generator=generator(s), distribution=DISTRIBUTIONS[name]
                ).value
            )
            for s in range(300)
        ]
    )
    error = values.std(0) / math.sqrt(300)
    assert ((values.mean(0) - A.diag()).abs() < 5 * error).all()


def test_the_standard_errors_are_those_of_repetitions() -> None:
    runs = [hutchinson_diagonal(operator(A), 10, generator=generator(s)) for s in range(200)]
    spread = torch.stack([oracles.flat(run.value) for run in runs]).var(0)
    reported = torch.stack([oracles.flat(run.standard_error) ** 2 for run in runs]).mean(0)
    # Five relative standard deviations of a variance over 200 repetitions.
    assert ((spread / reported - 1).abs() < 0.6).all()
    assert float((spread / reported).mean()) == pytest.approx(1.0, rel=0.2)


def test_the_standard_errors_are_those_of_the_formula_for_rademacher_probes() -> None:
    estimate = hutchinson_diagonal(operator(A), 4000, generator=generator(0))
    formula = (OFF_DIAGONAL.square().sum(1) / 4000).sqrt()
    assert oracles.relative_error(oracles.flat(estimate.standard_error), formula) < 0.1


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_a_diagonal_matrix_is_found_exactly(count: int) -> None:
    D = torch.diag(torch.arange(1.0, 11.0).double())
    estimate = hutchinson_diagonal(operator(D), count, generator=generator(0))
    oracles.assert_same(oracles.flat(estimate.value), D.diag(), 1e-14)
    if count > 1:
        assert (oracles.flat(estimate.standard_error) < 1e-13).all()


def test_the_standard_error_of_one_probe_is_infinite() -> None:
    estimate = hutchinson_diagonal(operator(A), 1)
    assert torch.isinf(oracles.flat(estimate.standard_error)).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 49, 1000])
def test_the_chunk_does_not_change_the_numbers(name: str, chunk_size: int) -> None:
    draw = DISTRIBUTIONS[name]
    whole = hutchinson_diagonal(operator(A), 50, generator=generator(3), distribution=draw)
    parts = hutchinson_diagonal(
        operator(A), 50, generator=generator(3), distribution=draw, chunk_size=chunk_size
    )
    oracles.assert_same(parts.value, whole.value, 1e-12)
    oracles.assert_same(parts.standard_error, whole.standard_error, 1e-11)


def test_mean_and_error_are_those_of_the_samples() -> None:
    vectors = probes.rademacher(probes.draw_seed(generator(4)), range(30), LIKE)
    rows = torch.cat([v.reshape(30, v.shape[1:].numel()) for v in optree.tree_leaves(vectors)], 1)
    samples = rows * (rows @ A)
    estimate = hutchinson_diagonal(operator(A), 30, generator=generator(4), chunk_size=7)
    oracles.assert_same(oracles.flat(estimate.value), samples.mean(0), 1e-12)
    expected = samples.std(0) / math.sqrt(30)
    oracles.assert_same(oracles.flat(estimate.standard_error), expected, 1e-12)


def test_value_and_error_are_trees_like_the_space() -> None:
    estimate = hutchinson_diagonal(operator(A), 3)
    for part in (estimate.value, estimate.standard_error):
        assert optree.tree_structure(part) == optree.tree_structure(LIKE)
        shapes = [leaf.shape for leaf in optree.tree_leaves(part)]
        assert shapes == [leaf.shape for leaf in optree.tree_leaves(LIKE)]
    assert estimate.num_matvecs == 3


@pytest.mark.parametrize("chunk_size", [1, 3, 20])
def test_at_most_a_chunk_of_probes_is_multiplied_at_once(chunk_size: int) -> None:
    sizes: list[int] = []
    hutchinson_diagonal(operator(A, sizes), 10, chunk_size=chunk_size)
    assert max(sizes) == min(chunk_size, 10)
    assert sum(sizes) == 10


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    runs = [
        oracles.flat(hutchinson_diagonal(operator(A), 5, generator=generator(s)).value)
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_diagonal_of_a_hessian_is_within_five_standard_errors() -> None:
    problem = problems.load("mlp_gelu")
    op = hessian_operator(problem.f, problem.params, *problem.args)
    truth = oracles.hessian(problem.f, problem.params, *problem.args).diag()
    estimate = hutchinson_diagonal(op, 300, generator=generator(0))
    scores = (oracles.flat(estimate.value) - truth) / oracles.flat(estimate.standard_error)
    assert (scores.abs() < 5).all()


# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 10, 11])
def test_the_exact_diagonal_is_that_of_the_matrix(chunk_size: int | None, symmetric: bool) -> None:
    B = random_matrix(6, symmetric=symmetric)
    diagonal = exact_diagonal(operator(B), chunk_size=chunk_size)
    oracles.assert_same(diagonal, oracles.like(B.diag(), LIKE), 1e-13)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize(
    "name", ["mlp_gelu", "cnn_batchnorm_train", "nested_tree", "tied_embeddings"]
)
def test_the_exact_diagonal_of_a_hessian_equals_the_oracle(
    name: str, chunk_size: int | None
) -> None:
    problem = problems.load(name)
    op = hessian_operator(problem.f, problem.params, *problem.args)
    H = oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    diagonal = exact_diagonal(op, chunk_size=chunk_size)
    oracles.assert_same(diagonal, oracles.like(H.diag(), problem.params))


def test_the_exact_diagonal_keeps_the_dtype_of_every_leaf() -> None:
    like = {"single": torch.zeros(2), "double": torch.zeros(2).double()}
    op = LinearOperator(lambda v: optree.tree_map(lambda leaf: 3 * leaf, v), like)
    diagonal = exact_diagonal(op)
    assert (diagonal["single"].dtype, diagonal["double"].dtype) == (torch.float32, torch.float64)
    assert oracles.flat(diagonal).tolist() == [3.0] * 4


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_product_is_refused(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"^hutchinson_diagonal: num_matvecs must be at least 1, got {count}"
    ):
        hutchinson_diagonal(operator(A), count)


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_of_less_than_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        hutchinson_diagonal(operator(A), 3, chunk_size=size)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        exact_diagonal(operator(A), chunk_size=size)


def test_a_complex_space_is_refused() -> None:
    op = LinearOperator(lambda v: v, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^hutchinson_diagonal: .*real, got torch\.complex64"):
        hutchinson_diagonal(op, 3)
    with pytest.raises(TypeError, match=r"^exact_diagonal: .*real, got torch\.complex64"):
        exact_diagonal(op)
