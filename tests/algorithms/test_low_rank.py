"""Hutch++, XTrace, XNysTrace, XDiag: unbiased, with intervals that hold, and as accurate as the theory says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import (
    LinearOperator,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xnystrace,
    xtrace,
)
from tests import oracles, problems
from tests.algorithms.matrices import generator, operator, random_matrix, with_spectrum

SEEDS = 200
TRACES: dict[str, Callable[..., Any]] = {
    "hutchpp": hutchpp_trace,
    "xtrace": xtrace,
    "xnystrace": xnystrace,
}
FALLING = with_spectrum([0.7**i for i in range(80)])
SPECTRA = {
    "exponential": FALLING,
    "polynomial": with_spectrum([(i + 1.0) ** -1.5 for i in range(150)]),
    "flat": with_spectrum([1 + i / 100 for i in range(100)]),
    "step": with_spectrum([1.0] * 10 + [1e-3] * 90),
}
INDEFINITE = with_spectrum([(-1) ** i / (i + 1) for i in range(100)])


def flat_operator(matrix: Tensor, *, symmetric: bool = True) -> LinearOperator:
    """Return the operator of a matrix on vectors."""
    like = torch.zeros(len(matrix), dtype=matrix.dtype)
    return LinearOperator(
        lambda v: matrix @ v, like, matmat=lambda rows: rows @ matrix.T, symmetric=symmetric
    )


def runs(estimate: Callable[..., Any], matrix: Tensor, count: int) -> list[Any]:
    op = flat_operator(matrix)
    return [estimate(op, count, generator=generator(seed)) for seed in range(SEEDS)]


def root_mean_square(values: Tensor, truth: Tensor) -> float:
    return float((values - truth).square().mean().sqrt())


def cases() -> list[Any]:
    found = [(name, m) for m in SPECTRA.items() for name in TRACES]
    found += [(name, ("indefinite", INDEFINITE)) for name in ("hutchpp", "xtrace")]
    return [pytest.param(TRACES[n], m, id=f"{n}-{label}") for n, (label, m) in found]


@pytest.mark.parametrize(("estimate", "matrix"), cases())
def test_the_interval_covers_the_truth_as_often_as_it_says(estimate: Any, matrix: Tensor) -> None:
    truth = matrix.trace()
    found = runs(estimate, matrix, 48)
    covered = [bool(low <= truth <= high) for low, high in (e.interval(0.95) for e in found)]
    assert 0.89 <= sum(covered) / SEEDS <= 0.995
    values = torch.stack([e.value for e in found])
    spread = root_mean_square(values, truth)
    stated = float(torch.stack([e.standard_error**2 for e in found]).mean().sqrt())
    assert 0.75 < stated / spread < 2.0  # heavy tails of small sketches overstate it


@pytest.mark.parametrize(("estimate", "matrix"), cases())
def test_the_estimate_is_unbiased(estimate: Any, matrix: Tensor) -> None:
    values = torch.stack([e.value for e in runs(estimate, matrix, 12)])
    assert abs(float(values.mean() - matrix.trace())) < 4.5 * float(values.std()) / math.sqrt(SEEDS)


@pytest.mark.parametrize("count", [12, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_every_entry_of_xdiag_is_covered_as_often_as_it_says(name: str, count: int) -> None:
    matrix = SPECTRA[name]
    truth = matrix.diag()
    found = runs(xdiag, matrix, count)
    covered = torch.stack(
        [(lo <= truth) & (truth <= hi) for lo, hi in (e.interval() for e in found)]
    )
    assert 0.89 <= float(covered.double().mean()) <= 0.99
    mean = torch.stack([e.value for e in found])
    assert ((mean.mean(0) - truth).abs() < 5 * mean.std(0) / math.sqrt(SEEDS)).all()


@pytest.mark.parametrize(("name", "factor"), [("hutchpp", 5), ("xtrace", 20), ("xnystrace", 20)])
def test_sketches_beat_hutchinson_where_eigenvalues_decay(name: str, factor: float) -> None:
    truth = FALLING.trace()
    plain = torch.stack([e.value for e in runs(hutchinson_trace, FALLING, 40)])
    better = torch.stack([e.value for e in runs(TRACES[name], FALLING, 40)])
    assert factor * root_mean_square(better, truth) < root_mean_square(plain, truth)


def test_xdiag_beats_bekas_where_eigenvalues_decay() -> None:
    truth = FALLING.diag()
    plain = torch.stack([e.value for e in runs(hutchinson_diagonal, FALLING, 40)])
    better = torch.stack([e.value for e in runs(xdiag, FALLING, 40)])
    assert 20 * root_mean_square(better, truth) < root_mean_square(plain, truth)


@pytest.mark.parametrize(
    ("name", "rate"), [("hutchpp", 1 / 3), ("xtrace", 1 / 2), ("xnystrace", 1)]
)
def test_the_error_falls_at_the_rate_of_the_theory(name: str, rate: float) -> None:
    """A third, a half, all of the products sketch; the eigenvalues left fall by 0.7 a vector."""
    truth = FALLING.trace()
    errors = [
        root_mean_square(torch.stack([e.value for e in runs(TRACES[name], FALLING, m)]), truth)
        for m in (12, 36)
    ]
    found = (errors[1] / errors[0]) ** (1 / 24)
    assert found == pytest.approx(0.7**rate, abs=0.06)


@pytest.mark.parametrize("name", [*TRACES, "xdiag"])
def test_a_matrix_of_low_rank_is_found_exactly(name: str) -> None:
    X = torch.randn(60, 3, dtype=torch.float64, generator=generator(1))
    matrix = X @ X.T
    estimate = {**TRACES, "xdiag": xdiag}[name](flat_operator(matrix), 24, generator=generator(0))
    truth = matrix.diag() if name == "xdiag" else matrix.trace()
    # What XNysTrace inverts is raised by some rounding.
    tolerance = 1e-9 if name == "xnystrace" else 1e-12
    assert oracles.relative_error(estimate.value, truth) < tolerance
    assert float(estimate.standard_error.abs().max()) < 1e-6 * float(matrix.trace())


def test_traces_need_no_symmetry() -> None:
    matrix = torch.randn(60, 60, dtype=torch.float64, generator=generator(2))
    matrix = matrix * (0.8 ** torch.arange(60).double())
    op = flat_operator(matrix, symmetric=False)
    for estimate in (hutchpp_trace, xtrace):
        values = torch.stack([estimate(op, 20, generator=generator(s)).value for s in range(SEEDS)])
        bias = abs(float(values.mean() - matrix.trace()))
        assert bias < 4.5 * float(values.std()) / math.sqrt(SEEDS)
    with pytest.raises(ValueError, match=r"^xdiag: the operator is not symmetric"):
        xdiag(op, 20)
    with pytest.raises(ValueError, match=r"^xnystrace: the operator is not symmetric"):
        xnystrace(op, 20)


@pytest.mark.parametrize("name", [*TRACES, "xdiag"])
def test_with_as_many_products_as_entries_it_is_exact(name: str) -> None:
    matrix = with_spectrum([float(i + 1) for i in range(10)])
    sizes: list[int] = []
    op = operator(matrix, sizes)
    estimate = {**TRACES, "xdiag": xdiag}[name](op, 50)
    truth = matrix.diag() if name == "xdiag" else matrix.trace()
    oracles.assert_same(oracles.flat(estimate.value), oracles.flat(truth), 1e-13)
    assert not oracles.flat(estimate.standard_error).any()
    assert estimate.num_matvecs == sum(sizes) == 10


@pytest.mark.parametrize("name", [*TRACES, "xdiag"])
@pytest.mark.parametrize("count", [4, 7, 12, 13])
def test_the_products_that_were_made_are_counted(name: str, count: int) -> None:
    made: list[int] = []

    def matmat(rows: Tensor) -> Tensor:
        made.append(len(rows))
        return rows @ FALLING

    op = LinearOperator(lambda v: FALLING @ v, FALLING[0], matmat=matmat)
    estimate = {**TRACES, "xdiag": xdiag}[name](op, count, chunk_size=3)
    assert estimate.num_matvecs == sum(made) <= count
    assert estimate.num_matvecs >= count - 1
    assert max(made) <= 3


@pytest.mark.parametrize("name", [*TRACES, "xdiag"])
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_the_chunk_does_not_change_the_numbers(name: str, chunk_size: int | None) -> None:
    estimate = {**TRACES, "xdiag": xdiag}[name]
    op = flat_operator(SPECTRA["polynomial"])
    whole = estimate(op, 24, generator=generator(3))
    parts = estimate(op, 24, generator=generator(3), chunk_size=chunk_size)
    oracles.assert_same(parts.value, whole.value, 1e-10)
    oracles.assert_same(parts.standard_error, whole.standard_error, 1e-6)


def test_the_zero_matrix_has_trace_zero() -> None:
    op = LinearOperator(torch.zeros_like, torch.zeros(40).double(), matmat=torch.zeros_like)
    for estimate in (*TRACES.values(), xdiag):
        found = estimate(op, 12)
        assert float(found.value.abs().max()) < 1e-200
        assert float(found.standard_error.abs().max()) < 1e-200


def test_a_negative_operator_is_refused_by_xnystrace() -> None:
    with pytest.raises(ValueError, match=r"^xnystrace: the operator is not positive semidefinite"):
        xnystrace(flat_operator(-FALLING), 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*TRACES, "xdiag"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    matrix = SPECTRA["polynomial"]
    narrow = matrix.to(dtype)
    like = torch.zeros(len(matrix), dtype=dtype)
    op = LinearOperator(lambda v: (narrow.float() @ v.float()).to(dtype), like)
    estimate = {**TRACES, "xdiag": xdiag}[name](op, 60, generator=generator(0))
    truth = matrix.diag() if name == "xdiag" else matrix.trace()
    assert estimate.value.dtype == estimate.standard_error.dtype == dtype
    assert oracles.relative_error(estimate.value, truth) < (0.05 if dtype == torch.float32 else 0.1)


def test_trees_with_leaves_of_two_dtypes() -> None:
    like = {"a": torch.zeros(30), "b": torch.zeros(20).double(), "none": torch.zeros(0, 3)}
    scales = {"a": torch.arange(30.0), "b": torch.arange(20.0).double(), "none": torch.zeros(0, 3)}
    op = LinearOperator(lambda v: {name: scales[name] * v[name] for name in v}, like)
    found = xdiag(op, 40, generator=generator(0))
    assert {n: (leaf.shape, leaf.dtype) for n, leaf in found.value.items()} == {
        n: (leaf.shape, leaf.dtype) for n, leaf in like.items()
    }
    errors = oracles.flat(found.standard_error)
    assert ((oracles.flat(found.value) - oracles.flat(scales)).abs() < 6 * errors + 1e-4).all()
    assert abs(float(xtrace(op, 40, generator=generator(0)).value) - 435 - 190) < 60


@pytest.mark.parametrize("estimate", [hutchpp_trace, xtrace])
def test_the_trace_of_a_hessian(estimate: Any) -> None:
    problem = problems.load("mlp_gelu")
    op = hessian_operator(problem.f, problem.params, *problem.args)
    truth = oracles.hessian(problem.f, problem.params, *problem.args).trace()
    with torch.no_grad():
        found = estimate(op, 24, generator=generator(0))
    assert abs(float(found.value - truth)) < 5 * float(found.standard_error)
    assert 0 < float(found.standard_error) < 0.5 * abs(float(truth))


def test_one_pair_of_products_says_nothing_of_its_error() -> None:
    for estimate in (xtrace, xdiag):
        assert torch.isinf(estimate(flat_operator(FALLING), 2).standard_error).all()
    assert math.isinf(hutchpp_trace(flat_operator(FALLING), 1).standard_error)


def test_an_operator_with_a_matrix_a_sample_is_refused() -> None:
    from secorder_func import per_sample_hessian_operator

    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 2, torch.ones(2), torch.ones(3, 2))
    for estimate in (*TRACES.values(), xdiag):
        with pytest.raises(TypeError, match="must be one matrix, got an operator with a matrix a"):
            estimate(op, 4)


def test_a_random_matrix_without_decay() -> None:
    """The worst case for sketches: as good as Hutchinson up to a constant, and honest about it."""
    matrix = random_matrix()
    for estimate in (hutchpp_trace, xtrace):
        found = [estimate(operator(matrix), 8, generator=generator(s)) for s in range(SEEDS)]
        covered = [bool(lo <= matrix.trace() <= hi) for lo, hi in (e.interval() for e in found)]
        assert 0.88 <= sum(covered) / SEEDS <= 1.0


@pytest.mark.parametrize(("active", "n", "count"), [(4, 9, 8), (6, 40, 12)])
def test_xdiag_is_unbiased_where_signs_repeat(active: int, n: int, count: int) -> None:
    """Random signs on few active coordinates often depend on each other: the sketch has less than full rank."""
    d = torch.zeros(n).double()
    d[:active] = 1
    op = LinearOperator(lambda v: d * v, d)
    runs = 2000
    values = torch.stack(
        [xdiag(op, count, generator=generator(s)).value[:active].mean() for s in range(runs)]
    )
    assert abs(float(values.mean()) - 1) < 4.5 * float(values.std()) / math.sqrt(runs)
    assert float(values.std()) > 0.01


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", [*TRACES, "xdiag", "hutchinson_trace", "hutchinson_diagonal"])
def test_errors_neither_vanish_nor_overflow_in_float32(name: str, scale: float) -> None:
    methods = {
        **TRACES,
        "xdiag": xdiag,
        "hutchinson_trace": hutchinson_trace,
        "hutchinson_diagonal": hutchinson_diagonal,
    }
    matrix = SPECTRA["polynomial"].float()
    op = flat_operator(scale * matrix)
    small = methods[name](op, 24, generator=generator(0)).standard_error.double() / scale
    truth = methods[name](flat_operator(matrix), 24, generator=generator(0)).standard_error.double()
    assert oracles.relative_error(small, truth) < 0.05


def test_errors_of_half_precision_are_those_of_the_samples() -> None:
    d = 1e-4 * torch.arange(1, 41).double()
    matrix = torch.diag(d) + 1e-5 * with_spectrum([1.0] * 20 + [-1.0] * 20)
    half = matrix.half()
    op = LinearOperator(lambda v: (half.float() @ v.float()).half(), half[0])
    found = hutchinson_diagonal(op, 200, generator=generator(0)).standard_error
    wide = hutchinson_diagonal(flat_operator(matrix), 200, generator=generator(0)).standard_error
    assert oracles.relative_error(found, wide) < 0.1


def test_products_with_nan_are_refused() -> None:
    op = LinearOperator(lambda v: v * math.nan, torch.zeros(40))
    for estimate in (*TRACES.values(), xdiag):
        with pytest.raises(ArithmeticError, match="a product has NaN or infinite entries"):
            estimate(op, 12)
