"""The functions of `torch_secorder.core`; `hessian_trace` here is the exact one, as in the original."""

from secorder_func.compat.core.hessian_diagonal import hessian_diagonal, model_hessian_diagonal
from secorder_func.compat.core.hessian_trace import hessian_trace, model_hessian_trace
from secorder_func.compat.core.hvp import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    model_hvp,
)

__all__ = [
    "approximate_hvp",
    "exact_hvp",
    "gauss_newton_product",
    "hessian_diagonal",
    "hessian_trace",
    "model_hessian_diagonal",
    "model_hessian_trace",
    "model_hvp",
]
