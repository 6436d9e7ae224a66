"""Matrices known by their products: the waist between transforms and algorithms."""

from secorder_func.operators.curvature import ggn_operator, hessian_operator
from secorder_func.operators.linear_operator import LinearOperator

__all__ = ["LinearOperator", "ggn_operator", "hessian_operator"]
