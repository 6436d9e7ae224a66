"""Block power iteration against dense eigendecompositions of matrices whose spectra are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.power_iteration import power_iteration
from secorder_func.errors import ArgumentError, NonFiniteError
from tests.algorithms.matrices import generator, with_spectrum

SMALL = torch.linspace(-0.2, 0.2, 40).tolist()
SPECTRA = {
    "gaps": [8.0, 4.0, 2.0, 1.0, *SMALL],
    "indefinite": [-8.0, 4.0, -2.0, 1.0, *SMALL],
    "double": [5.0, 5.0, -3.0, -3.0, *SMALL],
    "rank two": [3.0, -2.0] + [0.0] * 40,
    "cluster": [10 + 1e-9 * i for i in range(4)] + SMALL,
    "identity": [1.0] * 30,
    "zero": [0.0] * 30,
    "four by four": [4.0, -1.0, 0.0, 2.0],
}


def _start(A: Tensor, b: int, seed: int = 0) -> Tensor:
    return torch.randn(b, len(A), dtype=torch.float64, generator=generator(seed)).to(A.dtype)


def _solve(A: Tensor, b: int = 1, *, max_iterations: int = 300, tol: float = 1e-9) -> Eigenpairs:
    return power_iteration(lambda V: V @ A, _start(A, b), max_iterations=max_iterations, tol=tol)


@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_eigenvalues_of_largest_magnitude_are_found(name: str, b: int) -> None:
    atol = 1e-8 if name == "cluster" else 1e-10  # one of a cluster stands for another
    A = with_spectrum(SPECTRA[name])
    values = torch.linalg.eigvalsh(A)
    expected = values[values.abs().argsort(descending=True)][:b]
    found = _solve(A, b)
    torch.testing.assert_close(found.eigenvalues.abs(), expected.abs(), rtol=0, atol=atol)
    X = found.eigenvectors
    torch.testing.assert_close(X.T @ X, torch.eye(b).double(), rtol=0, atol=1e-12)
    residuals = torch.linalg.vector_norm(A @ X - X * found.eigenvalues, dim=0)
    torch.testing.assert_close(found.residual_norms, residuals, rtol=1e-3, atol=1e-13)
    assert found.converged
    assert float(residuals.max()) <= 1e-9 * float(expected.abs().max()) + 1e-14


def test_signs_are_kept() -> None:
    found = _solve(with_spectrum(SPECTRA["indefinite"]), 4)
    expected = torch.tensor([-8.0, 4.0, -2.0, 1.0]).double()
    torch.testing.assert_close(found.eigenvalues, expected)


def test_a_block_beyond_the_rank_has_zeros_not_nan() -> None:
    for dtype in (torch.float32, torch.float64):
        A = with_spectrum([3.0, -2.0] + [0.0] * 40).to(dtype)
        found = _solve(A, 6, tol=1e-6)
        expected = torch.tensor([3.0, -2.0, 0, 0, 0, 0], dtype=dtype)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("b", [1, 3])
def test_products_are_counted_one_block_an_iteration(b: int) -> None:
    A = with_spectrum(torch.linspace(0.9, 1, 60).tolist())
    shapes = []

    def product(V: Tensor) -> Tensor:
        shapes.append(tuple(V.shape))
        return V @ A

    found = power_iteration(product, _start(A, b), max_iterations=7)
    assert shapes == [(b, 60)] * 7
    assert found.num_matvecs == 7 * b
    assert not found.converged


def test_the_whole_space_needs_one_iteration() -> None:
    A = with_spectrum([4.0, -1.0, 0.0, 2.0])
    found = _solve(A, 4)
    assert found.num_matvecs == 4
    torch.testing.assert_close(found.eigenvalues, torch.tensor([4.0, 2.0, -1.0, 0.0]).double())


def test_half_precision_is_iterated_in_float32() -> None:
    A = with_spectrum([8.0, 1.0, 0.5, 0.1]).half()
    found = power_iteration(lambda V: V @ A, torch.randn(1, 4).half())
    assert found.eigenvalues.dtype == torch.float32
    assert abs(float(found.eigenvalues) - 8) < 0.05
    assert found.converged


def test_products_of_a_wider_dtype_are_iterated_in_it() -> None:
    d = torch.tensor([3.0, 1.0, 0.5]).double()
    found = power_iteration(lambda V: V * d, torch.randn(2, 3), tol=1e-12)
    torch.testing.assert_close(found.eigenvalues, d[:2], rtol=0, atol=1e-12)


def test_the_product_may_change_its_argument() -> None:
    d = torch.tensor([3.0, 1.0, 0.5]).double()
    found = power_iteration(lambda V: V.mul_(d), torch.randn(2, 3).double())
    torch.testing.assert_close(found.eigenvalues, d[:2])


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_a_product_that_is_not_finite_is_an_error(at: int, b: int) -> None:
    A, calls = with_spectrum(torch.linspace(0.9, 1, 30).tolist()), []

    def product(V: Tensor) -> Tensor:
        calls.append(1)
        return V @ A * (float("nan") if len(calls) == at else 1)

    with pytest.raises(NonFiniteError, match="NaN or infinite entries"):
        power_iteration(product, _start(A, b))
    assert len(calls) == at


@pytest.mark.parametrize(
    ("start", "options", "pattern"),
    [
        (torch.ones(3), {}, r"shape \(3,\)"),
        (torch.randn(4, 3), {}, "1 <= b <= n"),
        (torch.randn(1, 3), {"max_iterations": 0}, "max_iterations must be at least 1"),
        (torch.randn(1, 3), {"tol": -1.0}, "tol >= 0"),
    ],
)
def test_bad_arguments_are_refused(start: Tensor, options: dict, pattern: str) -> None:
    with pytest.raises(ArgumentError, match=pattern):
        power_iteration(lambda V: V, start, **options)
