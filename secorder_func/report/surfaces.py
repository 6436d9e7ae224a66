"""Pictures of loss surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from secorder_func.errors import ArgumentError, ArgumentTypeError, MissingExtraError, message
from secorder_func.report.palette import BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_loss_surface"]

Kind = Literal["contour", "3d"]
_WHERE = "plot_loss_surface"


def plot_loss_surface(
    surface: Sequence[Tensor],
    *,
    kind: Kind = "contour",
    log: bool = False,
    num_levels: int = 24,
    title: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw a loss along one direction as a curve, along two as filled contours or in space.

    Parameters
    ----------
    surface
        What `compute_loss_surface_1d` or `compute_loss_surface_2d` returns: `(alphas, losses)` or
        `(alphas, betas, losses)`. Or `(coordinates, losses)` as `loss_surface` takes and returns them: `(points, 1)`
        and `(points,)`, or `(rows, columns, 2)` and `(rows, columns)` of a grid.
    kind
        For two directions: `"contour"` or `"3d"`.
    log
        Whether losses are drawn on a logarithmic scale; they must be positive then, others are left out.
    num_levels
        How many contours.
    title
        Above the picture.
    axes
        Where to draw, `projection="3d"` for that kind; a new figure if None.

    Returns
    -------
    matplotlib.figure.Figure
        It holds the picture; `figure.savefig("surface.png")` writes it.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    TypeError, ValueError
        `surface` has none of the shapes above, or no finite loss to draw.

    Notes
    -----
    Infinite and NaN losses are left blank. The cross is at the parameters themselves.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.report.surfaces import plot_loss_surface
    >>> x = torch.linspace(-1, 1, 5)
    >>> plot_loss_surface((x, x**2), title="A parabola").axes[0].get_title(loc="left")
    'A parabola'
    """
    if kind not in get_args(Kind):
        raise ArgumentError(message(_WHERE, f"kind must be 'contour' or '3d', got {kind!r}"))
    shown = _understood(surface, log)
    solid = kind == "3d" and shown.betas is not None
    if axes is None:
        axes = _new_axes(solid)
    elif solid and axes.name != "3d":
        mend = "Make them with figure.add_subplot(projection='3d')"
        raise ArgumentError(message(_WHERE, "kind='3d' needs axes in space", mend))
    if shown.betas is None:
        _curve(axes, shown, log)
    elif solid:
        _in_space(axes, shown, log)
    else:
        _contours(axes, shown, log, num_levels)
    if title is not None:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure: Any = axes.get_figure(root=True)
    return figure  # type: ignore[no-any-return]


class _Shown(NamedTuple):
    """Positions `(rows,)` and `(columns,)`, and losses `(rows,)` or `(rows, columns)` with NaN for what is blank."""

    alphas: Tensor
    betas: Tensor | None
    losses: Tensor


def _understood(surface: Any, log: bool) -> _Shown:
    tensors = isinstance(surface, (tuple, list)) and all(isinstance(t, Tensor) for t in surface)
    if not tensors or len(surface) not in (2, 3):
        raise ArgumentTypeError(
            message(
                _WHERE,
                "surface must be a pair or a triple of tensors",
                "Pass (alphas, losses), (alphas, betas, losses) or (coordinates, losses)",
            )
        )
    *positions, losses = (tensor.detach().to("cpu", torch.float64) for tensor in surface)
    if len(positions) == 1 and positions[0].shape == (*losses.shape, losses.ndim):
        grid = positions[0]
        positions = [grid[:, 0]] if losses.ndim == 1 else [grid[:, 0, 0], grid[0, :, 1]]
        if losses.ndim == 2 and not _is_grid(grid):
            problem = "coordinates of two directions must be a grid, rows first"
            mend = "Make it with torch.meshgrid(..., indexing='ij')"
            raise ArgumentError(message(_WHERE, problem, mend))
    if losses.shape != tuple(p.numel() for p in positions) or any(p.ndim != 1 for p in positions):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in surface)
        raise ArgumentError(
            message(
                _WHERE,
                f"positions and losses must fit together, got shapes {shapes}",
                "Pass (points,) and (points,), or (rows,), (columns,) and (rows, columns)",
            )
        )
    drawable = losses.isfinite() & (losses > 0) if log else losses.isfinite()
    if not drawable.any() or min(losses.shape) < 2:
        kind = "finite and positive" if log else "finite"
        raise ArgumentError(
            message(_WHERE, f"there must be two points a direction and a {kind} loss among them")
        )
    losses = losses.masked_fill(~drawable, float("nan"))
    return _Shown(positions[0], positions[1] if len(positions) == 2 else None, losses)


