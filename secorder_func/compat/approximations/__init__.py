"""The functions of `torch_secorder.approximations`."""

from secorder_func.compat.approximations.fisher_diagonal import (
    empirical_fisher_diagonal,
    generalized_fisher_diagonal,
)
from secorder_func.compat.approximations.fisher_trace import (
    empirical_fisher_trace,
    generalized_fisher_trace,
)
from secorder_func.compat.approximations.gauss_newton import gauss_newton_matrix_approximation

__all__ = [
    "empirical_fisher_diagonal",
    "empirical_fisher_trace",
    "gauss_newton_matrix_approximation",
    "generalized_fisher_diagonal",
    "generalized_fisher_trace",
]
