"""Pictures of loss surfaces show the numbers that they are given."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from secorder_func.report.surfaces import plot_loss_surface


def _plane() -> tuple[Tensor, Tensor, Tensor]:
    alphas, betas = torch.linspace(-1, 1, 9), torch.linspace(-2, 1, 7)
    return alphas, betas, (alphas[:, None] ** 2 + 1) * torch.exp(betas)


def _drawn(figure: Figure) -> int:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_a_curve_shows_its_points() -> None:
    x = torch.linspace(-1, 1, 5)
    (axes,) = plot_loss_surface((x, x**2)).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), torch.stack([x, x**2], 1).numpy())


def test_a_plane_has_alpha_across_and_beta_upwards() -> None:
    figure = plot_loss_surface(_plane())
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("alpha", "beta", "loss")
    assert axes.get_xlim() == pytest.approx((-1, 1))
    assert axes.get_ylim() == pytest.approx((-2, 1))
    least, greatest = float(_plane()[2].min()), float(_plane()[2].max())
    assert bar.get_ylim() == pytest.approx((least, greatest))
    assert any(line.get_marker() == "+" for line in axes.lines)
    assert _drawn(figure) > 5_000


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", ["contour", "3d"])
def test_every_kind_can_be_written(kind: Any, log: bool) -> None:
    assert _drawn(plot_loss_surface(_plane(), kind=kind, log=log, title="A bowl")) > 5_000


def test_the_centre_is_marked_only_where_it_is_shown() -> None:
    alphas, betas, losses = _plane()
    axes = plot_loss_surface((alphas + 3, betas, losses)).axes[0]
    assert not axes.lines


def test_coordinates_of_the_functional_way_are_understood() -> None:
    alphas, betas, losses = _plane()
    grid = torch.stack(torch.meshgrid(alphas, betas, indexing="ij"), -1)
    assert plot_loss_surface((grid, losses)).axes[0].get_ylim() == pytest.approx((-2, 1))
    line = plot_loss_surface((alphas[:, None], losses[:, 0])).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), losses[:, 0].numpy())


def test_given_axes_are_drawn_on() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    x = torch.linspace(-1, 1, 5)
    assert plot_loss_surface((x, x**2), axes=right) is figure
    assert not left.lines
    assert right.lines


def test_nan_and_infinity_are_left_blank() -> None:
    alphas, betas, losses = _plane()
    losses = losses.clone()
    losses[0, 0], losses[3, 3], losses[8, 6] = torch.nan, torch.inf, -1.0
    for log in (False, True):
        bar = plot_loss_surface((alphas, betas, losses), log=log).axes[1]
        assert np.isfinite(bar.get_ylim()).all()
    assert bar.get_ylim()[0] > 0


def test_a_plain_can_be_drawn() -> None:
    alphas, betas, losses = _plane()
    for value in (0.0, 2.5):
        assert _drawn(plot_loss_surface((alphas, betas, torch.full_like(losses, value)))) > 5_000
    assert _drawn(plot_loss_surface((alphas, betas, torch.ones_like(losses)), log=True)) > 5_000


@pytest.mark.parametrize(
    ("low", "high", "log", "labels"),
    [
        (0.0624, 0.39, False, ["0.1", "0.2", "0.3"]),
        (-0.3, 1.2, False, ["0", "0.5", "1"]),
        (0.0624, 3.9, True, ["0.1", "0.2", "0.5", "1", "2"]),
        (3e-5, 4e8, True, ["0.0001", "0.01", "1", "100", "10000", "1000000", "100000000"]),
        (1.1, 1.9, True, ["1.2", "1.4", "1.6", "1.8"]),
    ],
)
def test_the_bar_has_a_few_round_numbers(
    low: float, high: float, log: bool, labels: list[str]
) -> None:
    alphas, betas, _ = _plane()
    losses = torch.linspace(low, high, 63, dtype=torch.float64).reshape(9, 7)
    bar = plot_loss_surface((alphas, betas, losses), log=log).axes[1]
    shown = [text.get_text() for text in bar.get_yticklabels()]
    assert shown == labels
    assert bar.get_yticks().tolist() == pytest.approx([float(label) for label in shown])


X = torch.linspace(-1, 1, 5)


@pytest.mark.parametrize(
    ("surface", "options", "text"),
    [
        (X, {}, "a pair or a triple of tensors"),
        ((X, [1.0]), {}, "a pair or a triple of tensors"),
        ((X, X[:3]), {}, r"\(5,\), \(3,\)"),
        ((X, X, torch.zeros(5, 4)), {}, r"\(5,\), \(5,\), \(5, 4\)"),
        ((torch.rand(3, 4, 2), torch.ones(3, 4)), {}, "must be a grid"),
        ((X, X * torch.nan), {}, "a finite loss"),
        ((X, -(X**2)), {"log": True}, "finite and positive"),
        ((X, X), {"kind": "4d"}, "kind must be"),
        ((X, X, torch.ones(5, 5)), {"kind": "3d", "axes": Figure().subplots()}, "axes in space"),
    ],
)
def test_what_cannot_be_drawn_is_refused(surface: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plot_loss_surface(surface, **options)


def test_without_matplotlib_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch\n"
        "from secorder_func.report.surfaces import plot_loss_surface\n"
        "x = torch.linspace(-1, 1, 5)\n"
        "try:\n"
        "    plot_loss_surface((x, x))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "plot_loss_surface needs matplotlib" in done.stdout
