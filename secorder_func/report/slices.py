"""A plane through the parameters, and the loss over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secorder_func import loss_surface, running, tree
from secorder_func.rules.randomness import RandomState
from secorder_func.typing import LossFn, Tree

__all__ = ["surface_around"]


def surface_around(
    f: LossFn,
    params: Tree,
    directions: Sequence[Tree],
    *batch: Any,
    radius: float = 1.0,
    num_points: int = 25,
) -> tuple[Tensor, Tensor]:
    """Return coordinates and losses from `-radius` to `radius` along one or two directions, row by row.

    Every row sees the same random numbers, as the points of a row do. Rows are counted for `progress()`, and Ctrl-C
    ends between them.
    """
    leaves = tree.flatten(params)[0]
    line = torch.linspace(-radius, radius, num_points, dtype=torch.float64)
    axes = torch.meshgrid(*[line] * len(directions), indexing="ij")
    grid = torch.stack(axes, -1).to(leaves[0].device)  # (points, 1) or (points, points, 2)
    rows = grid if grid.ndim == 3 else grid[None]
    sweep, state = loss_surface(f), RandomState.now(leaves)
    losses = []
    with running.task("loss surface", len(rows), "rows"):
        for row in rows:
            with state.replayed(), torch.no_grad():
                losses.append(sweep(params, list(directions), row, *batch))
            running.advance(len(losses))
    return grid.cpu(), torch.stack(losses).reshape(grid.shape[:-1]).cpu()
