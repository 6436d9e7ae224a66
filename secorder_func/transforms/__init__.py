"""Function transforms: a scalar function becomes the product with its curvature, or its values on a surface."""

from secorder_func.transforms import likelihoods
from secorder_func.transforms.finite_difference import finite_difference_hvp
from secorder_func.transforms.forms import bilinear_form, quadratic_form
from secorder_func.transforms.gauss_newton import ggnvp
from secorder_func.transforms.hessian import hvp, hvp_and_grad
from secorder_func.transforms.laplacian import laplacian
from secorder_func.transforms.loss_surface import loss_surface
from secorder_func.transforms.propagated import rule_kinds

__all__ = [
    "bilinear_form",
    "finite_difference_hvp",
    "ggnvp",
    "hvp",
    "hvp_and_grad",
    "laplacian",
    "likelihoods",
    "loss_surface",
    "quadratic_form",
    "rule_kinds",
]
