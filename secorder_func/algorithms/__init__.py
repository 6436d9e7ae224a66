"""Numbers from operators: algorithms that know products and trees, and nothing of losses or derivatives."""

from secorder_func.algorithms import probes
from secorder_func.algorithms.cg import cg
from secorder_func.algorithms.checkpoint import Checkpoint
from secorder_func.algorithms.density import SpectralDensity, spectral_density
from secorder_func.algorithms.diagonal import exact_diagonal, hutchinson_diagonal, xdiag
from secorder_func.algorithms.directions import filter_normalized, random_direction
from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.eigsh import eigsh
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.laplacian import hutchinson_laplacian
from secorder_func.algorithms.layers import LayerCurvature, layer_curvature
from secorder_func.algorithms.low_rank_trace import hutchpp_trace, xnystrace, xtrace
from secorder_func.algorithms.matrix_function import matrix_function
from secorder_func.algorithms.minres import minres
from secorder_func.algorithms.norms import (
    hutchinson_squared_frobenius_norm,
    hutchinson_squared_row_norms,
)
from secorder_func.algorithms.preconditioners import (
    diagonal_preconditioner,
    nystrom_preconditioner,
)
from secorder_func.algorithms.solution import Solution
from secorder_func.algorithms.top_eigenpairs import top_eigenpairs
from secorder_func.algorithms.trace import exact_trace, hutchinson_trace

__all__ = [
    "Checkpoint",
    "Eigenpairs",
    "Estimate",
    "LayerCurvature",
    "Solution",
    "SpectralDensity",
    "cg",
    "diagonal_preconditioner",
    "eigsh",
    "exact_diagonal",
    "exact_trace",
    "filter_normalized",
    "hutchinson_diagonal",
    "hutchinson_laplacian",
    "hutchinson_squared_frobenius_norm",
    "hutchinson_squared_row_norms",
    "hutchinson_trace",
    "hutchpp_trace",
    "layer_curvature",
    "matrix_function",
    "minres",
    "nystrom_preconditioner",
    "probes",
    "random_direction",
    "spectral_density",
    "top_eigenpairs",
    "xdiag",
    "xnystrace",
    "xtrace",
]
