"""The functions of `torch_secorder.analysis`."""

from secorder_func.compat.analysis.eigensolvers import (
    estimate_eigenvalues,
    lanczos_iteration,
    power_iteration,
)
from secorder_func.compat.analysis.landscape import (
    compute_loss_surface_1d,
    compute_loss_surface_2d,
    create_random_direction,
)

__all__ = [
    "compute_loss_surface_1d",
    "compute_loss_surface_2d",
    "create_random_direction",
    "estimate_eigenvalues",
    "lanczos_iteration",
    "power_iteration",
]
