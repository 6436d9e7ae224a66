"""Eigenvalues: the ends of the spectrum, and its density."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from secorder_func import Eigenpairs, LinearOperator, SpectralDensity, eigsh, spectral_density
from secorder_func.report.finding import Finding, Number, Part, Settings, Table, unless_cancelled
from secorder_func.report.palette import VERMILLION
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
        sentences=[
            f"From {spent} products; "
            + ("every residual is within the tolerance." if converged else "not all converged.")
        ],
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
            str(Number("", value, residual)),
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
    figure: Any = plot_eigenvalues(ends).figure
    return figure  # type: ignore[no-any-return]


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
    largest = float(hessian.nodes[hessian.weights > 0].abs().max())
    shares = hessian.cumulative(
        torch.tensor([-_NEAR * largest, _NEAR * largest], dtype=torch.float64)
    )
    below = _share(
        "share of eigenvalues below −1 % of the largest",
        float(shares.value[0]),
        float(shares.standard_error[0]),
    )
    both = hessian.mean_of(lambda x: (x.abs() <= _NEAR * largest).double())
    near = _share(
        "share of eigenvalues within 1 % of the largest",
        float(both.value),
        float(both.standard_error),
    )
    return Finding(
        numbers={
            "hessian": _curve(hessian),
            "gauss_newton": None if gauss_newton is None else _curve(gauss_newton),
            "share_near_zero": near.value,
            "share_near_zero_error": near.error,
            "share_negative": below.value,
            "share_negative_error": below.error,
        },
        key=[near, below],
        figures={"density of the eigenvalues": lambda: _densities(hessian, gauss_newton)},
        sentences=[
            f"From {settings.num_vectors} random vectors of {min(settings.num_steps, subject.num_params)} Lanczos "
            f"steps each. {note}"
        ],
    )


def _share(label: str, value: float, error: float) -> Number:
    """Return a share; zero and without spread it is not known to be zero."""
    none = not value and not error
    return Number(
        label, value, error, "none seen by the random vectors" if none else "standard error"
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
    figure: Any = ax.figure
    return figure  # type: ignore[no-any-return]


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
    "How the eigenvalues are distributed, on a logarithmic scale, each spread out by a hundredth of the range. A peak "
    "at zero with a few bumps far to the right is what trained networks show. The band is two standard errors over "
    "the random vectors.",
    _density,
)
