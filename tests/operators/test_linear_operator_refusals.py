"""What `LinearOperator` refuses, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secorder_func import LinearOperator
from tests.operators.known import A, V, W, operator, stack

# ------------------------------------------------------------------------------------- bad input


def test_a_vector_of_the_wrong_shape_is_refused_with_its_place() -> None:
    with pytest.raises(
        ValueError,
        match=r"^LinearOperator @ v: .*At \['w'\] expected shape \(2, 2\), got \(4,\)",
    ):
        operator(A) @ {**V, "w": torch.zeros(4).double()}


def test_a_vector_of_another_structure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^LinearOperator @ v: v must have the structure of"):
        operator(A) @ torch.zeros(7)


@pytest.mark.parametrize("method", ["mm", "quadratic_forms"])
def test_a_stack_without_its_axis_is_refused(method: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^LinearOperator\.{method}: vectors must match .*expected shape \(k"
    ):
        getattr(operator(A), method)(V)


@pytest.mark.parametrize("method", ["mm", "quadratic_forms"])
def test_stacks_of_unequal_length_are_refused(method: str) -> None:
    vectors = {**stack(V, W), "w": torch.zeros(3, 2, 2).double()}
    with pytest.raises(ValueError, match=rf"^LinearOperator\.{method}: .*2 stacked vectors.*got 3"):
        getattr(operator(A), method)(vectors)


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_of_less_than_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        operator(A).mm(stack(V, W), chunk_size=size)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        operator(A).dense(chunk_size=size)


def test_a_sum_of_different_spaces_is_refused() -> None:
    other = LinearOperator(lambda v: v, torch.zeros(7).double())
    with pytest.raises(TypeError, match=r"^LinearOperator \+ other: other must have the structure"):
        operator(A) + other


@pytest.mark.parametrize("method", ["dense", "scipy"])
def test_a_complex_space_has_no_matrix(method: str) -> None:
    op = LinearOperator(lambda v: v, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match=rf"^LinearOperator\.{method}: .*real, got torch\.complex64.*view_as_real"
    ):
        getattr(op, method)()


@pytest.mark.parametrize(
    ("like", "error", "words"),
    [
        ({"a": 1.0}, TypeError, r"every leaf of like .*At \['a'\] got float"),
        ({}, ValueError, "like has no tensor"),
        (torch.zeros(2, dtype=torch.int32), ValueError, r"At the root got torch\.int32"),
    ],
)
def test_a_witness_that_is_no_vector_is_refused(
    like: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^LinearOperator: .*{words}"):
        LinearOperator(lambda v: v, like)
