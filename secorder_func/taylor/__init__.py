"""Forward propagation by our own rules: every tensor of a loss with its first-order term.

The mode `"reverse_over_forward"` is one backward pass over it. `tangent`, `together`, `written`, `linear` and
`jointly_linear` give a function of your own a rule; `RULES` is the table.
"""

from secorder_func.taylor import (  # noqa: F401 (they register their rules)
    activations,
    elementwise,
    layers,
    linear_functions,
    losses,
    normalization,
    norms,
    pooling,
    products,
    recurrent,
    selections,
)
from secorder_func.taylor.propagation import Propagation
from secorder_func.taylor.registry import (
    RULES,
    NotCoveredError,
    NotPropagatedError,
    Rule,
    jointly_linear,
    linear,
    tangent,
    together,
    written,
)

__all__ = [
    "RULES",
    "NotCoveredError",
    "NotPropagatedError",
    "Propagation",
    "Rule",
    "jointly_linear",
    "linear",
    "tangent",
    "together",
    "written",
]
