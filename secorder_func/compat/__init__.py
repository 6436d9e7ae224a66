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
from secorder_func.compat.analysis import (
    compute_loss_surface_1d,
    compute_loss_surface_2d,
    estimate_eigenvalues,
    lanczos_iteration,
    power_iteration,
)
from secorder_func.compat.approximations import (
    empirical_fisher_diagonal,
    empirical_fisher_trace,
    gauss_newton_matrix_approximation,
    generalized_fisher_diagonal,
    generalized_fisher_trace,
)
from secorder_func.compat.core import (
    approximate_hvp,
    batch_jvp,
    batch_vjp,
    exact_hvp,
    flatten_params,
    full_jacobian,
    gauss_newton_product,
    get_layer_curvature_stats,
    get_param_shapes,
    get_params_by_module_type,
    get_params_by_name_pattern,
    hessian_diagonal,
    hessian_trace,
    jvp,
    model_hessian_diagonal,
    model_hessian_trace,
    model_hvp,
    model_jvp,
    model_vjp,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
    unflatten_params,
    vjp,
)

__version__ = "0.0.1"

__all__ = [
    "approximate_hvp",
    "batch_jvp",
    "batch_vjp",
    "compute_loss_surface_1d",
    "compute_loss_surface_2d",
    "empirical_fisher_diagonal",
    "empirical_fisher_trace",
    "estimate_eigenvalues",
    "exact_hvp",
    "flatten_params",
    "full_jacobian",
    "gauss_newton_matrix_approximation",
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
    "jvp",
    "lanczos_iteration",
    "model_hessian_diagonal",
    "model_hessian_trace",
    "model_hvp",
    "model_jvp",
    "model_vjp",
    "per_layer_fisher_diagonal",
    "per_layer_hessian_diagonal",
    "power_iteration",
    "unflatten_params",
    "vjp",
]
