"""A slice of the loss surface."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from secorder_func import Eigenpairs, random_direction, tree
from secorder_func.report.axes import figure_of, new_axes
from secorder_func.report.finding import Finding, NotApplicable, Part, Settings
from secorder_func.report.plots import plot_surface
from secorder_func.report.slices import surface_around
from secorder_func.report.subject import Subject
from secorder_func.typing import Tree

__all__ = ["SURFACE"]


def _surface(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    directions, radius, kind = _directions(subject, generator, shared)
    grid, losses = surface_around(
        subject.f,
        subject.params,
        directions,
        *subject.first_batch,
        radius=radius,
        num_points=settings.num_points,
    )
    seen = losses[losses.isfinite()].double()
    if not len(seen):
        raise NotApplicable("the loss is not finite anywhere on the slice")
    log = float(seen.min()) > 0 and float(seen.max() / seen.min()) > 20
    data = "the first batch" if subject.batches is not None else "all data"
    return Finding(
        numbers={
            "directions": kind,
            "radius": radius,
            "coordinates": grid[..., 0].reshape(len(grid), -1)[:, 0].tolist(),
            "losses": losses.tolist(),
        },
        figures={"loss around the parameters": lambda: _drawn(grid, losses, log, kind)},
        sentences=[f"The loss of {data} along {_along(kind, len(directions))}."],
    )


def _directions(
    subject: Subject, generator: torch.Generator, shared: dict[str, Any]
) -> tuple[list[Tree], float, str]:
    """Return directions, how far to go along them, and what they are."""
    pairs: Eigenpairs | None = shared.get("largest")
    if pairs is not None and pairs.converged:
        vectors = tree.unstack(pairs.eigenvectors)[:2]
        radius = _radius(float(pairs.eigenvalues[len(vectors) - 1]), shared.get("loss"), subject)
        return vectors, radius, "eigenvectors"
    matrices = any(leaf.ndim > 1 for leaf in tree.flatten(subject.params)[0])
    vectors_mode: Any = "zero" if matrices else "scale"
    count = 2 if subject.num_params > 1 else 1
    found = [
        random_direction(subject.params, generator=generator, vectors=vectors_mode)
        for _ in range(count)
    ]
    return found, 1.0, "random"


def _radius(curvature: float, loss: float | None, subject: Subject) -> float:
    """Return how far to go for the loss to rise by about itself, and no further than the parameters are from zero."""
    size = float(tree.norm(subject.params)) or 1.0
    if not curvature or not loss or not math.isfinite(loss):
        return size / 10
    return min(size, math.sqrt(2 * abs(loss) / abs(curvature)))


def _along(kind: str, count: int) -> str:
    if kind == "random":
        return "random directions whose filters have the norms of the parameters' filters"
    if count == 1:
        return "the eigenvector of the largest eigenvalue, of norm one"
    return "the eigenvectors of the two largest eigenvalues, of norm one"


def _drawn(grid: Tensor, losses: Tensor, log: bool, kind: str) -> Figure:
    ax = plot_surface((grid, losses), new_axes("report", height=3.8), log=log)
    what = "eigenvector" if kind == "eigenvectors" else "random direction"
    ax.set_xlabel(f"distance along {what} 1")
    if grid.ndim == 3:
        ax.set_ylabel(f"distance along {what} 2")
    return figure_of(ax)


SURFACE = Part(
    "surface",
    "A slice of the loss surface",
    "The loss over a plane through the parameters, which are at the cross. Long and narrow valleys are directions of "
    "very different curvature. A slice says nothing of the other directions. These numbers are exact but for "
    "rounding and have no error bars.",
    _surface,
)
