"""Lanczos against dense eigendecompositions of matrices whose spectra are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.krylov_basis import KrylovBasis
from secorder_func.algorithms.lanczos import lanczos
from secorder_func.errors import ArgumentError, NonFiniteError
from tests.algorithms.matrices import generator, with_spectrum

LINE = torch.linspace(-1, 1, 60).tolist()
SPECTRA = {
    "indefinite": torch.linspace(-50, 3, 80).tolist(),
    "double": [5.0, 5.0, *LINE],
    "triple with a negative end": [5.0] * 3 + [1.0] * 40 + [-7.0] * 2,
    "cluster": [10 + 1e-6 * i for i in range(4)] + LINE,
    "rank three": [3.0, -2.0, 1.0] + [0.0] * 60,
    "large gaps": [1e6, 1e3, 1.0, *[1e-3] * 5],
    "identity": [1.0] * 30,
    "zero": [0.0] * 30,
    "negative": [-1.0, -2.0, -2.0, *torch.linspace(-9, -5, 40).tolist()],
    "four by four": [4.0, -1.0, 0.0, 2.0],
}


class Counted:
    """A product that counts its calls."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.calls = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        assert v.shape == (len(self.A),)
        return self.A @ v


def _start(A: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(len(A), dtype=torch.float64, generator=generator(seed)).to(A.dtype)


def _solve(
    A: Tensor, k: int = 1, *, max_steps: int = 200, tol: float = 1e-9, seed: int = 0
) -> Eigenpairs:
    return lanczos(
        lambda v: A @ v, _start(A, seed), k, max_steps=max_steps, tol=tol, generator=generator(seed)
    )


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalues_are_found_as_often_as_they_occur(name: str, k: int) -> None:
    A = with_spectrum(SPECTRA[name])
    for seed in range(3):
        found = _solve(A, k, seed=seed)
        expected = torch.linalg.eigvalsh(A).flip(0)[:k]
        scale = float(torch.linalg.eigvalsh(A).abs().max())
        # One of a cluster narrower than the tolerance stands for another.
        atol = 4e-6 if name == "cluster" else 1e-9 * scale + 1e-12
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=atol)
        X = found.eigenvectors
        torch.testing.assert_close(X.T @ X, torch.eye(k).double(), rtol=0, atol=1e-12)
        residuals = torch.linalg.vector_norm(A @ X - X * found.eigenvalues, dim=0)
        torch.testing.assert_close(found.residual_norms, residuals, rtol=1e-6, atol=1e-13 * scale)
        assert found.converged
        assert float(residuals.max()) <= 1e-9 * scale


def test_all_eigenvalues_of_a_small_matrix_are_found() -> None:
    A = with_spectrum([3.0, 3.0, 1.0, 0.0, -2.0, -2.0])
    found = _solve(A, 6)
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(A).flip(0))
    assert found.num_matvecs == 6 + 6


def test_a_matrix_of_one_row_is_its_eigenvalue() -> None:
    found = _solve(torch.tensor([[-4.0]]).double())
    assert found.eigenvalues.tolist() == [-4.0]
    assert found.eigenvectors.abs().tolist() == [[1.0]]


def test_float32_vectors_stay_orthogonal_over_many_steps_and_large_gaps() -> None:
    spectrum = [1e4, 1e3, 1e2, 10.0, *torch.linspace(0, 1, 400).tolist()]
    A = with_spectrum(spectrum).float()
    basis = KrylovBasis(_start(A), 250)
    w, rest = _start(A), 1.0
    rest = float(torch.linalg.vector_norm(w))
    for _ in range(250):
        w, _, (_, rest) = basis.orthogonalised(A @ basis.append(w, rest))
    Q = torch.cat(basis.blocks)[:250].double()
    assert float((Q @ Q.T - torch.eye(250)).abs().max()) < 1e-5
    found = _solve(A, 4, max_steps=250, tol=0)
    expected = torch.tensor(spectrum[:4])
    torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-5 * 1e4)


def test_a_basis_in_several_blocks_is_the_same_basis() -> None:
    A = with_spectrum(LINE)
    one, many = (KrylovBasis(_start(A), 20) for _ in range(2))
    many.rows = 3
    for basis in (one, many):
        w, rest = _start(A), float(_start(A).norm())
        for _ in range(20):
            w, _, (_, rest) = basis.orthogonalised(A @ basis.append(w, rest))
    assert [len(block) for block in many.blocks] == [3] * 6 + [2]
    torch.testing.assert_close(torch.cat(many.blocks), one.blocks[0])
    S = torch.randn(20, 2).double()
    torch.testing.assert_close(many.combined(S), one.combined(S))


@pytest.mark.parametrize("k", [1, 3])
def test_products_are_counted_and_bounded(k: int) -> None:
    A = with_spectrum(torch.linspace(0, 1, 300).tolist())
    for max_steps in (k, 5, 40):
        product = Counted(A)
        found = lanczos(product, _start(A), k, max_steps=max_steps)
        assert found.num_matvecs == product.calls == max_steps + k
        assert not found.converged


def test_an_easy_spectrum_needs_few_products() -> None:
    A = with_spectrum([100.0, 50.0, *torch.linspace(0, 0.1, 300).tolist()])
    assert _solve(A, 1, tol=1e-6).num_matvecs < 12
    assert _solve(A, 2, tol=1e-6).num_matvecs < 30


