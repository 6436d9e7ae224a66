"""The functions of `torch_secorder.analysis`."""

from secorder_func.compat.analysis.eigensolvers import (
    estimate_eigenvalues,
    lanczos_iteration,
    power_iteration,
)

__all__ = [
    "estimate_eigenvalues",
    "lanczos_iteration",
    "power_iteration",
]
