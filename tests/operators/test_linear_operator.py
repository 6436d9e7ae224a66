"""`LinearOperator`: products, arithmetic and representations of a known matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from secorder_func import LinearOperator
from tests import oracles
from tests.operators.known import LIKE, A, B, V, W, operator, stack, times

# -------------------------------------------------------------------------------------- products


def test_the_product_is_that_of_the_matrix() -> None:
    oracles.assert_same(operator(A) @ V, times(A, V), 0.0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("stacked", [False, True])
def test_mm_equals_a_loop_whatever_the_chunk(stacked: bool, chunk_size: int | None) -> None:
    vectors = [oracles.random_like(LIKE, seed) for seed in range(5)]
    products = operator(A, stacked=stacked).mm(stack(*vectors), chunk_size=chunk_size)
    oracles.assert_same(products, stack(*(times(A, v) for v in vectors)), 1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_mm_multiplies_at_most_a_chunk_at_once(chunk_size: int) -> None:
    sizes = []

    def matmat(vectors: Tensor) -> Tensor:
        sizes.append(len(vectors))
        return 2 * vectors

    op = LinearOperator(lambda v: 2 * v, torch.zeros(3), matmat=matmat)
    op.mm(torch.ones(5, 3), chunk_size=chunk_size)
    assert max(sizes) == chunk_size
    assert sum(sizes) == 5


def test_mm_of_no_vectors_is_no_vectors() -> None:
    op = LinearOperator(lambda v: 2 * v, torch.zeros(3))
    assert op.mm(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("stacked", [False, True])
def test_quadratic_forms_are_those_of_the_matrix(stacked: bool) -> None:
    forms = operator(A, stacked=stacked).quadratic_forms(stack(V, W))
    v, w = oracles.flat(V), oracles.flat(W)
    oracles.assert_same(forms, torch.stack([v @ A @ v, w @ A @ w]), 1e-13)


def test_quadratic_forms_use_the_closure_that_is_given() -> None:
    op = operator(A, quadratic=lambda vectors: torch.tensor([3.0, 4.0]))
    assert op.quadratic_forms(stack(V, W)).tolist() == [3.0, 4.0]


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, b: a + b, A + B),
        (lambda a, b: a - b, A - B),
        (lambda a, b: 3 * a, 3 * A),
        (lambda a, b: a * -0.5, -0.5 * A),
        (lambda a, b: torch.tensor(2.0) * a, 2 * A),
        (lambda a, b: -a, -A),
        (lambda a, b: a.damped(0.25), A + 0.25 * torch.eye(7)),
        (lambda a, b: a.damped(torch.tensor(0.25)), A + 0.25 * torch.eye(7)),
        (lambda a, b: 2 * (a - 3 * b).damped(1.0), 2 * (A - 3 * B + torch.eye(7))),
    ],
)
def test_arithmetic_is_that_of_matrices(combine: Any, expected: Tensor, stacked: bool) -> None:
    op = combine(operator(A, stacked=stacked), operator(B, stacked=stacked, symmetric=False))
    oracles.assert_same(op @ V, times(expected, V), 1e-12)
    oracles.assert_same(op.dense(), expected, 1e-12)


def test_a_sum_is_symmetric_only_if_both_terms_are() -> None:
    both = operator(A) + operator(B, symmetric=False)
    assert not both.symmetric
    assert (operator(A) + operator(A)).symmetric


def test_a_sum_of_modes_keeps_the_common_one_only() -> None:
    one, two = operator(A, mode="one"), operator(A, mode="two")
    assert ((one + one).mode, (one + two).mode) == ("one", None)


@pytest.mark.parametrize(
    ("combine", "matrix"),
    [(lambda a: 3 * a, 3 * A), (lambda a: -a, -A), (lambda a: a.damped(2.0), A + 2 * torch.eye(7))],
)
def test_arithmetic_keeps_cheap_quadratic_forms(combine: Any, matrix: Tensor) -> None:
    calls = []

    def quadratic(vectors: Any) -> Tensor:
        calls.append(1)
        rows = torch.stack([oracles.flat(v) for v in (V, W)])
        return ((rows @ A) * rows).sum(1)

    forms = combine(operator(A, quadratic=quadratic)).quadratic_forms(stack(V, W))
    v, w = oracles.flat(V), oracles.flat(W)
    oracles.assert_same(forms, torch.stack([v @ matrix @ v, w @ matrix @ w]), 1e-12)
    assert calls


def test_a_sum_does_not_keep_the_quadratic_forms_of_one_term() -> None:
    wrong = lambda vectors: torch.zeros(2).double()  # noqa: E731
    both = operator(A, quadratic=wrong) + operator(A)
    v, w = oracles.flat(V), oracles.flat(W)
    expected = 2 * torch.stack([v @ A @ v, w @ A @ w])
    oracles.assert_same(both.quadratic_forms(stack(V, W)), expected, 1e-12)


@pytest.mark.parametrize("other", [1.0, torch.eye(7), "A", None])
def test_a_sum_with_anything_else_is_a_type_error(other: Any) -> None:
    with pytest.raises(TypeError):
        operator(A) + other


@pytest.mark.parametrize("factor", [torch.ones(2), "2", None, [1.0]])
def test_a_multiple_by_anything_but_a_number_is_a_type_error(factor: Any) -> None:
    with pytest.raises(TypeError):
        operator(A) * factor


# -------------------------------------------------------------------------------- representations


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("matrix", [A, B], ids=["symmetric", "general"])
def test_dense_is_the_matrix(matrix: Tensor, stacked: bool, chunk_size: int | None) -> None:
    oracles.assert_same(
        operator(matrix, stacked=stacked).dense(chunk_size=chunk_size), matrix, 1e-13
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_flat_multiplies_vectors_in_the_order_of_the_leaves(stacked: bool) -> None:
    flat = operator(B, stacked=stacked).flat()
    v = oracles.flat(V)
    oracles.assert_same(flat @ v, B @ v, 1e-13)


@pytest.mark.parametrize("stacked", [False, True])
def test_flat_multiplies_stacks_as_rows(stacked: bool) -> None:
    rows = torch.randn(4, 7).double()
    flat = operator(B, stacked=stacked).flat()
    oracles.assert_same(flat.mm(rows, chunk_size=3), rows @ B.T, 1e-13)
    assert flat.dense().shape == (7, 7)


def test_flat_of_flat_is_the_same_matrix() -> None:
    oracles.assert_same(operator(B).flat().flat().dense(), B, 1e-13)


def test_flat_keeps_quadratic_forms_symmetry_and_mode() -> None:
    op = operator(A, quadratic=lambda vectors: vectors["a"][:, 0], symmetric=False, mode="m").flat()
    rows = torch.arange(14.0).reshape(2, 7).double()
    assert op.quadratic_forms(rows).tolist() == [0.0, 7.0]
    assert (op.symmetric, op.mode) == (False, "m")


@pytest.mark.parametrize("stacked", [False, True])
def test_scipy_finds_the_largest_eigenvalues(stacked: bool) -> None:
    op = operator(A, stacked=stacked).scipy()
    found = scipy.sparse.linalg.eigsh(op, k=2, which="LM", return_eigenvectors=False, v0=np.ones(7))
    truth = sorted(np.linalg.eigvalsh(A.numpy()), key=abs)[-2:]
    np.testing.assert_allclose(sorted(found, key=abs), truth, rtol=1e-10)


def test_scipy_multiplies_vectors_columns_and_transposes() -> None:
    op = operator(A, stacked=True).scipy()
    X = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_allclose(op @ X, A.numpy() @ X, rtol=1e-12)
    np.testing.assert_allclose(op @ X[:, 0], A.numpy() @ X[:, 0], rtol=1e-12)
    np.testing.assert_allclose(op @ X[:, :1], A.numpy() @ X[:, :1], rtol=1e-12)
    np.testing.assert_allclose(op.T @ X, A.numpy() @ X, rtol=1e-12)


def test_scipy_sees_half_precision_as_single() -> None:
    op = LinearOperator(lambda v: 2 * v, torch.zeros(3, dtype=torch.bfloat16)).scipy()
    assert op.dtype == np.float32
    assert (op @ np.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_shape_dtype_and_device_are_read_off_like() -> None:
    op = LinearOperator(lambda v: v, {"a": torch.zeros(2), "b": torch.zeros(3).double()})
    assert (op.shape, op.dtype, op.device.type) == ((5, 5), torch.float64, "cpu")


def test_its_text_says_what_it_is() -> None:
    assert repr(operator(A, mode="auto")) == (
        "LinearOperator(7 x 7, 4 leaves, torch.float64, cpu, mode='auto')"
    )


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        operator(A).symmetric = False  # type: ignore[misc]
