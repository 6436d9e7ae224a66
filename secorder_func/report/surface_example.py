"""The picture of the documentation: `python -m secorder_func.report.surface_example FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from secorder_func import functional_loss, random_direction
from secorder_func.report import digits
from secorder_func.report.slices import surface_around
from secorder_func.report.surfaces import plot_loss_surface

__all__ = ["draw"]


def draw(path: Path) -> None:
    """Train a small classifier of handwritten digits and draw its loss along two filter-normalised directions."""
    generator = torch.Generator().manual_seed(0)
    data = digits.load(num_train=1000, generator=generator)
    model = digits.make_model(16, generator=generator)
    digits.train(model, data, num_steps=150, advance=lambda steps: None)
    f, params = functional_loss(model, F.cross_entropy)
    directions = [random_direction(params, generator=generator) for _ in range(2)]
    surface = surface_around(
        f, params, directions, data.train_inputs, data.train_labels, num_points=41
    )

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    flat, solid = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    plot_loss_surface(surface, log=True, axes=flat)
    plot_loss_surface(surface, log=True, kind="3d", axes=solid)
    options: Any = {"optimize": True}
    figure.savefig(path, dpi=90, pil_kwargs=options)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
