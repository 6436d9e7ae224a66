"""Pictures of spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secorder_func.algorithms import Eigenpairs, Estimate, SpectralDensity
from secorder_func.errors import ArgumentError, message
from secorder_func.report.axes import UNIT, ink, named, new_axes, require
from secorder_func.report.palette import BLUE, GREY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BAND", "density_curve", "draw_eigenvalues", "plot_density", "plot_eigenvalues"]


_POINTS = 401

BAND = 0.4
"""How opaque bands of errors are: to be seen on dark ground, too, where the colours are near it."""


def density_curve(
    density: SpectralDensity, num_points: int = _POINTS
) -> tuple[Tensor, Estimate, float]:
    """Return points over the range of the eigenvalues, the density there, and the width of an eigenvalue.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, spectral_density
    >>> from secorder_func.report.spectrum_plots import density_curve
    >>> d = torch.linspace(1, 2, 50)
    >>> points, curve, width = density_curve(spectral_density(LinearOperator(lambda v: d * v, d)))
    >>> bool((torch.trapezoid(curve.value, points) - 1).abs() < 0.01)
    True
    """
    seen = density.nodes[density.weights > 0]
    low, high = float(seen.min()), float(seen.max())
    width = max((high - low) / 100, 1e-3 * max(abs(low), abs(high))) or 1.0
    points = torch.linspace(low - 4 * width, high + 4 * width, num_points, dtype=torch.float64)
    return points, density.density(points, width=width), width


def plot_density(
    density: SpectralDensity,
    ax: Axes | None = None,
    *,
    label: str = "density",
    color: str = BLUE,
    linestyle: str = "-",
) -> Axes:
    """Draw the density of the eigenvalues with a band of two standard errors, on a logarithmic scale.

    Parameters
    ----------
    density
        What `spectral_density` returns.
    ax
        Where to draw; a new figure if None.
    label, color, linestyle
        Of the curve, to draw several on the same axes.

    Returns
    -------
    matplotlib.axes.Axes
        Below a fifth of what a single eigenvalue adds, nothing is drawn.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, spectral_density
    >>> from secorder_func.report.plots import plot_density
    >>> d = torch.linspace(1, 2, 50)
    >>> plot_density(spectral_density(LinearOperator(lambda v: d * v, d))).get_yscale()
    'log'
    """
    require(density, SpectralDensity, "plot_density", "density")
    ax = new_axes("plot_density") if ax is None else ax
    points, curve, width = density_curve(density)
    floor = 0.2 / (density.dimension * width * 2.5066)
    seen = curve.value > floor
    value = curve.value.masked_fill(~seen, float("nan"))
    error = curve.standard_error
    if bool(error.isfinite().all()):
        low, high = (curve.value + sign * 2 * error for sign in (-1, 1))
        ax.fill_between(
            points.numpy(),
            low.clamp(min=floor).numpy(),
            high.clamp(min=floor).numpy(),
            where=(high > floor).tolist(),
            color=color,
            alpha=BAND,
            edgecolor=color,
            linewidth=0.6,
        )
    ax.plot(points.numpy(), value.numpy(), color, linestyle=linestyle, linewidth=1.4, label=label)
    limits = [floor, 2 * float(curve.value.max())]
    if ax.get_yscale() == "log":  # there is another one
        limits += ax.get_ylim()
    ax.set_yscale("log")
    ax.set_ylim(min(limits), max(limits))
    named(ax, f"eigenvalue ({UNIT})", "share of eigenvalues per unit")
    return ax


def plot_eigenvalues(pairs: Eigenpairs | Sequence[Eigenpairs], ax: Axes | None = None) -> Axes:
    """Draw eigenvalues by rank, each with its residual as an error bar.

    Parameters
    ----------
    pairs
        What `eigsh` returns; or two of them, the largest and the smallest eigenvalues.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    matplotlib.axes.Axes
        Eigenvalues below zero are in another colour.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, eigsh
    >>> from secorder_func.report.plots import plot_eigenvalues
    >>> d = torch.tensor([3.0, 1.0, -5.0, 2.0])
    >>> op = LinearOperator(lambda v: d * v, torch.zeros(4))
    >>> ax = plot_eigenvalues((eigsh(op, 2), eigsh(op, 1, which="SA")))
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['1', '2', 'n']
    """
    where = "plot_eigenvalues"
    ends = tuple(pairs) if isinstance(pairs, (tuple, list)) else (pairs,)
    if len(ends) not in (1, 2):
        raise ArgumentError(
            message(where, f"expected one or two Eigenpairs, got {len(ends)}", "Pass (LA, SA)")
        )
    names: list[str] = []
    values: list[float] = []
    residuals: list[float] = []
    for last, end in enumerate(ends):
        require(end, Eigenpairs, where, "pairs")
        found = sorted(
            zip(end.eigenvalues.tolist(), end.residual_norms.tolist(), strict=True), reverse=True
        )
        count = len(found)
        for i, (value, residual) in enumerate(found):
            names.append(_from_the_end(count - 1 - i) if last else str(i + 1))
            values.append(value)
            residuals.append(residual)
    ax = new_axes(where) if ax is None else ax
    draw_eigenvalues(ax, names, values, residuals)
    return ax


def draw_eigenvalues(
    ax: Axes, names: Sequence[str], values: Sequence[float], residuals: Sequence[float]
) -> None:
    """Draw eigenvalues of any origin, in the order given, with their residuals."""
    places = range(len(values))
    colors = [BLUE if value >= 0 else VERMILLION for value in values]
    bars = ax.bar(places, values, color=colors, width=0.65)
    ax.errorbar(places, values, yerr=residuals, fmt="none", ecolor=ink(), capsize=3)
    many = len(values) > 6
    if not many:
        ax.bar_label(bars, [f"{value:.2g}" for value in values], fontsize=8.5, padding=3)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(places, list(names), fontsize=8.5 if many else None)
    ax.margins(y=0.14)
    named(ax, "rank of the eigenvalue", f"eigenvalue ({UNIT})")


def _from_the_end(back: int) -> str:
    return f"n−{back}" if back else "n"
