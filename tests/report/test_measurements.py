from __future__ import annotations

from typing import Any

import pytest
import torch

from secorder_func import LinearOperator, probes, tree
from secorder_func.algorithms.probes import draw_seed
from secorder_func.report import measurements as ms
from secorder_func.report.problem import Problem, relative_difference, watched

LAST_LAYER = ("2.bias", "2.weight")


def features_and_chances(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = problem.params["0.weight"], problem.params["0.bias"]
    outputs = problem.model_fn(problem.params, problem.inputs)
    return torch.tanh(problem.inputs @ weight.T + bias), outputs.softmax(1)


def test_the_product_agrees_with_differences_of_the_gradient(
    problem: Problem, generator: torch.Generator
) -> None:
    assert 0 < ms.product_against_differences(problem, generator=generator) < 1e-7


def test_a_wrong_product_is_seen_by_differences_of_the_gradient(
    problem: Problem, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ms.hvp

    def slightly_off(loss: Any) -> Any:
        return lambda *args: tree.scale(1.001, right(loss)(*args))

    monkeypatch.setattr(ms, "hvp", slightly_off)
    assert ms.product_against_differences(problem, generator=generator) > 1e-4


def test_the_block_read_off_products_is_the_block_of_the_dense_hessian(
    problem: Problem, dense: Any
) -> None:
    block = ms.hessian_block(problem, problem.hessian(), LAST_LAYER)
    size = len(block)
    torch.testing.assert_close(block, dense.hessian()[-size:, -size:])


def test_the_closed_form_of_the_last_layer_is_the_block_of_the_dense_hessian(
    problem: Problem, dense: Any
) -> None:
    block = ms.softmax_block(*features_and_chances(problem))
    size = len(block)
    torch.testing.assert_close(block, dense.hessian()[-size:, -size:])


def test_distance_and_cosine_of_known_matrices(generator: torch.Generator) -> None:
    like = torch.zeros(5, dtype=torch.float64)
    identity = LinearOperator(lambda v: v, like)
    distance = ms.gauss_newton_distance(2 * identity, identity, num_vectors=3, generator=generator)
    assert distance.relative == pytest.approx(0.5)
    assert distance.cosine == pytest.approx(1.0)


def test_the_gauss_newton_operator_and_the_fisher_trace_agree_with_the_dense_matrix(
    problem: Problem, dense: Any
) -> None:
    G = dense.gauss_newton()
    torch.testing.assert_close(problem.gauss_newton().dense(), G)
    assert ms.fisher_trace(problem, chunk_size=2) == pytest.approx(G.trace().item(), rel=1e-12)


def test_the_exact_trace_is_that_of_the_dense_hessian(problem: Problem, dense: Any) -> None:
    trace = ms.trace_convergence(problem.hessian(), [2, 4], seed=3)
    assert trace.exact == pytest.approx(dense.hessian().trace().item(), rel=1e-12)


def test_a_longer_estimate_continues_a_shorter_one(problem: Problem, dense: Any) -> None:
    trace = ms.trace_convergence(problem.hessian(), [2, 8], seed=3)
    seed = draw_seed(torch.Generator().manual_seed(3))
    vectors, _ = tree.ravel(probes.rademacher(seed, range(8), problem.params), batch_dims=1)
    forms = ((vectors @ dense.hessian()) * vectors).sum(1)
    for estimate in trace.estimates:
        first = forms[: estimate.num_matvecs]
        torch.testing.assert_close(estimate.value, first.mean())
        torch.testing.assert_close(estimate.standard_error, first.std() / len(first) ** 0.5)


def test_the_z_score_counts_standard_errors(problem: Problem) -> None:
    trace = ms.trace_convergence(problem.hessian(), [16], seed=3)
    error = trace.last.value.item() - trace.exact
    assert trace.z_score == pytest.approx(error / trace.last.standard_error.item())


def test_the_ends_of_the_spectrum_are_those_of_the_dense_hessian(
    problem: Problem, dense: Any, generator: torch.Generator
) -> None:
    values = torch.linalg.eigvalsh(dense.hessian())
    found = ms.spectrum(problem.hessian(), 3, generator=generator)
    assert [pair.value for pair in found.largest] == pytest.approx(values[-3:].flip(0).tolist())
    assert found.smallest.value == pytest.approx(values[0].item())
    assert max(pair.residual for pair in (*found.largest, found.smallest)) < 1e-12
    assert found.num_matvecs > 0


def test_a_watched_operator_multiplies_alike_and_counts(
    problem: Problem, generator: torch.Generator
) -> None:
    counts: list[int] = []
    op, plain = watched(problem.hessian(), counts.append), problem.hessian()
    v = tree.random_like(problem.params, generator=generator)
    several = tree.stack([v, v, v])
    assert relative_difference(op @ v, plain @ v) == 0
    assert relative_difference(op.mm(several, chunk_size=None), plain.mm(several)) == 0
    op.quadratic_forms(several)
    assert counts == [1, 3, 3]


def test_a_frozen_problem_keeps_its_parameters(problem: Problem) -> None:
    frozen = problem.frozen()
    before = {name: p.clone() for name, p in frozen.params.items()}
    for p in problem.params.values():
        p.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in frozen.params.items())
