"""Second-order curvature for PyTorch as composable functional transforms.

>>> import torch
>>> from secorder_func import hvp
>>> hvp(lambda p: (p**3).sum())(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
tensor([6., 0.])
"""

from secorder_func import errors, taylor, tree
from secorder_func.algorithms import (
    Eigenpairs,
    Estimate,
    LayerCurvature,
    SpectralDensity,
    eigsh,
    exact_diagonal,
    exact_trace,
    filter_normalized,
    hutchinson_diagonal,
    hutchinson_laplacian,
    hutchinson_squared_frobenius_norm,
    hutchinson_squared_row_norms,
    hutchinson_trace,
    hutchpp_trace,
    layer_curvature,
    matrix_function,
    probes,
    random_direction,
    spectral_density,
    top_eigenpairs,
    xdiag,
    xnystrace,
    xtrace,
)
from secorder_func.errors import CurvatureFallbackWarning, NoExactRouteError
from secorder_func.nn import functional_loss, functional_model
from secorder_func.operators import (
    LinearOperator,
    PerSampleOperator,
    empirical_fisher_operator,
    fisher_operator,
    ggn_operator,
    hessian_operator,
    per_sample_empirical_fisher_operator,
    per_sample_fisher_operator,
    per_sample_ggn_operator,
    per_sample_hessian_operator,
)
from secorder_func.transforms import (
    bilinear_form,
    finite_difference_hvp,
    ggnvp,
    hvp,
    hvp_and_grad,
    laplacian,
    likelihoods,
    loss_surface,
    quadratic_form,
    rule_kinds,
)
from secorder_func.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CurvatureFallbackWarning",
    "Eigenpairs",
    "Estimate",
    "LayerCurvature",
    "LinearOperator",
    "NoExactRouteError",
    "PerSampleOperator",
    "SpectralDensity",
    "Verification",
    "bilinear_form",
    "eigsh",
    "empirical_fisher_operator",
    "errors",
    "exact_diagonal",
    "exact_trace",
    "filter_normalized",
    "finite_difference_hvp",
    "fisher_operator",
    "functional_loss",
    "functional_model",
    "ggn_operator",
    "ggnvp",
    "hessian_operator",
    "hutchinson_diagonal",
    "hutchinson_laplacian",
    "hutchinson_squared_frobenius_norm",
    "hutchinson_squared_row_norms",
    "hutchinson_trace",
    "hutchpp_trace",
    "hvp",
    "hvp_and_grad",
    "laplacian",
    "layer_curvature",
    "likelihoods",
    "loss_surface",
    "matrix_function",
    "per_sample_empirical_fisher_operator",
    "per_sample_fisher_operator",
    "per_sample_ggn_operator",
    "per_sample_hessian_operator",
    "probes",
    "quadratic_form",
    "random_direction",
    "rule_kinds",
    "spectral_density",
    "taylor",
    "top_eigenpairs",
    "tree",
    "verify",
    "xdiag",
    "xnystrace",
    "xtrace",
]
