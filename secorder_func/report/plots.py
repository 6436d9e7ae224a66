"""Pictures of results of the library, each on matplotlib axes.

Every function takes `ax`, where to draw, and returns it. Without it there is a new figure, `ax.figure`, made without
pyplot: it needs no display and changes no global state. Errors are drawn as bars or bands; colours are those of Okabe
and Ito.

>>> import torch
>>> from secorder_func import LinearOperator, spectral_density
>>> from secorder_func.report.plots import plot_density
>>> d = torch.linspace(1, 2, 50)
>>> ax = plot_density(spectral_density(LinearOperator(lambda v: d * v, d)))
>>> ax.figure.savefig("density.png")  # doctest: +SKIP
"""

from __future__ import annotations

from secorder_func.report.sample_plots import plot_layers, plot_samples
from secorder_func.report.spectrum_plots import plot_density, plot_eigenvalues
from secorder_func.report.training_plots import plot_surface, plot_tracker

__all__ = [
    "plot_density",
    "plot_eigenvalues",
    "plot_layers",
    "plot_samples",
    "plot_surface",
    "plot_tracker",
]
