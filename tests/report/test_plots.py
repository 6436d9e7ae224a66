"""Pictures of results show the numbers, and their errors."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from secorder_func import (
    CurvatureRecord,
    Estimate,
    LinearOperator,
    eigsh,
    hessian_operator,
    layer_curvature,
    spectral_density,
)
from secorder_func.report import plots

DIAGONAL = torch.tensor([9.0, 4.0, 1.0, 0.5, -2.0, -3.0], dtype=torch.float64)


def _operator() -> LinearOperator:
    return LinearOperator(lambda v: DIAGONAL * v, torch.zeros_like(DIAGONAL))


def _density(seed: int = 0, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return spectral_density(scale * _operator(), 20, generator=generator)


def _layers() -> Any:
    def f(p: Any) -> Any:
        total = (p["a.w"].sum() + p["b.w"].sum()) ** 2
        return total + 3 * (p["b.w"] ** 2).sum() - 2 * (p["c.w"] ** 2).sum()

    params = {f"{name}.w": torch.zeros(4, dtype=torch.float64) for name in "abc"}
    generator = torch.Generator().manual_seed(0)
    return layer_curvature(hessian_operator(f, params), 40, which=None, generator=generator)


def _record(step: int, loss: float | None = 1.0) -> CurvatureRecord:
    values = [] if loss is None else [2 * loss]
    trace = None if loss is None else 5 * loss
    error = None if loss is None else 0.1
    residuals = [] if loss is None else [0.2]
    return CurvatureRecord(step, 0.1, loss, 0.1, trace, error, values, residuals, None, 0.01, 0.05)


EVERY = {
    "density": lambda ax: plots.plot_density(_density(), ax),
    "eigenvalues": lambda ax: plots.plot_eigenvalues(eigsh(_operator(), 2), ax),
    "layers": lambda ax: plots.plot_layers(_layers(), ax),
    "samples": lambda ax: plots.plot_samples(DIAGONAL, ax),
    "surface": lambda ax: plots.plot_surface((DIAGONAL.sort().values, DIAGONAL), ax),
    "tracker": lambda ax: plots.plot_tracker([_record(0), _record(1)], ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_axes_are_labelled_and_those_given_are_drawn_on(name: str) -> None:
    left, right = Figure().subplots(1, 2)
    assert EVERY[name](right) is right
    assert not left.has_data()
    assert right.has_data()
    assert right.get_xlabel()
    assert right.get_ylabel()


@pytest.mark.parametrize("name", EVERY)
def test_without_axes_there_is_a_new_figure_and_no_global_state(name: str) -> None:
    import matplotlib.pyplot as plt

    ax = EVERY[name](None)
    assert isinstance(ax.figure, Figure)
    assert plt.get_fignums() == []


def test_the_density_is_that_of_the_result_with_a_band_of_two_errors() -> None:
    density = _density()
    ax = plots.plot_density(density)
    x, y = ax.lines[0].get_xdata(), ax.lines[0].get_ydata()
    width = float(density.nodes.max() - density.nodes.min()) / 100
    curve = density.density(torch.as_tensor(x), width=width)
    seen = ~np.isnan(y)
    assert seen.sum() > 20
    np.testing.assert_allclose(y[seen], curve.value.numpy()[seen])
    top = max(path.vertices[:, 1].max() for path in ax.collections[0].get_paths())
    assert top == pytest.approx(float((curve.value + 2 * curve.standard_error).max()))


def test_bands_of_errors_can_be_seen_on_dark_ground() -> None:
    for ax in (plots.plot_density(_density()), plots.plot_tracker([_record(0), _record(1)])):
        band = ax.collections[0]
        assert band.get_alpha() >= 0.35
        assert band.get_linewidth()[0] > 0
        assert len(band.get_edgecolor())


def test_a_second_density_does_not_cut_off_the_first() -> None:
    ax = plots.plot_density(_density())
    plots.plot_density(_density(scale=0.01), ax)
    low, high = ax.get_ylim()
    for line in ax.lines:
        assert low < np.nanmin(line.get_ydata())
        assert np.nanmax(line.get_ydata()) < high


def test_eigenvalues_are_bars_by_rank_with_residuals() -> None:
    ends = eigsh(_operator(), 2), eigsh(_operator(), 2, which="SA")
    ax = plots.plot_eigenvalues(ends)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([9, 4, -2, -3])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "n−1", "n"]
    assert ax.patches[0].get_facecolor() != ax.patches[3].get_facecolor()
    (bars,) = (c for c in ax.collections if len(c.get_segments()) == 4)
    heights = [abs(s[1, 1] - s[0, 1]) for s in bars.get_segments()]
    residuals = torch.cat([ends[0].residual_norms, ends[1].residual_norms.flip(0)])
    np.testing.assert_allclose(heights, 2 * residuals.numpy(), atol=1e-12)


def test_layers_are_bars_with_two_standard_errors() -> None:
    layers = _layers()
    ax = plots.plot_layers(layers)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (4)", "b (4)", "c (4)"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(layers.traces.value.tolist())
    lengths = [np.ptp(s[:, 0]) for s in ax.collections[0].get_segments()]
    assert lengths == pytest.approx((4 * layers.traces.standard_error).tolist())
    assert lengths[0] > 0


def test_of_many_layers_the_largest_are_drawn_and_it_is_said() -> None:
    params = {f"l{i:02}.w": torch.zeros(1) for i in range(40)}

    def f(p: Any) -> Any:
        return sum(i * (p[f"l{i:02}.w"] ** 2).sum() for i in range(40))

    ax = plots.plot_layers(layer_curvature(hessian_operator(f, params), 2, which=None))
    assert ax.get_yticklabels()[0].get_text() == "l10 (1)"
    assert "30 of 40 layers" in ax.get_ylabel()


def test_the_histogram_counts_every_finite_sample_and_shows_the_typical_error() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 500.0, float("nan")])
    estimate = Estimate(values, torch.full((5,), 0.25), 8)
    ax = plots.plot_samples(estimate)
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert ax.get_xscale() == "log"
    (bar,) = ax.containers[1].lines[2]
    assert np.ptp(bar.get_segments()[0][:, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [4, 5])
def test_the_mark_is_the_median_of_the_samples_and_of_their_errors(count: int) -> None:
    values = [3.0, 11.0, 4.0, 2.0, 7.0][:count]
    errors = [0.5, 0.1, 0.9, 0.2, 0.4][:count]
    ax = plots.plot_samples(Estimate(torch.tensor(values), torch.tensor(errors), 8))
    mark, _, (bar,) = ax.containers[1].lines
    assert mark.get_xdata() == pytest.approx([statistics.median(values)])
    length = np.ptp(bar.get_segments()[0][:, 0])
    assert length == pytest.approx(2 * statistics.median(errors))
    (text,) = ax.get_legend().get_texts()
    assert text.get_text() == "median of the samples, ± typical error of one"


def test_equal_samples_can_be_drawn() -> None:
    ax = plots.plot_samples(torch.full((3,), -2.0))
    assert sum(bar.get_height() for bar in ax.patches) == 3


def test_training_is_drawn_with_gaps_for_what_is_missing() -> None:
    ax = plots.plot_tracker([_record(0, 3.0), _record(10, None), _record(20, 1.0)])
    assert ax.get_yscale() == "log"
    loss, trace, top = ax.lines
    np.testing.assert_array_equal(loss.get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(loss.get_ydata(), [3, np.nan, 1])
    np.testing.assert_array_equal(trace.get_ydata(), [15, np.nan, 5])
    np.testing.assert_array_equal(top.get_ydata(), [6, np.nan, 2])
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(15.2)


def test_negative_numbers_of_a_training_are_drawn_on_a_linear_scale() -> None:
    assert plots.plot_tracker([_record(0, -3.0), _record(10, 1.0)]).get_yscale() == "linear"


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: plots.plot_density(_operator()), "must be of type SpectralDensity"),  # type: ignore[arg-type]
        (lambda: plots.plot_eigenvalues([]), "expected one or two Eigenpairs, got 0"),
        (lambda: plots.plot_layers(3), "must be of type LayerCurvature, got int"),  # type: ignore[arg-type]
        (lambda: plots.plot_eigenvalues(3), "must be of type Eigenpairs, got int"),  # type: ignore[arg-type]
        (lambda: plots.plot_tracker(3), "must be of type Sequence, got int"),  # type: ignore[arg-type]
        (lambda: plots.plot_samples(torch.zeros(2, 2)), "got shape (2, 2)"),
        (lambda: plots.plot_tracker([]), "there are no records"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"plot_\w+: ") as caught:
        draw()
    assert said in str(caught.value)
