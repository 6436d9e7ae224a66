"""Curvature of every layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from secorder_func import (
    Estimate,
    LayerCurvature,
    LinearOperator,
    exact_diagonal,
    hutchinson_diagonal,
    layer_curvature,
    tree,
)
from secorder_func.operators.blocks import groups_of
from secorder_func.report.axes import figure_of
from secorder_func.report.finding import (
    Finding,
    Part,
    Settings,
    Table,
    unless_cancelled,
    with_error,
)
from secorder_func.report.plots import plot_layers
from secorder_func.report.subject import Subject
from secorder_func.typing import Tree

__all__ = ["LAYERS"]

_MOST_ROWS = 60

_MORE = 8
"""With so many parameters a probe, or fewer, the diagonal is computed exactly."""

_CHANCE = 0.05
"""How probable it may be that some entry of a layer without negative ones counts as negative."""

_HEAD = ("layer", "parameters", "trace", "mean diagonal")


def _layers(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    if subject.num_params <= _MORE * settings.num_probes:
        return _exactly(subject)
    op = subject.hessian
    layers = layer_curvature(op, settings.num_probes, which=None, generator=generator)
    diagonal = unless_cancelled(
        lambda: hutchinson_diagonal(op, settings.num_probes, generator=generator)
    )
    found = _entries(layers)
    for entry, indices in zip(found, groups_of(op.like, None, "report").values(), strict=True):
        entry["estimated_diagonal"] = (
            None if diagonal is None else _estimated(op, diagonal, indices)
        )
    spent = f"From {layers.traces.num_matvecs} random probes"
    if diagonal is not None:
        spent += f", the negative entries from {diagonal.num_matvecs} others"
    return _finding(
        layers,
        found,
        [*_HEAD, "clearly negative"],
        [[*_row(entry), _negative(entry["estimated_diagonal"])] for entry in found],
        f"{spent}. An entry of the diagonal is clearly negative if chance alone makes even one of the layer's entries "
        f"seem so with a probability of at most {100 * _CHANCE:g} %, whatever their distribution; with few probes few "
        'are resolved. "None resolved" does not say that there are none.',
    )


def _exactly(subject: Subject) -> Finding:
    """Take everything from the exact diagonal: of few parameters it costs little more than estimates."""
    op = subject.hessian
    parts = _by_group(op, exact_diagonal(op))
    sums = torch.stack([values.sum() for values in parts.values()])
    count = op.shape[0]
    layers = LayerCurvature(
        tuple(parts),
        tuple(len(values) for values in parts.values()),
        Estimate(sums, torch.zeros_like(sums), count),
        None,
        None,
    )
    found = _entries(layers)
    for entry, values in zip(found, parts.values(), strict=True):
        entry["exact_diagonal"] = {
            "least": float(values.min()),
            "greatest": float(values.max()),
            "num_negative": int((values < -_rounding(op, values)).sum()),
        }
    return _finding(
        layers,
        found,
        [*_HEAD, "entries", "negative"],
        [[*_row(entry, exact=True), *_ends(entry)] for entry in found],
        f"From the exact diagonal, {count} products or forms: nothing here is estimated. The least and the greatest "
        "entry of it, and how many are negative.",
    )


def _finding(
    layers: LayerCurvature, found: list[dict[str, Any]], head: list[str], rows: Any, said: str
) -> Finding:
    by_size = sorted(range(len(found)), key=lambda i: -abs(found[i]["trace"]))[:_MOST_ROWS]
    title = "Layers"
    if len(by_size) < len(found):
        title = f"The {len(by_size)} of {len(found)} layers with the largest traces"
    return Finding(
        numbers={"layers": found, "num_matvecs": layers.traces.num_matvecs},
        figures={"trace of each layer": lambda: _drawn(layers)},
        tables=[Table(title, head, [rows[i] for i in sorted(by_size)])],
        sentences=[said],
    )


def _entries(layers: LayerCurvature) -> list[dict[str, Any]]:
    values, errors = layers.traces.value.tolist(), layers.traces.standard_error.tolist()
    columns = zip(layers.names, layers.num_parameters, values, errors, strict=True)
    names = ("name", "num_parameters", "trace", "standard_error")
    return [dict(zip(names, column, strict=True)) for column in columns]


def _by_group(op: LinearOperator, diagonal: Tree) -> dict[str, Tensor]:
    return {
        name: _of(diagonal, indices) for name, indices in groups_of(op.like, None, "report").items()
    }


def _of(diagonal: Tree, indices: list[int]) -> Tensor:
    leaves = tree.flatten(diagonal)[0]
    return torch.cat([leaves[i].detach().reshape(-1).double().cpu() for i in indices])


def _rounding(op: LinearOperator, values: Tensor) -> float:
    return 100 * torch.finfo(op.dtype).eps * float(values.abs().max())


def _estimated(op: LinearOperator, diagonal: Estimate, indices: list[int]) -> dict[str, Any]:
    """Return what can be said of a layer's diagonal: no extremes, which are those of the noise."""
    values, errors = (_of(part, indices) for part in (diagonal.value, diagonal.standard_error))
    degrees = diagonal.degrees_of_freedom
    bound = _clear(len(values), diagonal.num_matvecs if degrees is None else degrees + 1)
    tiny = max(_rounding(op, values), torch.finfo(torch.float64).tiny)
    negative = values < -bound * errors.clamp(min=tiny)
    return {
        "num_clearly_negative": int(negative.sum()),
        "standard_errors_below_zero": bound,
        "root_mean_square_error_of_an_entry": float(errors.square().mean().sqrt()),
    }


def _clear(entries: int, probes: int) -> float:
    """Return by how many standard errors an entry is below zero if none of so many seems so by chance.

    What the other entries of a row add to a probe's value is a sum of independent random signs, symmetric about zero.
    Of symmetric variables the sum is above `x` times the root of the sum of their squares with a probability of at most
    `exp(-x^2 / 2)`: B. Efron, Student's t-test under symmetry conditions, Journal of the American Statistical
    Association 64, 1969. Infinite where the probes are too few for so many entries.
    """
    x_squared = 2 * math.log(entries / _CHANCE)
    if x_squared >= probes:
        return math.inf
    return math.sqrt(x_squared * (probes - 1) / (probes - x_squared))


def _row(entry: dict[str, Any], *, exact: bool = False) -> list[str]:
    trace, size = entry["trace"], entry["num_parameters"]
    error = None if exact else entry["standard_error"]
    mean = with_error(trace / size, None if error is None else error / size)
    return [entry["name"], f"{size:,}", with_error(trace, error), mean]


def _ends(entry: dict[str, Any]) -> list[str]:
    found = entry["exact_diagonal"]
    ends = f"{found['least']:.3g} to {found['greatest']:.3g}"
    return [ends, f"{found['num_negative']:,} of {entry['num_parameters']:,}"]


def _negative(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    count = found["num_clearly_negative"]
    return f"at least {count:,}" if count else "none resolved"


def _drawn(layers: LayerCurvature) -> Figure:
    return figure_of(plot_layers(layers))


LAYERS = Part(
    "layers",
    "Layers",
    "The trace of the Hessian's diagonal block of every layer; together they are the trace, within the errors: they "
    "are from other probes than it. Bars are two standard errors on either side. A large trace may come from many "
    "parameters or from steep ones: the mean of the diagonal tells them apart.",
    _layers,
)
