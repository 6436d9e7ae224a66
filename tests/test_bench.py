"""What the measurements stand on: the checks before timing, the oracles, the page. Nothing is timed here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench import (
    blocks,
    choice,
    data_growth,
    estimators,
    growth,
    oracles,
    per_sample_curvature,
    processes,
    report,
    sampled_peers,
    tables,
)
from bench.harness import (
    Candidate,
    UnavailableError,
    compare,
    gradient,
    leaves,
    relative_error,
    write,
)
from bench.problems import SAMPLED, Problem, problem
from bench.products import columns
from bench.spectra import Spectrum, spectra
from secorder_func import Estimate, hutchinson_trace


@pytest.fixture(scope="module")
def tiny() -> Problem:
    return problem("tiny")


def measured(p: Problem, *candidates: Candidate) -> dict[str, dict[str, Any]]:
    truth = [g.double() for g in gradient(p)()]
    records = compare(
        p,
        gradient(p),
        candidates,
        lambda result: relative_error(result, truth),
        tolerance=1e-4,
        seconds=0.01,
    )
    return {record["name"]: record for record in records}


def _doubled(p: Problem) -> Any:
    return lambda: [2 * g for g in gradient(p)()]


def _raises(p: Problem) -> Any:
    def run() -> Any:
        raise NotImplementedError("no rule for this\nand a long story")

    return run


def _absent(p: Problem) -> Any:
    raise UnavailableError("other is not installed")


def test_a_wrong_candidate_of_ours_stops_the_run(tiny: Problem) -> None:
    with pytest.raises(AssertionError, match="twice on tiny: relative error 1"):
        measured(tiny, Candidate("twice", _doubled))


def test_a_candidate_of_ours_that_raises_stops_the_run(tiny: Problem) -> None:
    with pytest.raises(NotImplementedError, match="no rule"):
        measured(tiny, Candidate("none", _raises))


def test_a_wrong_peer_is_timed_and_marked(tiny: Problem) -> None:
    record = measured(tiny, Candidate("twice", _doubled, peer=True))["twice"]
    assert not record["right"]
    assert record["relative_error"] == pytest.approx(1)
    assert record["milliseconds"]["rounds"] >= 3


def test_a_peer_that_cannot_is_left_out_with_its_reason(tiny: Problem) -> None:
    records = measured(
        tiny,
        Candidate("none", _raises, peer=True),
        Candidate("absent", _absent, peer=True),
        Candidate("same", gradient, peer=True),
    )
    assert records["none"]["left_out"] == "NotImplementedError: no rule for this"
    assert records["absent"]["left_out"] == "other is not installed"
    assert records["same"]["right"]
    assert set(records["gradient"]["relative_to_peers"]) == {"same"}


def test_a_part_that_is_timed_counts_as_often_as_the_whole_takes_it(tiny: Problem) -> None:
    whole, part = Candidate("whole", gradient), Candidate("part", gradient, times=1000)
    records = measured(tiny, whole, part)
    ratio = records["part"]["gradients"]["median"] / records["whole"]["gradients"]["median"]
    assert 100 < ratio < 10_000


def test_one_of_ours_can_be_what_the_others_are_compared_with(tiny: Problem) -> None:
    records = compare(
        tiny,
        gradient(tiny),
        [Candidate("a", gradient), Candidate("b", gradient)],
        lambda result: 0.0,
        tolerance=1.0,
        seconds=0.01,
        beside="b",
    )
    assert [set(record["relative_to_peers"]) for record in records] == [{"b"}, {"b"}, set()]


def test_a_result_that_cannot_be_written_leaves_the_one_of_before(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write(path, {"a": 1})
    with pytest.raises(TypeError):
        write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    p = problem("gpt_tiny").double()
    rows = torch.stack([p.rows(i, i + 1).closure() for i in range(p.inputs.shape[0])])
    torch.testing.assert_close(rows.mean(), p.closure())


def test_the_reference_of_a_trace_is_that_of_the_matrix(tiny: Problem) -> None:
    wide = tiny.double()
    shapes = [q.shape for q in wide.parameters]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        params = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        outputs = torch.func.functional_call(
            wide.model, dict(zip(wide.names, params, strict=True)), wide.inputs
        )
        return torch.nn.functional.cross_entropy(outputs, wide.targets)

    flat = torch.cat([q.detach().flatten() for q in wide.parameters])
    matrix = torch.autograd.functional.hessian(loss, flat)
    off = matrix - matrix.diagonal().diag()
    trace, error, spread = oracles.trace(tiny)
    assert error == 0
    assert trace == pytest.approx(float(matrix.trace()))
    assert spread == pytest.approx(float(2 * off.square().sum()) ** 0.5)


def test_the_exponent_of_a_power_is_its_exponent() -> None:
    xs = [1.0, 3.0, 10.0]
    assert growth.exponent(xs, [5 * x**1.5 for x in xs]) == 1.5
    assert growth.exponent(xs, [0.0, 1.0, 2.0]) is None


# --------------------------------------------------------------------- curvature of every sample


def _few(name: str) -> Problem:
    return problem(name).rows(0, 3).double()


@pytest.mark.parametrize("name", SAMPLED)
def test_the_reference_of_every_sample_is_that_of_its_matrix(name: str) -> None:
    p = _few(name)
    vectors = [list(p.vector)]
    diagonal = oracles.sampled(p, "ggn diagonal", vectors)
    (trace,) = oracles.sampled(p, "ggn trace", vectors)
    torch.testing.assert_close(trace, torch.stack([d.flatten(1).sum(1) for d in diagonal]).sum(0))
    product = oracles.sampled(p, "product", vectors)
    (form,) = oracles.sampled(p, "trace", vectors)
    dots = [(a * b).flatten(1).sum(1) for a, b in zip(product, p.vector, strict=True)]
    torch.testing.assert_close(form, torch.stack(dots).sum(0))


@pytest.mark.parametrize("task", per_sample_curvature.TASKS)
@pytest.mark.parametrize("name", SAMPLED)
def test_every_way_to_the_curvature_of_samples_has_its_answer(name: str, task: str) -> None:
    p = _few(name)
    vectors = per_sample_curvature.vectors_of(p, task)
    truth = oracles.sampled(p, task, vectors)
    for run in (
        per_sample_curvature.all_samples(p, task),
        per_sample_curvature.one_by_one(p, task, 3),
        sampled_peers.loop(p, task, vectors, 3),
        sampled_peers.mapped(p, task, vectors),
    ):
        assert relative_error(columns(leaves(run()), len(truth)), truth) < 1e-10


# ---------------------------------------------------------------------------------- estimators


def _exponential() -> Spectrum:
    return next(s for s in spectra() if s.name == "exponential")


@pytest.mark.parametrize("spectrum", spectra(), ids=lambda s: s.name)
def test_a_matrix_has_the_eigenvalues_that_are_said(spectrum: Spectrum) -> None:
    found = torch.linalg.eigvalsh(spectrum.matrix())
    torch.testing.assert_close(found, spectrum.eigenvalues.sort().values)


def test_the_rate_of_an_error_is_its_power_or_its_factor() -> None:
    flat, exponential = spectra()[0], _exponential()
    hutchinson, _, xtrace, *_ = estimators.ESTIMATORS
    counts = [10, 20, 40]
    slope = estimators.rate_of(flat, hutchinson, counts, [3 * c**-0.5 for c in counts])
    assert slope == {"kind": "slope", "found": -0.5, "theory": -0.5}
    factor = estimators.rate_of(exponential, xtrace, counts, [3 * 0.9**c for c in counts])
    assert factor == {"kind": "factor", "found": 0.9, "theory": 0.8367}


def _sure_of_itself(*args: Any, **options: Any) -> Estimate:
    found = hutchinson_trace(*args, **options)
    return replace(found, standard_error=found.standard_error / 3)


def test_intervals_that_hold_too_seldom_stop_the_run() -> None:
    estimator = estimators.Estimator(_sure_of_itself, torch.trace)
    spectrum = _exponential()
    with pytest.raises(AssertionError, match="_sure_of_itself on exponential, 24: 95 % intervals"):
        estimators.measured(spectrum, estimator, spectrum.matrix(), range(100))


def _shifted(*args: Any, **options: Any) -> Estimate:
    found = hutchinson_trace(*args, **options)
    return replace(found, value=found.value + 1)


def test_a_biased_estimator_stops_the_run() -> None:
    estimator = estimators.Estimator(_shifted, torch.trace)
    spectrum = _exponential()
    with pytest.raises(AssertionError, match="spreads from the truth"):
        estimators.measured(spectrum, estimator, spectrum.matrix(), range(20))


def _answer(tiny: Problem) -> dict[str, Any]:
    records = measured(
        tiny,
        Candidate("ours", gradient),
        Candidate("torch-secorder exact_hvp", gradient, peer=True),
        Candidate("twice", _doubled, peer=True),
        Candidate("absent", _absent, peer=True),
    )
    entry = {"name": "tiny", "description": "an MLP", "parameters": 244}
    machine = {
        "processor": "a processor",
        "cores": 2,
        "threads": 1,
        "system": "Linux",
        "versions": {"torch": "2"},
    }
    return {
        "question": "What?",
        "notes": ["A note."],
        "problems": [{**entry, "candidates": list(records.values())}],
        "machine": machine,
    }


def test_the_page_says_what_was_wrong_and_what_was_left_out(tiny: Problem, tmp_path: Path) -> None:
    write(tmp_path / "single_product.json", _answer(tiny))
    page = tmp_path / "page.md"
    report.write_page(tmp_path, page, tmp_path / "images")
    text = page.read_text()
    assert "**wrong by 100.0%**" in text
    assert "- absent on tiny: other is not installed" in text
    assert "| torch-secorder exact_hvp (other) | 1.00 |" in text
    assert "(images/single_product.svg)" in text


def _record(
    name: str, gradients: float, *, right: bool = True, ratio: float = 1.0
) -> dict[str, Any]:
    quartiles = {"lower_quartile": gradients, "median": gradients, "upper_quartile": gradients}
    return {
        "name": name,
        "peer": name != "hvp",
        "gradients": quartiles,
        "right": right,
        "relative_error": 1e-7 if right else 1.0,
        "relative_to_peers": {"torch-secorder exact_hvp": ratio},
    }


def _two_models(tiny: Problem) -> dict[str, Any]:
    answer = _answer(tiny)
    (first,) = answer["problems"]
    unit = first["candidates"][0]
    faster, wrong = _record("a compiler", 1.5), _record("quick and wrong", 0.1, right=False)
    records = {
        "tiny": [_record("hvp", 3, ratio=1.5), _record("torch-secorder exact_hvp", 2.5), faster],
        "deep": [_record("hvp", 2, ratio=0.5), _record("torch-secorder exact_hvp", 4), wrong],
    }
    problems = [
        {**first, "name": name, "candidates": [{**unit, "gradients": {"median": 1}}, *own]}
        for name, own in records.items()
    ]
    return {**answer, "problems": problems}


def test_the_page_begins_with_what_ours_costs_and_where_it_is_slower(
    tiny: Problem, tmp_path: Path
) -> None:
    write(tmp_path / "single_product.json", _two_models(tiny))
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    short = (tmp_path / "page.md").read_text().partition("## Models")[0]
    (row,) = (line for line in short.splitlines() if "| `hvp` |" in line)
    assert "| 2.00–3.00<br><small>deep, tiny</small> | torch-secorder exact_hvp |" in row
    assert "| 0.50–1.50<br><small>deep, tiny</small> | tiny 1.50 |" in row  # as they were measured


def test_the_page_says_who_is_faster_than_all_of_ours(tiny: Problem, tmp_path: Path) -> None:
    write(tmp_path / "single_product.json", _two_models(tiny))
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    short = (tmp_path / "page.md").read_text().partition("## Models")[0]
    assert "| a compiler | 2.00 | tiny |" in short
    assert "| torch-secorder exact_hvp | 1.20 | tiny |" in short
    assert "quick and wrong" not in short


def _estimators_answer(tiny: Problem) -> dict[str, Any]:
    spectrum = _exponential()
    hutchinson = estimators.Estimator(hutchinson_trace, torch.trace, "no_such_function")
    records = estimators.measured(spectrum, hutchinson, spectrum.matrix(), range(12))
    entry = {
        "name": "exponential",
        "description": "0.7^i",
        "parameters": 80,
        "seeds": 12,
        "products": spectrum.counts,
    }
    return {**_answer(tiny), "problems": [{**entry, "candidates": records}]}


def test_the_page_says_how_errors_fall(tiny: Problem, tmp_path: Path) -> None:
    write(tmp_path / "estimators.json", _estimators_answer(tiny))
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "Share of 95 % intervals that hold the truth:" in text
    assert "not within 4,096" in text
    assert "- curvlinops no_such_function on exponential: curvlinops is not installed" in text
    assert "- **exponential**" not in text  # it is no model
    assert (tmp_path / "estimators.svg").exists()


def test_the_page_says_how_many_times_as_long_a_loop_takes(tiny: Problem, tmp_path: Path) -> None:
    answer = _answer(tiny)
    facts = {"samples": 32, "task": "product", "float64_error": 1e-15, "fold": 4}
    answer["problems"][0] |= facts
    answer["problems"][0]["candidates"][1]["relative_to_peers"] = {"loop": 0.25, "vmap": 2}
    write(tmp_path / "per_sample_curvature.json", answer)
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "| product | 4 |" in text
    assert "of ours in float64: 1e-15" in text
    assert (tmp_path / "per_sample_curvature.svg").exists()


def test_the_page_says_what_processes_send(tiny: Problem, tmp_path: Path) -> None:
    one = {"median": 1.0, "lower_quartile": 0.9, "upper_quartile": 1.1, "rounds": 3}
    records = [
        {
            "name": f"{way.shared}, {way.processes}",
            "peer": False,
            "shared": way.shared,
            "processes": way.processes,
            "milliseconds": one,
            "to_one": one,
            "calls": 21,
            "bytes": 126 if way.shared == "vectors" else 32_750_104,
            "relative_error": 1e-7,
        }
        for way in processes.WAYS
    ]
    answer = _answer(tiny)
    answer["problems"][0] |= {"name": "trace", "axis": "processes", "candidates": records}
    write(tmp_path / "processes.json", answer)
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "| **trace, data shared** | 1.00<br><small>0.90–1.10</small> |" in text
    assert "| **trace, data shared** | 21<br><small>32.8 MB</small> |" in text
    assert "| **trace, vectors shared** | 21<br><small>126 B</small> |" in text
    assert (tmp_path / "processes.svg").exists()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_messages_and_their_bytes_are_counted(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        p = data_growth.Data(4, 2, 3)
        product, trace, _ = processes.TASKS
        op = processes.Way("vectors", 1).operator(p, True)
        with processes.counted() as given:
            product.call(p, op)
        assert given.calls == 2  # a few numbers, then the product
        assert 4 * p.num_parameters <= given.size <= 4 * p.num_parameters + 200
        with processes.counted() as given:
            trace.call(p, op)
        assert given.calls == 3  # a seed, a few numbers, and the forms
        assert 8 * 8 < given.size < 400
    finally:
        dist.destroy_process_group()


def test_an_error_against_one_process_stops_the_run() -> None:
    one, two = processes.WAYS[0], processes.WAYS[2]
    results = {one: [torch.ones(2)], two: [torch.tensor([1.0, 1.001])]}
    with pytest.raises(AssertionError, match="product, data shared, processes: 2: relative error"):
        processes._errors(results, processes.TASKS[0])


def test_a_figure_is_the_same_for_the_same_numbers(tiny: Problem, tmp_path: Path) -> None:
    write(tmp_path / "single_product.json", _answer(tiny))
    texts = []
    for name in ("a", "b"):
        report.write_page(tmp_path, tmp_path / "page.md", tmp_path / name)
        texts.append((tmp_path / name / "single_product.svg").read_text())
    assert texts[0] == texts[1]
    assert "<svg" in texts[0]


def test_a_figure_holds_quartiles_far_above_the_medians(tiny: Problem, tmp_path: Path) -> None:
    answer = _answer(tiny)
    for record in answer["problems"][0]["candidates"]:
        if "gradients" in record:
            record["gradients"] = {"median": 1.0, "lower_quartile": 0.9, "upper_quartile": 500.0}
    write(tmp_path / "single_product.json", answer)
    report.write_page(tmp_path, tmp_path / "page.md", tmp_path)
    assert (tmp_path / "single_product.svg").exists()


def test_results_of_different_machines_make_no_page(tiny: Problem, tmp_path: Path) -> None:
    answer = _answer(tiny)
    write(tmp_path / "single_product.json", answer)
    write(tmp_path / "ggn.json", {**answer, "machine": {**answer["machine"], "threads": 2}})
    with pytest.raises(ValueError, match="ggn: of another machine"):
        report.write_page(tmp_path, tmp_path / "page.md", tmp_path / "images")


def test_closed_form_diagonals_are_those_of_the_dense_matrices() -> None:
    network = choice.trained("small", 3, 60, 5)
    closed = choice.diagonals(network)
    params = {n: p.detach().double() for n, p in network.model.named_parameters()}
    x, y = network.inputs.double(), network.labels

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]

    def diagonal(f: Any, name: str) -> Tensor:
        def of_one(leaf: Tensor) -> Tensor:
            return f({**params, name: leaf})

        n = params[name].numel()
        dense: Any = torch.func.hessian(of_one)(params[name])
        return dense.reshape(n, n).diagonal().reshape(params[name].shape)

    z = outputs(params)
    p = z.softmax(1)

    def linearised(q: dict[str, Tensor]) -> Tensor:
        """Return the loss's quadratic form in the outputs, whose Hessian at the parameters is Gauss-Newton's."""
        step = outputs(q) - z
        return (p * step.square()).sum(1).sub((p * step).sum(1).square()).mean() / 2

    for name in params:
        exact = diagonal(lambda q: F.cross_entropy(outputs(q), y), name)
        torch.testing.assert_close(closed["Hessian"][name], exact, rtol=1e-9, atol=1e-12)
        exact = diagonal(linearised, name)
        torch.testing.assert_close(closed["Gauss-Newton"][name], exact, rtol=1e-9, atol=1e-12)


def test_the_cost_of_an_error_is_read_off_between_two_counts() -> None:
    points = [(10.0, 0.4), (40.0, 0.2), (160.0, 0.1)]  # the error falls with the root of the cost
    assert tables.cost_of(points, 0.5) == 10.0
    assert tables.cost_of(points, 0.2) == pytest.approx(40.0)
    assert tables.cost_of(points, 0.2 / math.sqrt(2)) == pytest.approx(80.0)
    assert tables.cost_of(points, 0.05) is None


def test_blocks_of_pages_are_those_of_the_results() -> None:
    for (page, name), rows in blocks.BLOCKS.items():
        text = (blocks.ROOT / page).read_text()
        found = text.split(f"<!-- {name},")[1].split("-->\n", 1)[1].split("<!-- end of")[0]
        assert found.strip().splitlines() == rows()
