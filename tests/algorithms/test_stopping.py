"""Tolerances instead of counts, and estimates that go on where another one stopped."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secorder_func import (
    Estimate,
    LinearOperator,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_squared_frobenius_norm,
    hutchinson_squared_row_norms,
    hutchinson_trace,
    hutchpp_trace,
    probes,
    xdiag,
    xnystrace,
    xtrace,
)
from secorder_func.errors import ConvergenceWarning
from tests import oracles, problems
from tests.algorithms.matrices import generator, with_spectrum
from tests.algorithms.test_low_rank import flat_operator

ESTIMATORS: dict[str, Callable[..., Any]] = {
    "hutchinson_trace": hutchinson_trace,
    "hutchpp_trace": hutchpp_trace,
    "xtrace": xtrace,
    "xnystrace": xnystrace,
    "hutchinson_diagonal": hutchinson_diagonal,
    "xdiag": xdiag,
    "squared_frobenius_norm": hutchinson_squared_frobenius_norm,
    "squared_row_norms": hutchinson_squared_row_norms,
}
A = with_spectrum([(i + 1.0) ** -1.0 for i in range(200)])
TRUTHS = {
    "diagonal": A.diag(),
    "xdiag": A.diag(),
    "norm": A.square().sum(),
    "row_norms": A.square().sum(1),
}


WAITS = ("_local_scalar_dense", "nonzero", "_linalg_check_errors")


def truth_of(name: str) -> torch.Tensor:
    return next((t for end, t in TRUTHS.items() if name.endswith(end)), A.trace())


# --------------------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_tolerance_is_met(name: str) -> None:
    truth = truth_of(name)
    rtol = 0.05 if truth.ndim == 0 else 0.2
    met = covered = 0
    for seed in range(40):
        found = ESTIMATORS[name](
            flat_operator(A), rtol=rtol, max_matvecs=100_000, generator=generator(seed)
        )
        assert found.converged
        met += float((found.value - truth).norm()) <= rtol * float(truth.norm())
        low, high = found.interval()
        covered += float(((low <= truth) & (truth <= high)).double().mean())
    assert met >= 38
    assert covered >= 0.85 * 40


def test_stopping_does_not_happen_by_coincidence() -> None:
    """Of 400 runs at most 5 % may stop with the truth outside of what they promise."""
    matrix = with_spectrum([1.0] * 5 + [0.01] * 95)
    op, truth = flat_operator(matrix), matrix.trace()
    wrong = 0
    for seed in range(400):
        found = hutchinson_trace(op, rtol=0.25, max_matvecs=4000, generator=generator(seed))
        wrong += abs(float(found.value - truth)) > 0.25 * float(found.value)
    assert wrong <= 20


def test_a_tighter_tolerance_takes_more_products() -> None:
    spent = [
        hutchinson_trace(
            flat_operator(A), rtol=rtol, max_matvecs=10**6, generator=generator(0)
        ).num_matvecs
        for rtol in (0.2, 0.1, 0.05)
    ]
    assert 16 <= spent[0] < spent[1] < spent[2]
    assert spent[2] / spent[1] == pytest.approx(4, rel=0.7)


def test_an_absolute_tolerance() -> None:
    matrix = with_spectrum([1.0, -1.0] * 30)  # of trace zero, so that no relative one can be met
    found = hutchinson_trace(flat_operator(matrix), atol=1.0, max_matvecs=10**5)
    assert found.converged
    assert abs(float(found.value)) < 1.0


def test_a_diagonal_matrix_stops_at_the_first_look() -> None:
    op = LinearOperator(lambda v: torch.arange(9.0) * v, torch.zeros(9))
    found = hutchinson_trace(op, rtol=1e-3)
    assert (found.num_matvecs, float(found.value)) == (16, 36.0)


def test_a_tolerance_that_is_not_met_is_a_warning() -> None:
    with pytest.warns(ConvergenceWarning, match=r"not within the tolerance after 40 products"):
        found = hutchinson_trace(flat_operator(A), rtol=1e-6, max_matvecs=40)
    assert (found.converged, found.num_matvecs) == (False, 40)
    assert abs(float(found.value - A.trace())) < 6 * float(found.standard_error)


def test_by_default_there_are_no_more_products_than_entries() -> None:
    with pytest.warns(ConvergenceWarning):
        found = hutchinson_trace(flat_operator(A), rtol=1e-6)
    assert found.num_matvecs == 200
    exact = xtrace(flat_operator(A), rtol=1e-12)
    assert (exact.converged, exact.num_matvecs) == (True, 200)
    assert oracles.relative_error(exact.value, A.trace()) < 1e-13


def test_the_device_is_waited_for_at_looks_only() -> None:
    """Reading a number of a tensor is what makes a GPU and its host wait for each other."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.name()
            Reads.count += any(word in name for word in WAITS)
            return func(*args, **(kwargs or {}))

    for name, estimate in ESTIMATORS.items():
        for options in ({"num": 64}, {"rtol": 1e-9, "max_matvecs": 128}):
            Reads.count = 0
            count = options.pop("num", None)
            args = () if count is None else (count,)
            with Reads():
                if count:
                    estimate(flat_operator(A), *args, generator=generator(0))
                else:
                    with pytest.warns(ConvergenceWarning):
                        estimate(flat_operator(A), generator=generator(0), **options)
            looks = 1 if count else 4
            assert Reads.count <= 1 + 8 * looks, name  # one is the seed; none a product


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("stops", [(12, 40), (13, 29, 64)])
def test_going_on_gives_the_numbers_of_one_run(
    name: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    estimate, op = ESTIMATORS[name], flat_operator(A)
    whole = estimate(op, stops[-1], generator=generator(3))
    part: Any = None
    for stop in stops:
        part = estimate(op, stop, generator=generator(3), resume=part, chunk_size=5)
        part.save(tmp_path / "estimate.pt")
        part = Estimate.load(tmp_path / "estimate.pt")
    oracles.assert_same(part.value, whole.value, 1e-9)
    oracles.assert_same(part.standard_error, whole.standard_error, 1e-6)
    for field in ("num_matvecs", "degrees_of_freedom", "converged"):
        assert getattr(part, field) == getattr(whole, field)


@pytest.mark.parametrize("stops", [(5, 37, 72), (16, 128), (100, 300), (24, 25, 26, 200)])
@pytest.mark.parametrize("chunk_size", [3, "auto", None])
def test_propagated_forms_are_grouped_as_in_one_run(
    stops: tuple[int, ...], chunk_size: Any
) -> None:
    problem = problems.load("mlp_tanh")
    op = hessian_operator(problem.f, problem.params, *problem.args)
    whole = hutchinson_trace(op, stops[-1], generator=generator(1))
    part: Any = None
    for stop in stops:
        part = hutchinson_trace(
            op, stop, generator=generator(1), resume=part, chunk_size=chunk_size
        )
    assert part.by_propagation
    assert whole.by_propagation
    oracles.assert_same(part.value, whole.value, 1e-12)
    oracles.assert_same(part.standard_error, whole.standard_error, 1e-10)
    assert part.degrees_of_freedom == whole.degrees_of_freedom >= 4


def test_a_tolerance_goes_on_from_an_estimate() -> None:
    op = flat_operator(A)
    whole = hutchinson_trace(op, rtol=0.05, max_matvecs=10**5, generator=generator(5))
    with pytest.warns(ConvergenceWarning):
        part = hutchinson_trace(op, rtol=0.05, max_matvecs=16, generator=generator(5))
    after = hutchinson_trace(op, rtol=0.05, max_matvecs=10**5, resume=part)
    assert after.converged
    assert after.num_matvecs == pytest.approx(whole.num_matvecs, rel=0.6)
    assert abs(float(after.value - A.trace())) < 0.05 * float(after.value)


def test_nothing_is_multiplied_twice() -> None:
    for estimate in ESTIMATORS.values():
        made: list[int] = []

        def matmat(rows: torch.Tensor, made: list[int] = made) -> torch.Tensor:
            made.append(len(rows))
            return rows @ A

        op = LinearOperator(lambda v: A @ v, A[0], matmat=matmat)
        part = estimate(op, 12)
        after = estimate(op, 24, resume=part)
        assert sum(made) == after.num_matvecs == 24


def test_trees_are_saved_and_loaded(tmp_path: Path) -> None:
    Pair = namedtuple("Pair", ["left", "right"])
    plain = {"a": torch.ones(2), "b": (torch.zeros(()), [torch.ones(1, 2)])}
    Estimate(plain, plain, 3).save(tmp_path / "plain")
    loaded = Estimate.load(tmp_path / "plain")
    oracles.assert_same(loaded.value, plain, 0.0)
    odd = Pair(torch.ones(2), torch.zeros(1))
    Estimate(odd, odd, 3).save(tmp_path / "odd")
    oracles.assert_same(Estimate.load(tmp_path / "odd", like=odd).value, odd, 0.0)
    with pytest.raises(ValueError, match=r"Pass like=, a tree of its structure"):
        Estimate.load(tmp_path / "odd")


def test_a_failed_save_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "estimate"
    Estimate(torch.ones(()), torch.ones(()), 1).save(path)
    before = path.read_bytes()

    def fails(*args: Any) -> None:
        args[1].write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        Estimate(torch.zeros(()), torch.ones(()), 2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["estimate"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^Estimate.load: expected a file of Estimate.save"):
        Estimate.load(tmp_path / "other")


# --------------------------------------------------------------------------------------- bad input


def test_what_cannot_go_on_is_refused() -> None:
    op = flat_operator(A)
    trace = hutchinson_trace(op, 20)
    with pytest.raises(
        ValueError, match=r"^xtrace: resume must be an Estimate of xtrace, got one of"
    ):
        xtrace(op, 30, resume=trace)
    with pytest.raises(
        ValueError, match=r"num_matvecs counts from the beginning; 20 are done, got 10"
    ):
        hutchinson_trace(op, 10, resume=trace)
    with pytest.raises(
        ValueError, match=r"resume was made with distribution rademacher, here it is"
    ):
        hutchinson_trace(op, 30, resume=trace, distribution=probes.normal)
    with pytest.raises(ValueError, match=r"resume was made with shapes"):
        hutchinson_trace(flat_operator(A[:9, :9]), 30, resume=trace)
    with pytest.raises(TypeError, match=r"got one without a state"):
        hutchinson_trace(op, 30, resume=Estimate(trace.value, trace.standard_error, 20))
    with pytest.raises(TypeError, match=r"resume must be an Estimate .* got int"):
        hutchinson_trace(op, 30, resume=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_count_or_a_tolerance(name: str) -> None:
    estimate, op = ESTIMATORS[name], flat_operator(A)
    with pytest.raises(TypeError, match="neither num_matvecs nor a tolerance was given"):
        estimate(op)
    with pytest.raises(ValueError, match="exclude one another"):
        estimate(op, 10, rtol=0.1)
    with pytest.raises(ValueError, match="exclude one another"):
        estimate(op, 10, max_matvecs=100)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rtol must be a number from 0 on"):
            estimate(op, rtol=bad)
    for bad in ("small", True):
        with pytest.raises(TypeError, match="rtol must be a real number"):
            estimate(op, rtol=bad)
    with pytest.raises(TypeError, match="atol must be a real number"):
        estimate(op, rtol=0.1, atol=None)
    with pytest.raises(ValueError, match="num_matvecs must be at least 1, got 0"):
        estimate(op, 0)
    with pytest.raises(ValueError, match="max_matvecs must be at least 1, got 0"):
        estimate(op, rtol=0.1, max_matvecs=0)
    with pytest.raises(TypeError, match=r"num_matvecs must be a whole number, got 2\.5"):
        estimate(op, 2.5)


def test_counts_may_be_given_by_name() -> None:
    from secorder_func import eigsh, layer_curvature, spectral_density

    op = flat_operator(A)
    for estimate in ESTIMATORS.values():
        assert estimate(op, num_matvecs=16).num_matvecs == 16
    assert eigsh(op, k=2).eigenvalues.shape == (2,)
    assert len(spectral_density(op, num_vectors=3).nodes) == 3
    assert layer_curvature(op, num_matvecs=4).names == ("all",)
