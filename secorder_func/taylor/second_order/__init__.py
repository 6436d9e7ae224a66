"""Second order: every tensor of a loss with first-order terms along several vectors, and the sums of their bends."""

from secorder_func.taylor.second_order import (  # noqa: F401 (they register their rules)
    elementwise,
    layers,
    products,
)
from secorder_func.taylor.second_order.propagation import Draw, SecondOrderPropagation

__all__ = ["Draw", "SecondOrderPropagation"]
