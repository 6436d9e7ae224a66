"""Pictures of a training, and of where it is in its loss surface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secorder_func.errors import ArgumentError, message
from secorder_func.report.axes import UNIT, named, new_axes, require
from secorder_func.report.palette import BLUE, GREEN, ORANGE
from secorder_func.report.spectrum_plots import BAND
from secorder_func.report.surfaces import plot_loss_surface
from secorder_func.tracker import CurvatureRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_surface", "plot_tracker"]


def plot_surface(surface: Sequence[Tensor], ax: Axes | None = None, **options: Any) -> Axes:
    """Draw a slice of a loss surface: a curve along one direction, contours along two.

    Parameters
    ----------
    surface
        `(coordinates, losses)` as `loss_surface` takes and returns them, or what the functions of
        `compat.analysis.landscape` return; see `secorder_func.report.surfaces.plot_loss_surface`.
    ax
        Where to draw; a new figure if None.
    options
        `kind`, `log`, `num_levels` and `title` of `plot_loss_surface`.

    Returns
    -------
    matplotlib.axes.Axes
        A cross marks the parameters themselves.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.report.plots import plot_surface
    >>> x = torch.linspace(-1, 1, 5)
    >>> plot_surface((x, x**2)).get_ylabel()
    'loss'
    """
    figure = plot_loss_surface(surface, axes=ax, **options)
    return figure.axes[0] if ax is None else ax


def plot_tracker(records: Sequence[CurvatureRecord], ax: Axes | None = None) -> Axes:
    """Draw loss, trace and largest eigenvalue along training.

    Parameters
    ----------
    records
        Of a `CurvatureTracker`: its `records`, or what `CurvatureTracker.read` returns.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    matplotlib.axes.Axes
        The trace with a band of two standard errors, the eigenvalue with its residual. Logarithmic where all numbers
        are positive. What a record lacks is a gap.

    Examples
    --------
    >>> from secorder_func import CurvatureRecord
    >>> from secorder_func.report.plots import plot_tracker
    >>> def record(step, loss):
    ...     return CurvatureRecord(step, step / 10, loss, 0.1, 5 * loss, 0.1, [loss], [0.0], None, 0.01, 0.05)
    >>> ax = plot_tracker([record(0, 2.0), record(10, 1.0)])
    >>> [line.get_label() for line in ax.lines]
    ['loss', 'trace', 'largest eigenvalue']
    """
    where = "plot_tracker"
    require(records, Sequence, where, "records")
    if not records:
        raise ArgumentError(message(where, "there are no records", "Call tracker.step() before"))
    for record in records:
        require(record, CurvatureRecord, where, "every record")
    ax = new_axes(where) if ax is None else ax
    steps = [record.step for record in records]
    loss = _column([r.loss for r in records])
    trace, trace_error = (
        _column([r.trace for r in records]),
        _column([r.trace_error for r in records]),
    )
    top = _column([r.eigenvalues[0] if r.eigenvalues else None for r in records])
    residual = _column([r.residuals[0] if r.residuals else None for r in records])
    seen = torch.cat([loss, trace, top])
    log = bool((seen[seen.isfinite()] > 0).all())
    marker = "o" if len(steps) <= 40 else ""
    for name, values, error, times, color in (
        ("loss", loss, None, 0, GREEN),
        ("trace", trace, trace_error, 2, BLUE),
        ("largest eigenvalue", top, residual, 1, ORANGE),
    ):
        if not bool(values.isfinite().any()):
            continue
        ax.plot(steps, values.numpy(), marker, linestyle="-", ms=3, color=color, label=name)
        if error is not None:
            low, high = values - times * error, values + times * error
            if log:  # a band that reaches below zero has no end there
                low = torch.maximum(low, values / 100)
            band: Any = {"color": color, "alpha": BAND, "edgecolor": color, "linewidth": 0.6}
            ax.fill_between(steps, low.numpy(), high.numpy(), **band)
    if log:
        ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8.5)
    named(ax, "step", f"loss; trace and eigenvalue ({UNIT})")
    return ax


def _column(values: Sequence[float | None]) -> Tensor:
    """Return numbers with NaN for what is missing."""
    numbers = [float("nan") if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.float64)
