"""Matrices known by their products: the waist between transforms and algorithms."""

from secorder_func.operators.batches import Batches
from secorder_func.operators.curvature import ggn_operator, hessian_operator
from secorder_func.operators.fisher import empirical_fisher_operator, fisher_operator
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.per_sample import (
    per_sample_empirical_fisher_operator,
    per_sample_fisher_operator,
    per_sample_ggn_operator,
    per_sample_hessian_operator,
)
from secorder_func.operators.per_sample_operator import PerSampleOperator
from secorder_func.operators.shared_vectors import share_vectors

__all__ = [
    "Batches",
    "LinearOperator",
    "PerSampleOperator",
    "empirical_fisher_operator",
    "fisher_operator",
    "ggn_operator",
    "hessian_operator",
    "per_sample_empirical_fisher_operator",
    "per_sample_fisher_operator",
    "per_sample_ggn_operator",
    "per_sample_hessian_operator",
    "share_vectors",
]
