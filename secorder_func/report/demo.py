"""The demonstration: train a small classifier of digits, measure its curvature, check every number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import exact_trace, tree
from secorder_func.algorithms.probes import draw_seed
from secorder_func.report import digits, per_sample
from secorder_func.report import measurements as ms
from secorder_func.report.figures import Picture, draw
from secorder_func.report.folders import make_folder
from secorder_func.report.problem import Problem, relative_difference, watched
from secorder_func.report.progress import Stages, make_console
from secorder_func.report.results import Results, rows
from secorder_func.report.tables import DigitRow, digit_table, result_table

__all__ = ["FULL", "QUICK", "Settings", "run_demo"]

LAST_LAYER = ("2.bias", "2.weight")


@dataclass(frozen=True)
class Settings:
    """How large the demonstration is."""

    hidden: int
    num_train: int
    num_steps: int
    num_vectors: int
    trace_counts: Sequence[int]
    num_eigenvalues: int
    num_sample_probes: int
    num_shown: int


FULL = Settings(
    hidden=32,
    num_train=1437,
    num_steps=200,
    num_vectors=16,
    trace_counts=(4, 8, 16, 32, 64, 128, 256),
    num_eigenvalues=5,
    num_sample_probes=64,
    num_shown=8,
)
QUICK = Settings(
    hidden=8,
    num_train=256,
    num_steps=100,
    num_vectors=4,
    trace_counts=(4, 8, 16, 32),
    num_eigenvalues=3,
    num_sample_probes=16,
    num_shown=4,
)


def run_demo(output: Path, *, seed: int = 0, settings: Settings = FULL) -> int:
    """Run the demonstration, print its tables, write its picture to a folder; return 0 if all checks hold, else 1."""
    make_folder(output, "demo", "--output")
    console = make_console()
    stages = Stages(console)
    generator = torch.Generator().manual_seed(seed)
    data = digits.load(num_train=settings.num_train, generator=generator)
    model = digits.make_model(settings.hidden, generator=generator)
    problem = Problem.of(model, F.cross_entropy, data.train_inputs, data.train_labels)
    untrained = problem.frozen()
    console.print(
        f"A {digits.SIDE**2}-{settings.hidden}-{digits.CLASSES} tanh network, {tree.numel(problem.params)} "
        f"parameters in float64, learns to read {settings.num_train} handwritten digits."
    )
    with stages.stage(f"train, {settings.num_steps} steps of Adam", settings.num_steps) as advance:
        fit = digits.train(model, data, num_steps=settings.num_steps, advance=advance)
    results = _measure(problem, untrained, settings, generator, stages)
    ranking = results.ranking
    most = _digit_rows(problem, ranking.most, ranking.most_traces, results)
    least = _digit_rows(problem, ranking.least, ranking.least_traces, results)
    path = output / "demo.png"
    with stages.stage("draw the picture"):
        draw(_picture(problem, results, most, least), path)

    lines = rows(results)
    off = sum(not line.holds for line in lines)
    console.print(
        f"\nCross-entropy {fit.train_loss:.4f}; read rightly: {fit.train_accuracy:.1%} of the training digits, "
        f"{fit.test_accuracy:.1%} of the test digits.\n"
        "H is the Hessian of the mean cross-entropy of the training digits, G its Gauss-Newton matrix.\n"
        "Differences are relative; z is the error of an estimate in its standard errors.\n"
    )
    console.print(result_table(lines))
    console.print()
    console.print(digit_table("The most curved digits", most))
    console.print()
    console.print(digit_table("The least curved digits", least))
    console.print(
        "\nRanked by exact traces, computed for the twice as many digits whose estimates stand out."
    )
    console.print(f"{len(lines) - off} of {len(lines)} checks hold. {stages.seconds:.0f} s in all.")
    console.print(f"Picture: {path}", soft_wrap=True)
    console.print(
        "Read next: README.md has the calls behind these numbers, docs/quickstart.md explains them."
    )
    return 1 if off else 0


def _measure(
    problem: Problem,
    untrained: Problem,
    settings: Settings,
    generator: torch.Generator,
    stages: Stages,
) -> Results:
    copy = problem.frozen().params
    hessian, gauss_newton = problem.hessian(), problem.gauss_newton()
    num_params = hessian.shape[0]

    with stages.stage("one product, and the last layer's block"):
        product = ms.product_against_differences(problem, generator=generator)
        block = ms.hessian_block(problem, hessian, LAST_LAYER)
        closed_form = ms.softmax_block(*_features_and_chances(problem))

    with stages.stage("Gauss-Newton against Hessian", num_params) as advance:
        distances = [
            ms.gauss_newton_distance(
                at.hessian(),
                at.gauss_newton(),
                num_vectors=settings.num_vectors,
                generator=generator,
            )
            for at in (untrained, problem)
        ]
        gauss_newton_trace = exact_trace(watched(gauss_newton, advance)).item()
        fisher_trace = ms.fisher_trace(problem)

    products = sum(settings.trace_counts) + num_params
    with stages.stage("trace, estimated and exact", products) as advance:
        trace = ms.trace_convergence(
            watched(hessian, advance), settings.trace_counts, seed=draw_seed(generator)
        )

    with stages.stage("eigenvalues, by SciPy") as advance:
        spectrum = ms.spectrum(
            watched(hessian, advance), settings.num_eigenvalues, generator=generator
        )

    num_probes = settings.num_sample_probes
    with stages.stage("trace for every sample, estimated", num_probes) as advance:
        samples = per_sample.sample_traces(
            problem, num_probes=num_probes, seed=draw_seed(generator), advance=advance
        )

    with stages.stage("trace for the samples that stand out, exact"):
        ranking = per_sample.rank(problem, samples.estimate.value, num_shown=settings.num_shown)
        reference = per_sample.trace_by_double_backward(problem, int(ranking.most[0]))

    return Results(
        num_params=num_params,
        product=product,
        block=relative_difference(block, closed_form),
        block_size=len(block),
        before=distances[0],
        after=distances[1],
        gauss_newton_trace=gauss_newton_trace,
        fisher_trace=fisher_trace,
        trace=trace,
        spectrum=spectrum,
        samples=samples,
        ranking=ranking,
        reference=reference,
        untouched=all(torch.equal(p, copy[name]) for name, p in problem.params.items()),
    )


def _features_and_chances(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return what the last layer of the digit network sees and what it predicts."""
    params = problem.params
    features = torch.tanh(problem.inputs @ params["0.weight"].T + params["0.bias"])
    return features, problem.model_fn(params, problem.inputs).softmax(1)


def _digit_rows(
    problem: Problem, indices: Tensor, traces: Tensor, results: Results
) -> list[DigitRow]:
    outputs = problem.model_fn(problem.params, problem.inputs[indices])
    labels = problem.targets[indices]
    columns = (
        indices,
        labels,
        outputs.argmax(1),
        F.cross_entropy(outputs, labels, reduction="none"),
        traces,
        results.samples.estimate.value[indices],
        results.samples.estimate.standard_error[indices],
    )
    return [
        DigitRow(*entries) for entries in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _picture(
    problem: Problem, results: Results, most: list[DigitRow], least: list[DigitRow]
) -> Picture:
    return Picture(
        most,
        least,
        problem.inputs,
        results.trace,
        results.spectrum,
        problem.losses(problem.params, problem.inputs, problem.targets),
        results.samples.estimate.value,
    )
