"""The Frobenius norm and the norms of rows, against the matrix."""

from __future__ import annotations

import math

import pytest
import torch

from secorder_func import hutchinson_squared_frobenius_norm, hutchinson_squared_row_norms
from tests import oracles
from tests.algorithms.matrices import LIKE, generator, operator, random_matrix

A = random_matrix(7, symmetric=False)


@pytest.mark.parametrize("seed", range(5))
def test_the_squared_frobenius_norm_is_within_five_standard_errors(seed: int) -> None:
    found = hutchinson_squared_frobenius_norm(operator(A), 400, generator=generator(seed))
    assert abs(float(found.value - A.square().sum())) < 5 * float(found.standard_error)
    assert float(found.standard_error) < 0.1 * float(A.square().sum())
    root = found.sqrt()
    assert abs(float(root.value - A.norm())) < 5 * float(root.standard_error)
    assert float(root.standard_error) == pytest.approx(
        float(found.standard_error) / (2 * float(root.value))
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_squared_row_norms_are_within_five_standard_errors(seed: int) -> None:
    found = hutchinson_squared_row_norms(operator(A), 500, generator=generator(seed))
    truth = A.square().sum(1)
    errors = oracles.flat(found.standard_error)
    assert ((oracles.flat(found.value) - truth).abs() < 5 * errors).all()
    assert (errors < 0.3 * truth).all()
    oracles.assert_same(
        oracles.like(oracles.flat(found.value), LIKE), found.value, 0.0
    )  # of the space's structure


def test_both_are_unbiased_and_cover_the_truth() -> None:
    op, runs = operator(A), 200
    norms = [hutchinson_squared_frobenius_norm(op, 20, generator=generator(s)) for s in range(runs)]
    rows = [hutchinson_squared_row_norms(op, 20, generator=generator(s)) for s in range(runs)]
    for found, truth in ((norms, A.square().sum()), (rows, A.square().sum(1))):
        values = torch.stack([oracles.flat(e.value) for e in found])
        assert ((values.mean(0) - truth).abs() < 5 * values.std(0) / math.sqrt(runs)).all()
        hits = [
            (oracles.flat(low) <= truth) & (truth <= oracles.flat(high))
            for low, high in (e.interval() for e in found)
        ]
        assert 0.89 <= float(torch.stack(hits).double().mean()) <= 0.99
