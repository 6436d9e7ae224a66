"""Curvature of the loss of every sample, of as many as are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from secorder_func import (
    Estimate,
    exact_trace,
    hutchinson_trace,
    per_sample_hessian_operator,
    running,
    tree,
)
from secorder_func.report.axes import figure_of
from secorder_func.report.finding import (
    Finding,
    NotApplicable,
    Number,
    Part,
    Settings,
    Table,
    unless_cancelled,
    with_error,
)
from secorder_func.report.parts.rows import Rows
from secorder_func.report.per_sample import ranked
from secorder_func.report.plots import plot_samples
from secorder_func.report.sample_plots import typical
from secorder_func.report.subject import Subject
from secorder_func.seeds import draw_seed

__all__ = ["SAMPLES"]

_FEW = 4096
"""With so many parameters the traces of those that stand out are computed exactly."""

_MORE = 8
"""How many times as many probes they get otherwise; with so few parameters all samples are computed exactly."""

_CLEAR = 2.0
"""By how many standard errors of their difference two traces differ whose order is resolved."""


def _samples(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    rows = Rows(subject, settings.num_samples)
    seed = draw_seed(generator)
    exact = subject.num_params <= _MORE * settings.num_sample_probes
    traces = _all(rows, None if exact else settings.num_sample_probes, seed)
    if traces.count < 2:
        raise NotApplicable("there is one sample only")
    shown = min(settings.num_shown, (traces.count + 1) // 2)
    best = unless_cancelled(lambda: _best(rows, traces, shown, settings, generator))
    which = rows.named(traces.count)
    name = f"traces of {which}"
    figures = {name: lambda: _histogram(traces)}
    captions = {name: _caption(traces, best)}
    tables = []
    if best is not None:
        tables = [
            _table(f"The most curved of {which}", best.most, best, traces, 1),
            _table(f"The least curved of {which}", best.least, best, traces, -1),
        ]
        if any(picture is not None for picture in best.pictures.values()):
            shown_as = f"the most and the least curved of {which}"
            figures[shown_as] = lambda: _pictures(best)
            if any(table.note for table in tables):
                captions[shown_as] = "What is not resolved of their order is said below the tables."
    middle, error = typical(traces.values, traces.errors)
    share = _share_of_top_tenth(traces)
    return Finding(
        numbers={
            "num_samples": traces.count,
            "which": which,
            "shuffled": rows.shuffled,
            "num_matvecs": traces.num_matvecs,
            "traces": traces.values.tolist(),
            "standard_errors": None if traces.errors is None else traces.errors.tolist(),
            "median": middle,
            "typical_error_of_one_sample": error,
            "most_curved": None if best is None else _entries(best.most, best),
            "least_curved": None if best is None else _entries(best.least, best),
            "share_of_top_tenth": share,
        },
        key=_key(traces, best, which),
        figures=figures,
        captions=captions,
        tables=tables,
        sentences=[
            f"{which[0].upper()}{which[1:]}, {_how(traces)}. {rows.remark}".strip(),
            _mean(traces, share),
            "" if best is None else best.how,
        ],
    )


@dataclass(frozen=True, eq=False)
class _Traces:
    """Of all samples, by number; without errors they are exact."""

    values: Tensor
    errors: Tensor | None
    num_matvecs: int

    @property
    def count(self) -> int:
        return len(self.values)


def _all(rows: Rows, num_probes: int | None, seed: int) -> _Traces:
    """Measure batch after batch, all with the same probes; when it is cancelled, return what there is."""
    found: list[_Traces] = []
    for batch in rows:
        part = unless_cancelled(partial(_measured, rows.subject, batch, num_probes, seed))
        if part is None:
            break
        found.append(part)
    if not found:
        raise running.Cancelled
    errors = [part.errors for part in found if part.errors is not None]
    return _Traces(
        torch.cat([part.values for part in found]),
        torch.cat(errors) if errors else None,
        max(part.num_matvecs for part in found),
    )


def _measured(
    subject: Subject, batch: tuple[Any, ...], num_probes: int | None, seed: int
) -> _Traces:
    """Measure the samples of a batch, exactly if no number of probes is given."""
    op = per_sample_hessian_operator(subject.f, subject.params, *batch)
    if num_probes is None:
        return _Traces(exact_trace(op).double().cpu(), None, subject.num_params)
    estimate = hutchinson_trace(op, num_probes, generator=torch.Generator().manual_seed(seed))
    values, errors = estimate.value, estimate.standard_error
    return _Traces(values.double().cpu(), errors.double().cpu(), estimate.num_matvecs)


def _how(traces: _Traces) -> str:
    if traces.errors is None:
        return "exactly"
    return f"with {traces.num_matvecs} random probes, the same for all samples"


def _mean(traces: _Traces, share: float | None) -> str:
    """Say what the mean is; its error is at most the mean error, whatever the probes that samples share do to it."""
    mean = float(traces.values.mean())
    error = None if traces.errors is None else float(traces.errors.mean())
    said = f"The mean of the traces is {with_error(mean, error)}"
    if error is not None:
        said += ", with a standard error of at most that"
    if share is not None:
        said += f"; the most curved tenth has {share:.0%} of their sum"
    return f"{said}."


def _share_of_top_tenth(traces: _Traces) -> float | None:
    """Return it where it is not the doing of errors, which raise whatever is chosen for being large."""
    values, errors = traces.values, traces.errors
    if not float(values.min()) >= 0 or not float(values.sum()) > 0:
        return None
    top = values.argsort(descending=True, stable=True)[: max(1, len(values) // 10)]
    total = float(values[top].sum())
    if errors is not None and not float(errors[top].sum()) < 0.1 * total:
        return None
    return total / float(values.sum())


# ------------------------------------------------------------------------- those that stand out


@dataclass(frozen=True, eq=False)
class _Best:
    """The samples that stand out, and their traces, labels and pictures, by number."""

    most: list[int]
    least: list[int]
    values: dict[int, float]
    errors: dict[int, float | None]
    labels: dict[int, str | None]
    pictures: dict[int, Tensor | None]
    how: str
    again: str


def _best(
    rows: Rows, traces: _Traces, shown: int, settings: Settings, generator: torch.Generator
) -> _Best:
    """Measure those that stand out again, if they are estimates: the largest of many estimates is too large."""
    values: dict[int, float] = {}
    errors: dict[int, float | None] = {}
    labels: dict[int, str | None] = {}
    pictures: dict[int, Tensor | None] = {}
    exact = rows.subject.num_params <= _FEW
    num_probes = None if exact else _MORE * settings.num_sample_probes
    seed = draw_seed(generator)

    def again(chosen: Tensor) -> Tensor:
        for numbers, batch in rows.chosen(chosen.tolist()):
            found = _Traces(traces.values[numbers], None, 0)
            if traces.errors is not None:
                found = _measured(rows.subject, batch, num_probes, seed)
            spread = [None] * len(numbers) if found.errors is None else found.errors.tolist()
            values.update(zip(numbers, found.values.tolist(), strict=True))
            errors.update(zip(numbers, spread, strict=True))
            for place, number in enumerate(numbers):
                labels[number] = _label(batch, place)
                pictures[number] = rows.subject.picture(tree.tensors_in(*batch)[0][place])
        return torch.tensor([values[number] for number in chosen.tolist()], dtype=torch.float64)

    kept = shown if traces.errors is None else max(shown, _affordable(rows, traces, num_probes))
    ranking = ranked(again, traces.values, num_shown=kept)
    how = means = ""
    if traces.errors is not None:
        means = "exactly" if exact else f"with {num_probes} other probes"
        count = min(2 * kept, traces.count)
        how = f"Those listed are the first of the {count} at either end that stand out, measured again {means}."
    most, least = ranking.most[:shown].tolist(), ranking.least[:shown].tolist()
    return _Best(most, least, values, errors, labels, pictures, how, means)


def _affordable(rows: Rows, traces: _Traces, num_probes: int | None) -> int:
    """Return a quarter of how many samples can be measured again for half of what all of them cost before."""
    cost = rows.subject.num_params if num_probes is None else num_probes
    return traces.num_matvecs * traces.count // (8 * cost)


def _missed(traces: _Traces, best: _Best, sign: int, bound: float) -> int:
    """Return how many that were not measured again may be beyond a bound, above it or, if `sign` is -1, below."""
    if traces.errors is None:
        return 0
    beyond = sign * traces.values + _CLEAR * traces.errors > sign * bound
    beyond[list(best.values)] = False
    return int(beyond.sum())


def _label(batch: tuple[Any, ...], place: int) -> str | None:
    targets = batch[-1] if len(batch) > 1 else None
    if isinstance(targets, Tensor) and targets.ndim == 1:
        return f"{targets[place].item():.4g}"
    return None


def _entries(numbers: list[int], best: _Best) -> list[dict[str, Any]]:
    return [
        {"sample": i, "trace": best.values[i], "standard_error": best.errors[i]} for i in numbers
    ]


def _key(traces: _Traces, best: _Best | None, which: str) -> list[Number]:
    middle, error = typical(traces.values, traces.errors)
    label = f"median trace of a sample ({which})"
    if error is None:
        key = [Number(label, middle)]
    else:
        meaning = "typical error of one sample: the median of their standard errors"
        key = [Number(label, middle, error, meaning)]
    if best is not None:
        key.append(_largest(traces, best, which))
    return key


def _largest(traces: _Traces, best: _Best, which: str) -> Number:
    top = best.most[0]
    value, error = best.values[top], best.errors[top]
    meaning = "exact but for rounding" if error is None else "standard error"
    if len(best.most) > 1 and not _resolved(best, *best.most[:2]):
        meaning += "; which sample is the most curved is not resolved"
    missed = _missed(traces, best, 1, value)
    if missed:
        meaning += f"; {_others(missed)} may have a larger one"
    return Number(f"largest trace of a sample ({which})", value, error, meaning)


def _others(count: int) -> str:
    return f"{count:,} {'other' if count == 1 else 'others'}"


def _resolved(best: _Best, one: int, other: int) -> bool:
    """Say whether two samples differ by more than the error of their difference, as if their errors were apart."""
    error = math.hypot(best.errors[one] or 0.0, best.errors[other] or 0.0)
    return abs(best.values[one] - best.values[other]) >= _CLEAR * error


def _order(numbers: list[int], best: _Best) -> str:
    """Say what of an order is within the errors."""
    pairs = list(pairwise(numbers))
    if best.values[numbers[0]] == best.values[numbers[-1]] and len(numbers) > 1:
        return "All of them are equal."
    if all(_resolved(best, *pair) for pair in pairs):
        return ""
    if not _resolved(best, numbers[0], numbers[-1]):
        return "The order is not resolved: these samples differ by less than twice their errors."
    return "The order is not resolved where neighbours differ by less than twice their errors."


def _table(title: str, numbers: list[int], best: _Best, traces: _Traces, sign: int) -> Table:
    labelled = all(best.labels[i] is not None for i in numbers)
    lines = [
        [
            f"#{i}",
            *([best.labels[i] or ""] if labelled else []),
            with_error(best.values[i], best.errors[i]),
        ]
        for i in numbers
    ]
    head = ("sample", "target", "trace") if labelled else ("sample", "trace")
    notes = [_order(numbers, best)]
    missed = _missed(traces, best, sign, best.values[numbers[-1]])
    if missed:
        notes.append(
            f"By their estimates {_others(missed)}, not measured again, may belong here as well."
        )
    return Table(title, head, lines, " ".join(note for note in notes if note))


# -------------------------------------------------------------------------------------- figures


def _caption(traces: _Traces, best: _Best | None) -> str:
    if traces.errors is None:
        return "All are exact."
    said = "Of estimates, which their errors spread out."
    if best is not None:
        said += f" The samples listed below were measured again {best.again}: there they have other, better numbers."
    return said


def _histogram(traces: _Traces) -> Figure:
    shown: Tensor | Estimate = traces.values
    if traces.errors is not None:
        shown = Estimate(traces.values, traces.errors, traces.num_matvecs)
    return figure_of(plot_samples(shown))


def _pictures(best: _Best) -> Figure:
    chosen = {"most": best.most, "least": best.least}
    columns = max(len(numbers) for numbers in chosen.values())
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    grid: Any = figure.subplots(2, columns, squeeze=False)
    for line, (name, numbers) in zip(grid, chosen.items(), strict=True):
        for axes, i in zip(line, numbers, strict=False):
            image: Any = best.pictures[i]
            if image is not None:
                axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"#{i}\n{best.values[i]:.3g}", fontsize=8)
        for axes in line[len(numbers) :]:
            axes.set_visible(False)
        line[0].set_ylabel(f"{name} curved", fontsize=9)
    return figure


SAMPLES = Part(
    "samples",
    "Curvature of single samples",
    "The trace of the Hessian of the loss that each sample has alone. A long tail to the right means that few samples "
    "make most of the curvature: often mislabelled or rare ones. Where the traces are estimates, the mark above the "
    "bars is the median of the samples, and its bar the typical error of one sample, the median of their standard "
    "errors; the order of samples nearer to each other than that is chance.",
    _samples,
)
