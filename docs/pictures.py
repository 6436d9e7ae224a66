"""Draw the picture of the front page: `python docs/pictures.py` writes docs/assets/spectrum.svg.

The Hessian of a network that reads handwritten digits, small enough (2,410 parameters) to compare every number with
exact ones: all eigenvalues by a dense decomposition, and what products alone say of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from secorder_func import (
    eigsh,
    exact_trace,
    functional_loss,
    hessian_operator,
    hutchinson_trace,
    per_sample_hessian_operator,
    spectral_density,
)
from secorder_func.report import digits
from secorder_func.report.palette import BLUE, GREY, ORANGE, VERMILLION
from secorder_func.report.spectrum_plots import density_curve, plot_density

PICTURE = Path(__file__).parent / "assets" / "spectrum.svg"
SHOWN = 5
STYLE: Any = {
    "font.size": 9,
    "svg.hashsalt": "secorder_func",  # the same file for the same numbers
    "figure.facecolor": "white",  # to be read on light and dark ground
}


def draw(path: Path = PICTURE) -> None:
    """Train, measure, compare, draw."""
    generator = torch.Generator().manual_seed(0)
    data = digits.load(num_train=300, generator=generator)
    model = digits.make_model(32, generator=generator)
    digits.train(model, data, num_steps=60, advance=lambda steps: None)
    f, params = functional_loss(model, F.cross_entropy)

    H = hessian_operator(f, params, data.train_inputs, data.train_labels)
    exact = torch.linalg.eigvalsh(H.dense())
    density = spectral_density(H, 16, num_steps=64, generator=generator)
    top = eigsh(H, SHOWN, which="LA", generator=generator)

    inputs, labels = data.test_inputs, data.test_labels
    each = hutchinson_trace(
        per_sample_hessian_operator(f, params, inputs, labels), 64, generator=generator
    )
    # Estimates say which may be outermost, exact traces which are.
    order = each.value.argsort().tolist()
    near = torch.tensor(order[: 4 * SHOWN] + order[-4 * SHOWN :])
    exact_traces = exact_trace(per_sample_hessian_operator(f, params, inputs[near], labels[near]))
    ranks = exact_traces.argsort()
    ends = torch.cat([ranks[:SHOWN], ranks[-SHOWN:].flip(0)])
    picked, traces = near[ends], exact_traces[ends]
    read = model(inputs[picked]).argmax(1)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
        _spectrum(left, density, exact, top.eigenvalues)
        _samples(right, inputs[picked], labels[picked], read, traces)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _spectrum(figure: Any, density: Any, exact: torch.Tensor, top: torch.Tensor) -> None:
    ax = figure.subplots()
    figure.suptitle("The spectrum, from products alone", fontsize=10)
    plot_density(density, ax, label="estimated density, ± 2 standard errors")
    points, _, width = density_curve(density)
    bells = torch.exp(-0.5 * ((points[:, None] - exact) / width) ** 2) / (width * 2.5066)
    ax.plot(points, bells.mean(1), color=ORANGE, ls="--", lw=1.2, label="of all exact eigenvalues")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 3, 4 * high)
    base = low / 3
    marks = exact.round(decimals=2).unique()  # what cannot be told apart is drawn once
    ax.vlines(marks, base, 1.7 * base, color=GREY, lw=0.5, label=f"the {len(exact):,} exact ones")
    ax.plot(top, [1.3 * base] * len(top), "v", color=VERMILLION, ms=5, label=f"eigsh, {len(top)}")
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="share per unit")
    ax.legend(frameon=False, fontsize=7.5, loc="upper right")


def _samples(
    figure: Any,
    images: torch.Tensor,
    labels: torch.Tensor,
    read: torch.Tensor,
    traces: torch.Tensor,
) -> None:
    figure.suptitle("Traces of the Hessians of single test digits", fontsize=10)
    grid = figure.subplots(2, SHOWN)
    for i, ax in enumerate(grid.flat):
        ax.imshow(images[i].reshape(digits.SIDE, digits.SIDE), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        wrong = bool(read[i] != labels[i])
        text = f"{labels[i]} read as {read[i]}"
        ax.set_title(text, fontsize=7.5, color=VERMILLION if wrong else "black")
        ax.set_xlabel(f"{float(traces[i]):.3g}".replace("-", "−"), fontsize=8.5)
    for row, name in zip(grid, ("lowest", "highest"), strict=True):
        row[0].set_ylabel(name, color=BLUE)


if __name__ == "__main__":
    draw()
