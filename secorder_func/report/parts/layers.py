"""Curvature of every layer."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from secorder_func import Estimate, LayerCurvature, hutchinson_diagonal, layer_curvature, tree
from secorder_func.operators.blocks import groups_of
from secorder_func.report.finding import Finding, Part, Settings, Table, unless_cancelled
from secorder_func.report.plots import plot_layers
from secorder_func.report.subject import Subject

__all__ = ["LAYERS"]

_MOST_ROWS = 60


def _layers(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    op = subject.hessian
    layers = layer_curvature(op, settings.num_probes, which=None, generator=generator)
    diagonal = unless_cancelled(
        lambda: hutchinson_diagonal(op, settings.num_probes, generator=generator)
    )
    groups = groups_of(op.like, None, "report")
    found = []
    for i, name in enumerate(layers.names):
        entry: dict[str, Any] = {
            "name": name,
            "num_parameters": layers.num_parameters[i],
            "trace": float(layers.traces.value[i]),
            "standard_error": float(layers.traces.standard_error[i]),
        }
        entry["diagonal"] = None if diagonal is None else _summary(diagonal, groups[name])
        found.append(entry)
    by_size = sorted(found, key=lambda entry: -abs(entry["trace"]))[:_MOST_ROWS]
    shown = [entry for entry in found if any(entry is other for other in by_size)]
    title = "Layers"
    if len(shown) < len(found):
        title = f"The {len(shown)} of {len(found)} layers with the largest traces"
    return Finding(
        numbers={"layers": found, "num_matvecs": layers.traces.num_matvecs},
        figures={"trace of each layer": lambda: _drawn(layers)},
        tables=[
            Table(
                title,
                ("layer", "parameters", "trace", "mean diagonal", "entries", "negative"),
                [_row(entry) for entry in shown],
            )
        ],
        sentences=[
            f"Both from {settings.num_probes} random probes. Of the diagonal: its mean; its least and greatest "
            "estimated entry, with the typical error of one; the share of entries that are below zero by more than "
            "two standard errors (2 % are so by chance)."
        ],
    )


def _summary(diagonal: Estimate, indices: list[int]) -> dict[str, Any]:
    """Return what the estimated diagonal of a layer is like."""
    values, errors = (
        torch.cat([tree.flatten(part)[0][i].detach().reshape(-1).double().cpu() for i in indices])
        for part in (diagonal.value, diagonal.standard_error)
    )
    return {
        "mean": float(values.mean()),
        "standard_deviation": float(values.std(correction=0)),
        "least": float(values.min()),
        "greatest": float(values.max()),
        "share_negative": float((values < -2 * errors).double().mean()),
        "typical_error": float(errors.square().mean().sqrt()),
    }


def _row(entry: dict[str, Any]) -> list[str]:
    row = [
        entry["name"],
        f"{entry['num_parameters']:,}",
        f"{entry['trace']:.4g} ± {entry['standard_error']:.2g}",
    ]
    size = entry["num_parameters"]
    row.append(f"{entry['trace'] / size:.3g} ± {entry['standard_error'] / size:.2g}")
    diagonal = entry["diagonal"]
    if diagonal is None:
        return [*row, "", ""]
    ends = f"{diagonal['least']:.2g} to {diagonal['greatest']:.2g}"
    return [*row, f"{ends}, ± {diagonal['typical_error']:.1g}", f"{diagonal['share_negative']:.0%}"]


def _drawn(layers: LayerCurvature) -> Figure:
    figure: Any = plot_layers(layers).figure
    return figure  # type: ignore[no-any-return]


LAYERS = Part(
    "layers",
    "Layers",
    "The trace of the Hessian's diagonal block of every layer; together they are the trace. Bars are two standard "
    "errors on either side. A large trace may come from many parameters or from steep ones: the mean of the diagonal "
    "tells them apart.",
    _layers,
)
