from __future__ import annotations

from typing import Any

import pytest
import torch

from secorder_func import probes, tree
from secorder_func.algorithms.probes import draw_seed
from secorder_func.report import per_sample
from secorder_func.report.problem import Problem

EVERY_SAMPLE = torch.arange(7)


@pytest.fixture
def traces(dense: Any) -> torch.Tensor:
    rows = [slice(i, i + 1) for i in range(7)]
    return torch.stack([dense.hessian(row).trace() for row in rows])


def test_exact_sample_traces_are_those_of_dense_hessians(
    problem: Problem, traces: torch.Tensor
) -> None:
    torch.testing.assert_close(per_sample.exact_sample_traces(problem, EVERY_SAMPLE), traces)


def test_the_mean_over_samples_is_the_trace_for_the_mean_loss(problem: Problem, dense: Any) -> None:
    mean = per_sample.exact_sample_traces(problem, EVERY_SAMPLE).mean()
    torch.testing.assert_close(mean, dense.hessian().trace())


def test_estimates_are_means_of_quadratic_forms_of_dense_hessians(
    problem: Problem, dense: Any
) -> None:
    found = per_sample.sample_traces(problem, num_probes=5, seed=4).estimate
    seed = draw_seed(torch.Generator().manual_seed(4))
    vectors, _ = tree.ravel(probes.rademacher(seed, range(5), problem.params), batch_dims=1)
    for i in range(7):
        forms = ((vectors @ dense.hessian(slice(i, i + 1))) * vectors).sum(1)
        torch.testing.assert_close(found.value[i], forms.mean())
        torch.testing.assert_close(found.standard_error[i], forms.std() / 5**0.5)


def test_for_equal_probes_the_mean_over_samples_is_the_estimate_for_the_mean_loss(
    problem: Problem,
) -> None:
    products: list[int] = []
    found = per_sample.sample_traces(problem, num_probes=5, seed=4, advance=products.append)
    assert found.mismatch < 1e-13
    assert found.estimate.by_propagation
    assert sum(products) == 5


def test_a_wrong_curvature_of_one_sample_is_seen_by_the_mean_loss(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Problem.losses

    def slightly_off(self: Problem, params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        is_one = (x == problem.inputs[3]).all(-1)
        return right(self, params, x, y) * torch.where(is_one, 1.01, 1.0)

    monkeypatch.setattr(Problem, "losses", slightly_off)
    assert per_sample.sample_traces(problem, num_probes=5, seed=4).mismatch > 1e-5


def test_samples_are_ranked_by_exact_traces(problem: Problem, traces: torch.Tensor) -> None:
    # Estimates in a wrong order, but with the right samples at either end.
    order = traces.argsort(descending=True)
    estimates = torch.empty(7, dtype=torch.float64)
    estimates[order] = torch.tensor([6.0, 7.0, 5.0, 4.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    ranking = per_sample.rank(problem, estimates, num_shown=1)
    assert ranking.most.tolist() == [order[0].item()]
    assert ranking.least.tolist() == [order[-1].item()]
    torch.testing.assert_close(ranking.most_traces, traces[order[:1]])
    torch.testing.assert_close(ranking.least_traces, traces[order[-1:]])


def test_double_backward_gives_the_trace_of_one_sample(
    problem: Problem, traces: torch.Tensor
) -> None:
    for i in range(7):
        assert per_sample.trace_by_double_backward(problem, i) == pytest.approx(traces[i].item())


def test_the_model_is_left_alone(problem: Problem) -> None:
    before = {name: (p.clone(), p._version) for name, p in problem.params.items()}
    per_sample.sample_traces(problem, num_probes=2, seed=4)
    per_sample.exact_sample_traces(problem, EVERY_SAMPLE)
    for name, p in problem.params.items():
        assert torch.equal(p, before[name][0])
        assert p._version == before[name][1]
