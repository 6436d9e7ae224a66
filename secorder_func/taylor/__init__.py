"""Forward propagation by our own rules: every tensor of a loss with its first-order term."""

from secorder_func.taylor import (  # noqa: F401 (they register their rules)
    activations,
    elementwise,
    layers,
    linear,
    losses,
    normalization,
    norms,
    pooling,
    products,
    recurrent,
)
from secorder_func.taylor.propagation import Propagation
from secorder_func.taylor.registry import RULES, NotPropagatedError

__all__ = ["RULES", "NotPropagatedError", "Propagation"]
