"""Eigenvalues: the ends of the spectrum, and its density."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure

from secorder_func import Eigenpairs, LinearOperator, SpectralDensity, eigsh, spectral_density
from secorder_func.report.axes import figure_of
from secorder_func.report.finding import (
    Finding,
    Number,
    Part,
    Settings,
    Table,
    unless_cancelled,
    with_error,
)
from secorder_func.report.palette import VERMILLION
from secorder_func.report.parts.shares import Share, share_between
from secorder_func.report.plots import plot_density, plot_eigenvalues
from secorder_func.report.spectrum_plots import density_curve
from secorder_func.report.subject import Subject

__all__ = ["DENSITY", "EIGENVALUES"]

_RTOL = 1e-4
"""Of the residuals; eigenvalues are off by about the square of it."""

_NEAR = 0.01
"""An eigenvalue is near zero if it is so small beside the largest in magnitude."""


def _eigenvalues(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    op = subject.hessian
    k = min(settings.num_eigenvalues, max(1, op.shape[0] // 2))  # each is at one end
    largest = eigsh(op, k, which="LA", rtol=_RTOL, generator=generator)
    shared["largest"] = largest
    smallest = unless_cancelled(lambda: eigsh(op, k, which="SA", rtol=_RTOL, generator=generator))
    ends = (largest,) if smallest is None else (largest, smallest)
    shared["ends"] = ends
    key = [_key("largest eigenvalue", largest, 0)]
    if smallest is not None:
        key.append(_key("smallest eigenvalue", smallest, 0))
    converged = all(end.converged for end in ends)
    spent = sum(end.num_matvecs for end in ends)
    return Finding(
        numbers={
            "largest": _numbers(largest),
            "smallest": None if smallest is None else _numbers(smallest),
        },
        key=key,
        figures={"largest and smallest eigenvalues": lambda: _ends(ends)},
        tables=[
            _table(f"The {name}", end)
            for name, end in zip(("largest", "smallest"), ends, strict=False)
        ],
        sentences=[f"From {spent} products; {_tolerance(converged)}", _step_bound(largest)],
    )


def _tolerance(converged: bool) -> str:
    within = "is within" if converged else "should be within"
    said = f"every residual {within} the tolerance, {100 * _RTOL:g} % of the largest eigenvalue in magnitude"
    return f"{said}." if converged else f"{said}, and not all are: those have not converged."


def _step_bound(largest: Eigenpairs) -> str:
    """Say what the largest eigenvalue means for a training, if it is clearly positive."""
    value, residual = float(largest.eigenvalues[0]), float(largest.residual_norms[0])
    if not value > 2 * residual:
        return ""
    return (
        "Gradient descent with a fixed step, without momentum, is unstable above a learning rate of "
        f"2/λmax = {2 / value:.3g}."
    )


def _key(label: str, pairs: Eigenpairs, index: int) -> Number:
    value, residual = float(pairs.eigenvalues[index]), float(pairs.residual_norms[index])
    return Number(label, value, residual, "residual: an eigenvalue is that close")


def _table(title: str, pairs: Eigenpairs) -> Table:
    found = zip(pairs.eigenvalues.tolist(), pairs.residual_norms.tolist(), strict=True)
    first = 1 if title.endswith("largest") else 0
    rows = [
        [
            str(i + 1) if first else (f"n−{i}" if i else "n"),
            with_error(value, residual),
        ]
        for i, (value, residual) in enumerate(found)
    ]
    return Table(title, ("rank", "eigenvalue ± residual"), rows)


def _numbers(pairs: Eigenpairs) -> dict[str, Any]:
    return {
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residuals": pairs.residual_norms.tolist(),
        "converged": pairs.converged,
        "num_matvecs": pairs.num_matvecs,
    }


def _ends(ends: tuple[Eigenpairs, ...]) -> Figure:
    return figure_of(plot_eigenvalues(ends))


def _density(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    def measured(op: LinearOperator) -> SpectralDensity:
        return spectral_density(
            op, settings.num_vectors, num_steps=settings.num_steps, generator=generator
        )

    hessian = measured(subject.hessian)
    matrix = gauss_newton = None
    note = "There is no Gauss-Newton matrix: it needs a model and a loss apart from it."
    if subject.model_fn is not None:
        try:
            matrix = subject.gauss_newton
        except Exception as error:  # the Hessian is there all the same
            note = f"There is no Gauss-Newton matrix: {str(error).splitlines()[0]}"
    if matrix is not None:
        note = "The Gauss-Newton matrix leaves out the curvature of the model."
        op = matrix
        gauss_newton = unless_cancelled(lambda: measured(op))
        if gauss_newton is None:
            note = "The Gauss-Newton matrix was not come to."
    largest = _largest(hessian, shared)
    if not largest:
        return _nothing()
    shares = {
        "near_zero": share_between(hessian, -_NEAR * largest, _NEAR * largest),
        "negative": share_between(hessian, -math.inf, -_NEAR * largest),
    }
    cut = _cut_short(hessian, settings)
    figure = "density of the eigenvalues"
    return Finding(
        numbers={
            "hessian": _curve(hessian),
            "gauss_newton": None if gauss_newton is None else _curve(gauss_newton),
            "largest_magnitude": largest,
            "cut_short": cut,
            **{
                f"share_{name}{of}": found
                for name, share in shares.items()
                for of, found in (
                    ("", share.value),
                    ("_standard_error", share.standard_error),
                    ("_bound_of_steps", share.blur),
                )
            },
        },
        key=[] if cut else [_share(_LABELS[name], shares[name], hessian) for name in shares],
        figures={figure: lambda: _densities(hessian, gauss_newton)},
        captions={figure: _caption(hessian, gauss_newton)},
        sentences=[_made(hessian, gauss_newton, settings), note],
    )


_LABELS = {
    "near_zero": f"share of eigenvalues near zero (|λ| ≤ {100 * _NEAR:g} % of the largest)",
    "negative": f"share clearly negative (λ < −{100 * _NEAR:g} % of the largest)",
}


def _largest(hessian: SpectralDensity, shared: dict[str, Any]) -> float:
    """Return the largest magnitude of an eigenvalue that was seen, here or before."""
    seen = [hessian.nodes[hessian.weights > 0]]
    seen += [end.eigenvalues.double().cpu() for end in shared.get("ends", ())]
    return float(torch.cat(seen).abs().max())


def _nothing() -> Finding:
    return Finding(
        numbers={"hessian": None, "gauss_newton": None, "largest_magnitude": 0.0},
        sentences=[
            "The Hessian is zero: there is no spectrum to be drawn, and there are no shares. Is the loss "
            "piecewise linear in the parameters?"
        ],
    )


def _cut_short(density: SpectralDensity, settings: Settings) -> bool:
    steps = min(settings.num_steps, density.dimension)
    return density.num_matvecs < settings.num_vectors * steps


def _made(
    hessian: SpectralDensity, gauss_newton: SpectralDensity | None, settings: Settings
) -> str:
    """Say how many vectors and steps there are, not how many there should have been."""
    said = f"From {_counts(hessian)}."
    if _cut_short(hessian, settings):
        steps = min(settings.num_steps, hessian.dimension)
        said += (
            f" Cut short after {hessian.num_matvecs} of {settings.num_vectors * steps} products: the curve is coarser "
            "than it should be, and shares of eigenvalues are not among the key numbers."
        )
    if gauss_newton is not None and _cut_short(gauss_newton, settings):
        said += f" That of the Gauss-Newton matrix was cut short: {_counts(gauss_newton)}."
    return said


def _counts(density: SpectralDensity) -> str:
    vectors, steps = density.nodes.shape
    return f"{_several(vectors, 'random vector')} of {_several(steps, 'Lanczos step')} each"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _share(label: str, share: Share, density: SpectralDensity) -> Number:
    """Return a share; below half an eigenvalue it is none, as far as random vectors can see."""
    if share.value + share.error < 0.5 / density.dimension:
        return Number(label, 0.0, None, "none seen by the random vectors")
    steps = density.nodes.shape[1]
    meaning = "standard error over the random vectors"
    if share.blur > 0.05 * share.standard_error:
        meaning = (
            f"{share.standard_error:.2g}, standard error over the random vectors, plus {share.blur:.2g}, a bound for "
            f"what {_several(steps, 'Lanczos step')} leave open"
        )
    return Number(label, share.value, share.error, meaning)


def _caption(hessian: SpectralDensity, gauss_newton: SpectralDensity | None) -> str:
    """Say how wide the smoothing is, and what it feigns."""
    width = density_curve(hessian, 3)[2]
    said = f"Every eigenvalue is spread out to a bell of standard deviation {width:.2g}"
    if gauss_newton is None:
        return f"{said}: the curve ends beyond the outermost eigenvalues, which are in the tables above."
    other = density_curve(gauss_newton, 3)[2]
    return (
        f"{said} (Gauss-Newton: {other:.2g}): curves end beyond the outermost eigenvalues; those of the Hessian are in "
        "the tables above, and the Gauss-Newton matrix of a convex loss has none below zero, whatever its curve does "
        "there."
    )


def _curve(density: SpectralDensity) -> dict[str, Any]:
    points, curve, width = density_curve(density, 201)
    return {
        "points": points.tolist(),
        "density": curve.value.tolist(),
        "standard_error": curve.standard_error.tolist(),
        "width": width,
        "num_matvecs": density.num_matvecs,
    }


def _densities(hessian: SpectralDensity, gauss_newton: SpectralDensity | None) -> Figure:
    ax = plot_density(hessian, label="Hessian")
    if gauss_newton is not None:
        plot_density(gauss_newton, ax, label="Gauss-Newton", color=VERMILLION, linestyle="--")
        ax.legend(frameon=False)
    return figure_of(ax)


EIGENVALUES = Part(
    "eigenvalues",
    "Largest and smallest eigenvalues",
    "The algebraically largest eigenvalues of the Hessian, ranked from 1, and the smallest, down to n; negative ones, "
    "in the other colour, are directions in which the loss bends down. Error bars are residuals: some eigenvalue is "
    "within that of the number; often they are too small to be seen.",
    _eigenvalues,
)
DENSITY = Part(
    "density",
    "Spectral density",
    "How the eigenvalues are distributed, on a logarithmic scale. A peak at zero with a few bumps far to the right is "
    "what trained networks show. The band is two standard errors over the random vectors; it does not tell how much "
    "the number of Lanczos steps blurs. The error of the shares has both: what the steps leave open is bounded by the "
    "inequalities of Chebyshev, Markov and Stieltjes.",
    _density,
)