def _is_grid(grid: Tensor) -> bool:
    rows, columns = grid[:, :1, 0], grid[:1, :, 1]
    return torch.equal(grid, torch.stack(torch.broadcast_tensors(rows, columns), -1))


def _new_axes(solid: bool) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(_WHERE, "matplotlib", "report") from error
    # A Figure without pyplot needs no display and changes no global state.
    figure = Figure(figsize=(6.4, 5.0) if solid else (6.0, 4.6), dpi=130, layout="constrained")
    axes: Any = figure.add_subplot(projection="3d" if solid else None)
    return axes  # type: ignore[no-any-return]


def _curve(axes: Axes, shown: _Shown, log: bool) -> None:
    alphas, losses = shown.alphas.numpy(), shown.losses.numpy()
    axes.plot(alphas, losses, color=BLUE, linewidth=1.8)
    if _holds_zero(shown.alphas):
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("alpha")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)


def _contours(axes: Axes, shown: _Shown, log: bool, num_levels: int) -> None:
    from matplotlib.colors import LogNorm

    levels = _levels(shown.losses, log, num_levels)
    x, y, z = shown.alphas.numpy(), _betas(shown).numpy(), shown.losses.T.numpy()
    norm = LogNorm(levels[0], levels[-1]) if log else None
    filled = axes.contourf(x, y, z, levels=levels, norm=norm, cmap="viridis")
    lines = levels[:: max(1, len(levels) // 12)]
    axes.contour(x, y, z, levels=lines, colors="white", linewidths=0.5, alpha=0.6)
    figure: Any = axes.get_figure(root=False)
    bar = figure.colorbar(filled, ax=axes, label="loss")
    ticks = _ticks(levels[0], levels[-1], log)
    bar.set_ticks(ticks, labels=[f"{tick:.10g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    if _holds_zero(shown.alphas) and _holds_zero(_betas(shown)):
        axes.plot(0, 0, "+", color="white", markersize=12, markeredgewidth=3.2)
        axes.plot(0, 0, "+", color="black", markersize=10, markeredgewidth=1.4)
    axes.set_xlabel("alpha")
    axes.set_ylabel("beta")


def _in_space(axes: Any, shown: _Shown, log: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    heights = shown.losses.log10() if log else shown.losses
    x, y = torch.meshgrid(shown.alphas, _betas(shown), indexing="ij")
    axes.plot_surface(
        x.numpy(), y.numpy(), heights.numpy(), cmap="viridis", rcount=80, ccount=80, linewidth=0
    )
    axes.set_xlabel("alpha", labelpad=6)
    axes.set_ylabel("beta", labelpad=8)
    axes.set_zlabel("log10 of the loss" if log else "loss", labelpad=6)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect(None, zoom=0.8)


def _betas(shown: _Shown) -> Tensor:
    assert shown.betas is not None
    return shown.betas


def _levels(losses: Tensor, log: bool, count: int) -> list[float]:
    """Return increasing levels from the least to the greatest loss."""
    seen = losses[losses.isfinite()]
    low, high = float(seen.min()), float(seen.max())
    if not high > low * (1 + 1e-12) + 1e-300:  # a plain
        spread = abs(low) * 1e-3 or 1e-3
        low, high = low - (0.5 if log else 1) * spread, high + spread
    steps = torch.linspace(0, 1, max(2, count), dtype=torch.float64)
    levels = low * (high / low) ** steps if log else low + (high - low) * steps
    levels[0], levels[-1] = low, high
    return [float(level) for level in levels]


_MOST_TICKS = 7


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return a few round numbers from the least to the greatest loss."""
    if log:
        for firsts in ((1, 2, 5), (1, 3), (1,)):
            found = _with_first_digits(firsts, low, high)
            if 3 <= len(found) <= _MOST_TICKS:
                return found
        if len(found) > _MOST_TICKS:  # of so many powers of ten some
            return found[:: math.ceil(len(found) / _MOST_TICKS)]
    from matplotlib.ticker import MaxNLocator

    places = MaxNLocator(_MOST_TICKS - 1, steps=[1, 2, 5, 10]).tick_values(low, high)
    inside = [float(place) for place in places if low <= place <= high]
    return [0.0 if abs(place) < 1e-9 * (high - low) else place for place in inside]


def _with_first_digits(firsts: tuple[int, ...], low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [float(f"{first}e{power}") for power in powers for first in firsts]
    return [place for place in places if low <= place <= high]


def _holds_zero(positions: Tensor) -> bool:
    return bool(positions.min() <= 0 <= positions.max())
