"""The documented `torch_secorder` functions, on the functional core.

The module tree is the package's: replace `torch_secorder` by `secorder_func.compat` in an import, or call
`install_as_torch_secorder()` once and change nothing. `__version__` is the release of `torch_secorder` whose surface
this is.

>>> import torch
>>> from secorder_func.compat.core.hvp import exact_hvp
>>> w = torch.tensor([1.0, 2.0], requires_grad=True)
>>> exact_hvp(lambda: (w**3).sum(), [w], torch.tensor([1.0, 0.0]))
tensor([6., 0.])
"""

from secorder_func.compat._install import install_as_torch_secorder
from secorder_func.compat.approximations import (
    empirical_fisher_diagonal,
    empirical_fisher_trace,
    generalized_fisher_diagonal,
    generalized_fisher_trace,
)
from secorder_func.compat.core import (
    approximate_hvp,
    exact_hvp,
    flatten_params,
    gauss_newton_product,
    get_layer_curvature_stats,
    get_param_shapes,
    get_params_by_module_type,
    get_params_by_name_pattern,
    hessian_diagonal,
    hessian_trace,
    model_hessian_diagonal,
    model_hessian_trace,
    model_hvp,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
    unflatten_params,
)

__version__ = "0.0.1"

__all__ = [
    "approximate_hvp",
    "empirical_fisher_diagonal",
    "empirical_fisher_trace",
    "exact_hvp",
    "flatten_params",
    "gauss_newton_product",
    "generalized_fisher_diagonal",
    "generalized_fisher_trace",
    "get_layer_curvature_stats",
    "get_param_shapes",
    "get_params_by_module_type",
    "get_params_by_name_pattern",
    "hessian_diagonal",
    "hessian_trace",
    "install_as_torch_secorder",
    "model_hessian_diagonal",
    "model_hessian_trace",
    "model_hvp",
    "per_layer_fisher_diagonal",
    "per_layer_hessian_diagonal",
    "unflatten_params",
]
