"""Second-order curvature for PyTorch as composable functional transforms.

>>> import torch
>>> from secorder_func import hvp
>>> hvp(lambda p: (p**3).sum())(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
tensor([6., 0.])
"""

from secorder_func import errors, taylor, tree
from secorder_func.algorithms import (
    Estimate,
    exact_diagonal,
    exact_trace,
    filter_normalized,
    hutchinson_diagonal,
    hutchinson_laplacian,
    hutchinson_trace,
    probes,
    random_direction,
)
from secorder_func.errors import CurvatureFallbackWarning, NoExactRouteError
from secorder_func.nn import functional_loss, functional_model
from secorder_func.operators import LinearOperator, ggn_operator, hessian_operator
from secorder_func.transforms import (
    bilinear_form,
    finite_difference_hvp,
    ggnvp,
    hvp,
    hvp_and_grad,
    laplacian,
    loss_surface,
    quadratic_form,
    rule_kinds,
)
from secorder_func.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CurvatureFallbackWarning",
    "Estimate",
    "LinearOperator",
    "NoExactRouteError",
    "Verification",
    "bilinear_form",
    "errors",
    "exact_diagonal",
    "exact_trace",
    "filter_normalized",
    "finite_difference_hvp",
    "functional_loss",
    "functional_model",
    "ggn_operator",
    "ggnvp",
    "hessian_operator",
    "hutchinson_diagonal",
    "hutchinson_laplacian",
    "hutchinson_trace",
    "hvp",
    "hvp_and_grad",
    "laplacian",
    "loss_surface",
    "probes",
    "quadratic_form",
    "random_direction",
    "rule_kinds",
    "taylor",
    "tree",
    "verify",
]