def test_a_second_copy_is_looked_for_after_convergence() -> None:
    A = with_spectrum([5.0, 5.0, 1.0, *torch.linspace(-1, 0, 200).tolist()])
    with_copies = _solve(A, 2, tol=1e-6)
    torch.testing.assert_close(
        with_copies.eigenvalues, torch.tensor([5.0, 5.0]).double(), rtol=0, atol=1e-5
    )


def test_half_precision_is_iterated_in_float32() -> None:
    A = with_spectrum([8.0, 4.0, *torch.linspace(-0.5, 0.5, 30).tolist()])
    seen: set[torch.dtype] = set()

    def product(v: Tensor) -> Tensor:
        seen.add(v.dtype)
        return A.bfloat16() @ v

    found = lanczos(product, _start(A).bfloat16(), 2, max_steps=30)
    assert seen == {torch.bfloat16}
    assert found.eigenvalues.dtype == torch.float32
    torch.testing.assert_close(found.eigenvalues, torch.tensor([8.0, 4.0]), rtol=0, atol=0.1)
    assert found.converged


def test_products_of_a_wider_dtype_are_iterated_in_it() -> None:
    d = torch.linspace(-1, 1, 50).double()
    found = lanczos(lambda v: d * v, torch.randn(50), max_steps=50, tol=1e-12)
    assert found.eigenvalues.dtype == torch.float64
    assert abs(float(found.eigenvalues) - 1) < 1e-12


def test_tiny_matrices_in_float32_do_not_vanish() -> None:
    A = (with_spectrum([3.0, 2.0, *LINE]) * 1e-25).float()
    found = _solve(A, 2, tol=1e-6)
    expected = torch.tensor([3e-25, 2e-25]).double()
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-5, atol=0)
    assert float(found.residual_norms.min()) > 0


def test_the_product_may_change_its_argument_or_return_it() -> None:
    d = torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    changed = lanczos(lambda v: v.mul_(d), torch.ones(4).double(), 2, max_steps=4)
    torch.testing.assert_close(changed.eigenvalues, d[:2])
    same = lanczos(lambda v: v, torch.ones(4).double(), 3, max_steps=4)
    torch.testing.assert_close(same.eigenvalues, torch.ones(3).double())


def test_results_carry_no_graph() -> None:
    A = with_spectrum(LINE).requires_grad_()
    found = _solve(A, 1)
    assert not found.eigenvalues.requires_grad
    assert not found.eigenvectors.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 4, 11])
def test_a_product_that_is_not_finite_is_an_error(bad: float, at: int) -> None:
    product = Counted(with_spectrum(LINE))
    spoiled: Callable[[Tensor], Tensor] = lambda v: product(v) * (bad if product.calls == at else 1)  # noqa: E731
    with pytest.raises(NonFiniteError, match=f"product {at} has NaN or infinite entries"):
        lanczos(spoiled, _start(product.A), 1, max_steps=10)  # the 11th shows the residual


def test_equal_seeds_give_equal_numbers() -> None:
    A = with_spectrum(SPECTRA["double"])
    first, again = _solve(A, 2), _solve(A, 2)
    assert torch.equal(first.eigenvectors, again.eigenvectors)


@pytest.mark.parametrize(
    ("start", "k", "options", "pattern"),
    [
        (torch.ones(3), 4, {}, "1 <= k <= n"),
        (torch.ones(3), 0, {}, "k must be at least 1"),
        (torch.ones(3, 1), 1, {}, r"a start of shape \(3, 1\)"),
        (torch.ones(3), 2, {"max_steps": 1}, "k <= max_steps"),
        (torch.ones(3), 1, {"tol": -1.0}, "tol >= 0"),
        (torch.zeros(3), 1, {}, "not zero"),
        (torch.full((3,), float("nan")), 1, {}, "finite"),
        (torch.ones(3, dtype=torch.int64), 1, {}, "floating dtype"),
    ],
)
def test_bad_arguments_are_refused(start: Tensor, k: int, options: dict, pattern: str) -> None:
    with pytest.raises(ArgumentError, match=pattern):
        lanczos(lambda v: v, start, k, **options)


@pytest.mark.parametrize(
    ("product", "pattern"),
    [
        (lambda v: v[:2], r"Expected \(3,\), got \(2,\)"),
        (lambda v: v[:, None], r"got \(3, 1\)"),
        (lambda v: 1.0, "must be a tensor, got float"),
        (lambda v: v.to(torch.complex64), "real floating dtype, got torch.complex64"),
        (lambda v: v.to("meta"), "on the device of its vectors"),
        (None, "must be a function"),
    ],
)
def test_bad_products_are_refused(product: Callable[[Tensor], Tensor], pattern: str) -> None:
    with pytest.raises(ArgumentError, match=f"^lanczos: .*{pattern}"):
        lanczos(product, torch.ones(3))


def test_pairs_print_and_are_frozen() -> None:
    found = _solve(with_spectrum([4.0, 2.0, 1.0]), 2)
    assert str(found).startswith("2 eigenvalues from 4 to 2, residuals at most ")
    with pytest.raises(AttributeError):
        found.converged = False  # type: ignore[misc]
