"""The documented `torch_secorder` functions, on the functional core.

The module tree is the package's: replace `torch_secorder` by `secorder_func.compat` in an import, or call
`install_as_torch_secorder()` once and change nothing.

>>> import torch
>>> from secorder_func.compat.core.hvp import exact_hvp
>>> w = torch.tensor([1.0, 2.0], requires_grad=True)
>>> exact_hvp(lambda: (w**3).sum(), [w], torch.tensor([1.0, 0.0]))
tensor([6., 0.])
"""

from secorder_func.compat._install import install_as_torch_secorder
from secorder_func.compat.core import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    hessian_diagonal,
    hessian_trace,
    model_hessian_diagonal,
    model_hessian_trace,
    model_hvp,
)

__all__ = [
    "approximate_hvp",
    "exact_hvp",
    "gauss_newton_product",
    "hessian_diagonal",
    "hessian_trace",
    "install_as_torch_secorder",
    "model_hessian_diagonal",
    "model_hessian_trace",
    "model_hvp",
]
