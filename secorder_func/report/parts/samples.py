"""Curvature of the loss of every sample of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from secorder_func import (
    Estimate,
    exact_trace,
    hutchinson_trace,
    per_sample_hessian_operator,
    tree,
)
from secorder_func.report.finding import (
    Finding,
    NotApplicable,
    Number,
    Part,
    Settings,
    Table,
    unless_cancelled,
)
from secorder_func.report.per_sample import ranked
from secorder_func.report.plots import plot_samples
from secorder_func.report.subject import Subject

__all__ = ["SAMPLES"]

_FEW = 4096
"""With so many parameters the traces of those that stand out are computed exactly."""

_MORE = 8
"""How many times as many probes they get otherwise; with so few parameters all samples are computed exactly."""


def _samples(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    batch, count = _first(subject, settings.num_samples)
    op = per_sample_hessian_operator(subject.f, subject.params, *batch)
    shown = min(settings.num_shown, (count + 1) // 2)
    best: _Best | None
    if subject.num_params <= _MORE * settings.num_sample_probes:
        traces = exact_trace(op)
        estimate, values, errors = None, traces.double().cpu(), None
        best = _exactly_ranked(values, shown)
    else:
        estimate = hutchinson_trace(op, settings.num_sample_probes, generator=generator)
        values = estimate.value.double().cpu()
        errors = estimate.standard_error.double().cpu()
        best = unless_cancelled(lambda: _ranked(subject, batch, values, shown, settings, generator))
    figures = {
        "traces of the samples": lambda: _histogram(values if estimate is None else estimate)
    }
    tables, ends = [], {}
    if best is not None:
        ends = {"most": best.most, "least": best.least}
        tables = [_table(name, batch, rows, best) for name, rows in ends.items()]
        inputs = tree.tensors_in(*batch)[0]
        if subject.picture(inputs[0]) is not None:
            figures["the most and the least curved samples"] = lambda: _pictures(
                subject, inputs, ends, best
            )
    order = values.argsort(descending=True, stable=True)
    share, concentration = None, ""
    if float(values.min()) >= 0 and float(values.sum()) > 0:
        share = float(values[order[: max(1, count // 10)]].sum() / values.sum())
        concentration = f"; the most curved tenth has {share:.0%} of their sum"
    middle = order[count // 2]
    key = [_number("median", values[middle], None if errors is None else errors[middle])]
    if best is not None:
        top = int(best.most[0])
        key.append(_number("largest", best.values[top], best.errors[top]))
    how = "exactly"
    if estimate is not None:
        how = f"with {estimate.num_matvecs} random probes, the same for all samples"
    return Finding(
        numbers={
            "num_samples": count,
            "num_matvecs": subject.num_params if estimate is None else estimate.num_matvecs,
            "traces": values.tolist(),
            "standard_errors": None if errors is None else errors.tolist(),
            "most_curved": None if best is None else _entries(best.most, best),
            "least_curved": None if best is None else _entries(best.least, best),
            "share_of_top_tenth": share,
        },
        key=key,
        figures=figures,
        tables=tables,
        sentences=[
            f"{_which(subject, count)}, {how}. "
            f"The mean of the traces is {float(values.mean()):.4g}{concentration}.",
            "" if best is None else best.how,
        ],
    )


def _number(which: str, value: float | Tensor, error: float | Tensor | None) -> Number:
    label = f"{which} trace of a sample"
    if error is None:
        return Number(label, float(value))
    return Number(label, float(value), float(error), "standard error")


@dataclass(frozen=True)
class _Best:
    """The samples that stand out, and their traces measured again, by row."""

    most: Tensor
    least: Tensor
    values: dict[int, float]
    errors: dict[int, float | None]
    how: str


def _exactly_ranked(values: Tensor, shown: int) -> _Best:
    ranking = ranked(lambda rows: values[rows], values, num_shown=shown)
    numbers = dict(enumerate(values.tolist()))
    return _Best(ranking.most, ranking.least, numbers, dict.fromkeys(numbers), "")


def _ranked(
    subject: Subject,
    batch: tuple[Any, ...],
    estimates: Tensor,
    shown: int,
    settings: Settings,
    generator: torch.Generator,
) -> _Best:
    """Measure those that stand out again: the largest of many estimates is too large."""
    tensors, restore = tree.tensors_and_rest(batch)
    values: dict[int, float] = {}
    errors: dict[int, float | None] = {}
    exact = subject.num_params <= _FEW
    num_probes = _MORE * settings.num_sample_probes

    def again(rows: Tensor) -> Tensor:
        some = restore([tensor[rows.to(tensor.device)] for tensor in tensors])
        op = per_sample_hessian_operator(subject.f, subject.params, *some)
        if exact:
            traces = exact_trace(op).double().cpu()
            found: list[float | None] = [None] * len(rows)
        else:
            estimate = hutchinson_trace(op, num_probes, generator=generator)
            traces = estimate.value.double().cpu()
            found = estimate.standard_error.tolist()
        values.update(zip(rows.tolist(), traces.tolist(), strict=True))
        errors.update(zip(rows.tolist(), found, strict=True))
        return traces

    ranking = ranked(again, estimates, num_shown=shown)
    how = "exactly" if exact else f"with {num_probes} other probes"
    return _Best(
        ranking.most,
        ranking.least,
        values,
        errors,
        f"Those listed are the first of the twice as many that stand out, measured again {how}.",
    )


def _entries(rows: Tensor, best: _Best) -> list[dict[str, Any]]:
    return [
        {"sample": i, "trace": best.values[i], "standard_error": best.errors[i]}
        for i in rows.tolist()
    ]


def _first(subject: Subject, most: int) -> tuple[tuple[Any, ...], int]:
    """Return the first samples of the first batch, and how many."""
    tensors, restore = tree.tensors_and_rest(subject.first_batch)
    lengths = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
    if not tensors:
        raise NotApplicable("the loss takes no data")
    if len(lengths) != 1 or None in lengths:
        raise NotApplicable("the tensors of a batch have no common leading axis of samples")
    size = int(tensors[0].shape[0])
    if size < 2:
        raise NotApplicable("a batch has one sample only")
    count = min(size, most)
    return restore([tensor[:count] for tensor in tensors]), count


def _which(subject: Subject, count: int) -> str:
    size = subject.sizes[0]
    batch = "the first batch" if subject.batches is not None else "the data"
    return f"The first {count} samples of {batch}" if count != size else f"All samples of {batch}"


def _table(name: str, batch: tuple[Any, ...], rows: Tensor, best: _Best) -> Table:
    targets = batch[-1] if len(batch) > 1 else None
    labels: list[str] | None = None
    if isinstance(targets, Tensor) and targets.ndim == 1:
        labels = [f"{targets[i].item():.4g}" for i in rows.tolist()]
    lines = []
    for place, i in enumerate(rows.tolist()):
        line = [f"#{i}"] if labels is None else [f"#{i}", labels[place]]
        lines.append([*line, str(Number("", best.values[i], best.errors[i]))])
    head = ("sample", "trace") if labels is None else ("sample", "target", "trace")
    return Table(f"The {name} curved samples", head, lines)


def _histogram(traces: Tensor | Estimate) -> Figure:
    figure: Any = plot_samples(traces).figure
    return figure  # type: ignore[no-any-return]


def _pictures(subject: Subject, inputs: Tensor, chosen: dict[str, Tensor], best: _Best) -> Figure:
    columns = max(len(rows) for rows in chosen.values())
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    grid: Any = figure.subplots(2, columns, squeeze=False)
    for line, (name, rows) in zip(grid, chosen.items(), strict=True):
        for axes, i in zip(line, rows.tolist(), strict=False):
            image: Any = subject.picture(inputs[i])
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"#{i}\n{best.values[i]:.3g}", fontsize=8)
        for axes in line[len(rows) :]:
            axes.set_visible(False)
        line[0].set_ylabel(f"{name} curved", fontsize=9)
    return figure


SAMPLES = Part(
    "samples",
    "Curvature of single samples",
    "The trace of the Hessian of the loss that each sample has alone. A long tail to the right means that few samples "
    "make most of the curvature: often mislabelled or rare ones. Where the traces are estimates, the mark above the "
    "bars is the median sample with its typical standard error; the order of samples nearer to each other than that "
    "is chance.",
    _samples,
)
