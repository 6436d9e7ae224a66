"""Pictures of layers and of samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secorder_func.algorithms import Estimate, LayerCurvature
from secorder_func.errors import ArgumentError, message
from secorder_func.report.axes import UNIT, ink, named, new_axes, require, shortened
from secorder_func.report.palette import BLUE, GREY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_layers", "plot_samples", "typical"]


_MOST_LAYERS = 30


def plot_layers(layers: LayerCurvature, ax: Axes | None = None) -> Axes:
    """Draw the trace of every layer's block with two standard errors on either side.

    Parameters
    ----------
    layers
        What `layer_curvature` returns.
    ax
        Where to draw; a new figure, high enough for all layers, if None.

    Returns
    -------
    matplotlib.axes.Axes
        The layers in their order, from the top. Of more than 30 those with the largest traces are drawn.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hessian_operator, layer_curvature
    >>> from secorder_func.report.plots import plot_layers
    >>> f = lambda p: (p["first.w"] ** 2).sum() + 2 * (p["second.w"] ** 2).sum()
    >>> op = hessian_operator(f, {"first.w": torch.ones(3), "second.w": torch.ones(2)})
    >>> ax = plot_layers(layer_curvature(op, 4))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['first (3)', 'second (2)']
    """
    where = "plot_layers"
    require(layers, LayerCurvature, where, "layers")
    values, errors = layers.traces.value.cpu(), layers.traces.standard_error.cpu()
    kept = values.abs().argsort(descending=True)[:_MOST_LAYERS].sort().values.tolist()
    ax = new_axes(where, height=0.9 + 0.32 * max(4, len(kept))) if ax is None else ax
    shown = [float(values[i]) for i in kept]
    bars = [2 * float(errors[i]) if bool(errors[i].isfinite()) else 0.0 for i in kept]
    names = [f"{shortened(layers.names[i])} ({layers.num_parameters[i]:,})" for i in kept]
    colors = [BLUE if value >= 0 else VERMILLION for value in shown]
    ax.barh(range(len(kept)), shown, xerr=bars, color=colors, height=0.62, ecolor=ink(), capsize=3)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(kept)), names)
    ax.invert_yaxis()
    few = len(kept) < len(layers.names)
    which = f"{len(kept)} of {len(layers.names)} layers" if few else "layer"
    named(ax, f"trace of its block ({UNIT})", f"{which} (parameters)")
    return ax


def plot_samples(values: Tensor | Estimate, ax: Axes | None = None, *, bins: int = 40) -> Axes:
    """Draw how a number, such as the trace, is distributed over samples.

    Parameters
    ----------
    values
        `(samples,)`, or an `Estimate` of that; then their median, with the median of their standard errors, is drawn
        above the histogram.
    ax
        Where to draw; a new figure if None.
    bins
        How many bars.

    Returns
    -------
    matplotlib.axes.Axes
        Logarithmic where all values are positive and spread over two orders of magnitude.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.report.plots import plot_samples
    >>> plot_samples(torch.logspace(0, 3, 50)).get_xscale()
    'log'
    """
    where = "plot_samples"
    errors = None
    given: Any = values
    if isinstance(values, Estimate):
        errors = values.standard_error.detach().double().cpu()
        given = values.value
    require(given, Tensor, where, "values")
    numbers: Tensor = given.detach().double().cpu()
    finite = numbers.isfinite()
    if numbers.ndim != 1 or not bool(finite.any()):
        problem = f"values must be (samples,) with a finite one, got shape {tuple(numbers.shape)}"
        raise ArgumentError(message(where, problem))
    ax = new_axes(where) if ax is None else ax
    shown = numbers[finite]
    low, high = float(shown.min()), float(shown.max())
    log = low > 0 and high / low > 100
    if log:
        edges = torch.logspace(math.log10(low), math.log10(high), bins + 1, dtype=torch.float64)
        edges[0], edges[-1] = low, high  # but for rounding they are
        ax.set_xscale("log")
    else:
        edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64)
    heights, _, _ = ax.hist(shown.numpy(), bins=edges.tolist(), color=BLUE)
    if errors is not None and bool(errors[finite].isfinite().any()):
        _typical_error(ax, shown, errors[finite], 1.08 * float(max(heights)))
    named(ax, f"trace of the sample's Hessian ({UNIT})", "number of samples")
    return ax


def typical(values: Tensor, errors: Tensor | None) -> tuple[float, float | None]:
    """Return the median of the finite values and, of estimates, the median of their finite standard errors.

    Of an even number it is the mean of the two in the middle.

    >>> typical(torch.tensor([4.0, 1.0, 2.0, 9.0]), torch.tensor([0.5, 0.125, 0.25, 0.25]))
    (3.0, 0.25)
    """
    if errors is None:
        return _median(values), None
    return _median(values), _median(errors)


def _median(numbers: Tensor) -> float:
    finite = numbers[numbers.isfinite()].double().sort().values
    if not len(finite):
        return math.nan
    half = (len(finite) - 1) // 2
    return float((finite[half] + finite[-1 - half]) / 2)


def _typical_error(ax: Axes, values: Tensor, errors: Tensor, height: float) -> None:
    at, error = typical(values, errors)
    assert error is not None
    left = min(error, 0.9 * at) if ax.get_xscale() == "log" else error
    ax.errorbar(
        [at],
        [height],
        xerr=[[left], [error]],
        fmt="o",
        markersize=4,
        capsize=3,
        color=VERMILLION,
        label="median of the samples, ± typical error of one",
    )
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
