"""Axes for pictures, and how they are labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secorder_func.errors import ArgumentTypeError, MissingExtraError, message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["UNIT", "figure_of", "ink", "named", "new_axes", "require", "shortened"]


UNIT = "loss / parameter²"
"""Of an eigenvalue or a trace."""


def new_axes(where: str, *, height: float = 3.3) -> Axes:
    """Return axes in a new figure, made without pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(where, "matplotlib", "report") from error
    ax: Axes = Figure(figsize=(4.8, height), layout="constrained").add_subplot()
    return ax


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes are in."""
    figure: Any = ax.figure  # by its type it may be a part of one
    return figure  # type: ignore[no-any-return]


def ink() -> Any:
    """Return the colour of axes, which stands out from the ground and from bars, whatever the style."""
    import matplotlib as mpl

    return mpl.rcParams["axes.edgecolor"]


def named(ax: Axes, x: str, y: str) -> None:
    """Label axes."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)


def require(thing: Any, kind: type, where: str, name: str) -> None:
    """Refuse what is of another type."""
    if not isinstance(thing, kind):
        problem = f"{name} must be of type {kind.__name__}, got {type(thing).__name__}"
        raise ArgumentTypeError(message(where, problem))


def shortened(name: str, most: int = 26) -> str:
    """Return the end of a name that is too long for an axis."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
