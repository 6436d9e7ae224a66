"""Loss, gradient, trace."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from secorder_func import Estimate, hutchinson_trace, tree
from secorder_func.report.axes import UNIT, figure_of, ink, named, new_axes, shortened
from secorder_func.report.finding import Finding, Number, Part, Settings
from secorder_func.report.palette import BLUE
from secorder_func.report.subject import Subject

__all__ = ["LOSS", "TRACE", "spent"]


def _loss(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    loss, gradient = subject.loss_and_gradient()
    value, norm = float(loss), float(tree.norm(gradient))
    size = float(tree.norm(subject.params))
    leaves = zip(tree.names(subject.params), tree.flatten(gradient)[0], strict=True)
    norms = {name or "all": float(g.norm()) for name, g in leaves}
    shared["loss"] = value
    return Finding(
        numbers={
            "loss": value,
            "gradient_norm": norm,
            "parameter_norm": size,
            "gradient_norms": norms,
        },
        key=[Number("loss", value), Number("gradient norm", norm)],
        figures={"gradient norm of each parameter tensor": lambda: _norms(norms)},
        sentences=[
            f"The loss is {value:.6g}, the norm of its gradient {norm:.4g}, that of the parameters {size:.4g}."
        ],
    )


def _norms(norms: dict[str, float]) -> Figure:
    largest = sorted(norms, key=lambda name: -norms[name])[:30]
    kept = [name for name in norms if name in largest]
    ax = new_axes("report", height=0.9 + 0.3 * max(3, len(kept)))
    ax.barh(range(len(kept)), [norms[name] for name in kept], color=BLUE, height=0.62)
    ax.set_yticks(range(len(kept)), [shortened(name) for name in kept])
    ax.invert_yaxis()
    few = f"{len(kept)} of {len(norms)} tensors" if len(kept) < len(norms) else "parameter tensor"
    named(ax, "norm of the gradient (loss / parameter)", few)
    return figure_of(ax)


def _trace(
    subject: Subject, settings: Settings, generator: torch.Generator, shared: dict[str, Any]
) -> Finding:
    estimate = hutchinson_trace(subject.hessian, settings.num_probes, generator=generator)
    value, error = float(estimate.value), float(estimate.standard_error)
    low, high = (float(bound) for bound in estimate.interval())
    mean, mean_error = value / subject.num_params, error / subject.num_params
    return Finding(
        numbers={
            "trace": value,
            "standard_error": error,
            "interval_95": [low, high],
            "mean_eigenvalue": mean,
            "mean_eigenvalue_error": mean_error,
            "num_matvecs": estimate.num_matvecs,
            "by_propagation": estimate.by_propagation,
        },
        key=[
            Number("trace of the Hessian", value, error, "standard error"),
            Number("mean eigenvalue", mean, mean_error, "standard error"),
        ],
        figures={"trace of the Hessian": lambda: _interval(value, error, low, high)},
        sentences=[
            f"From {spent(estimate)}; with 95 % probability the trace is between {low:.4g} and {high:.4g}."
        ],
    )


def _interval(value: float, error: float, low: float, high: float) -> Figure:
    ax = new_axes("report", height=1.5)
    ax.errorbar([value], [0], xerr=[[value - low], [high - value]], color=ink(), capsize=5)
    ax.errorbar([value], [0], xerr=error, fmt="o", color=BLUE, linewidth=4)
    if low > 0:
        ax.set_xlim(0, 1.1 * high)
    elif high < 0:
        ax.set_xlim(1.1 * low, 0)
    ax.set_yticks([])
    ax.set_ylim(-1, 1)
    named(ax, f"trace ({UNIT})", "estimate")
    return figure_of(ax)


def spent(estimate: Estimate) -> str:
    """Return what an estimate was made from."""
    kind = "by forward propagation" if estimate.by_propagation else "by products"
    return f"{estimate.num_matvecs} random probes, {kind}"


LOSS = Part(
    "loss",
    "Loss and gradient",
    "The loss of all the data and its gradient, at the given parameters. Far from a minimum, where the gradient is "
    "large, eigenvalues describe the place and no minimum. These numbers are exact but for rounding and have no "
    "error bars.",
    _loss,
)
TRACE = Part(
    "trace",
    "Trace",
    "The sum of all eigenvalues of the Hessian, estimated by Hutchinson's method. The dot is the estimate, the thick "
    "bar one standard error on either side, the thin one the 95 % interval; four times the probes halve them.",
    _trace,
)
