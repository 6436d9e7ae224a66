"""The picture of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from secorder_func.report.digits import SIDE
from secorder_func.report.measurements import Spectrum, TraceConvergence
from secorder_func.report.palette import BLUE, ORANGE, VERMILLION
from secorder_func.report.spectrum_plots import draw_eigenvalues
from secorder_func.report.tables import DigitRow

__all__ = ["Picture", "draw"]


@dataclass(frozen=True, eq=False)
class Picture:
    """What the picture shows.

    Attributes
    ----------
    most, least
        The digits of the two rows.
    images
        All samples, `(num_samples, 64)`.
    trace, spectrum
        Of the Hessian of the mean loss.
    losses, curvatures
        Of every sample: the loss and the estimated trace, `(num_samples,)`.
    """

    most: Sequence[DigitRow]
    least: Sequence[DigitRow]
    images: Tensor
    trace: TraceConvergence
    spectrum: Spectrum
    losses: Tensor
    curvatures: Tensor


def draw(picture: Picture, path: Path) -> None:
    """Write the picture as PNG."""
    # A Figure without pyplot needs no display and changes no global state.
    figure = Figure(figsize=(12, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05))
    parts: Any = figure.subfigures(3, 1, height_ratios=[1, 1, 1.9], hspace=0.04)
    most, least, panels = parts
    _digits(most, "Most curved: trace of the Hessian of one digit's loss", picture.most, picture)
    _digits(least, "Least curved", picture.least, picture)
    trace, spectrum, samples = panels.subplots(1, 3)
    _trace(trace, picture.trace)
    _spectrum(spectrum, picture.spectrum)
    _samples(samples, picture)
    figure.savefig(path, format="png", dpi=130)


def _digits(figure: SubFigure, title: str, rows: Sequence[DigitRow], picture: Picture) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        image = picture.images[row.index].reshape(SIDE, SIDE).numpy()
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
        wrong = row.prediction != row.label
        read = f"a {row.label} read as {row.prediction}" if wrong else f"a {row.label}"
        axes.set_title(
            f"{read}, loss {row.loss:.2g}", fontsize=9, color=VERMILLION if wrong else "black"
        )
        axes.set_xlabel(f"trace {row.exact:.3g}", fontsize=9.5)


def _trace(axes: Axes, trace: TraceConvergence) -> None:
    counts = [estimate.num_matvecs for estimate in trace.estimates]
    values = [estimate.value.item() for estimate in trace.estimates]
    errors = [estimate.standard_error.item() for estimate in trace.estimates]
    low = [value - 2 * error for value, error in zip(values, errors, strict=True)]
    high = [value + 2 * error for value, error in zip(values, errors, strict=True)]
    axes.fill_between(counts, low, high, color=BLUE, alpha=0.2, label="± 2 standard errors")
    axes.plot(counts, values, "o-", color=BLUE, markersize=4, label="estimate")
    axes.axhline(trace.exact, color=ORANGE, linestyle="--", label="exact")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    _label(axes, "Hutchinson's estimate of the trace", "Hessian-vector products", "trace")
    axes.legend(frameon=False, fontsize=9)


def _spectrum(axes: Axes, spectrum: Spectrum) -> None:
    pairs = [*spectrum.largest, spectrum.smallest]
    names = [*(str(rank + 1) for rank in range(len(spectrum.largest))), "smallest"]
    draw_eigenvalues(axes, names, [pair.value for pair in pairs], [pair.residual for pair in pairs])
    _label(axes, "The ends of the spectrum, by SciPy", "eigenvalue of the Hessian", "")


def _samples(axes: Axes, picture: Picture) -> None:
    shown = picture.curvatures > 0  # a logarithmic axis has no place for the others
    axes.scatter(
        picture.losses[shown].numpy(),
        picture.curvatures[shown].numpy(),
        s=7,
        color=BLUE,
        alpha=0.4,
        linewidths=0,
    )
    axes.set(xscale="log", yscale="log")
    title = f"Per-sample curvature of {len(picture.curvatures)} digits"
    _label(axes, title, "loss of the sample", "trace, estimated")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
