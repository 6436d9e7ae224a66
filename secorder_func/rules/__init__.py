"""What torch lacks or gets wrong at second order, and the repair, each with its evidence.

The transforms and the drop-in evaluate every loss under `evaluation`. A repair is one small function in the module of
its subject, registered with the reason; `REPAIRS` lists them all.
"""

from secorder_func.rules import (
    alignment,
    attention,
    backward,
    convolution,
    cut_graphs,
    determinant,
    distances,
    dropout,
    embeddings,
    gradient_stops,
    indices,
    linear_algebra,
    logarithms,
    losses,
    margins,
    normalization,
    products,
    recurrent,
    segments,
    sparse,
    special,
    unpooling,
    wrong_forward,
    wrong_third,
)
from secorder_func.rules.mode import SecondOrderRules, evaluated, evaluation
from secorder_func.rules.registry import REPAIRS, Repair, WrongForwardRuleError, repairs

__all__ = [
    "REPAIRS",
    "Repair",
    "SecondOrderRules",
    "WrongForwardRuleError",
    "alignment",
    "attention",
    "backward",
    "convolution",
    "cut_graphs",
    "determinant",
    "distances",
    "dropout",
    "embeddings",
    "evaluated",
    "evaluation",
    "gradient_stops",
    "indices",
    "linear_algebra",
    "logarithms",
    "losses",
    "margins",
    "normalization",
    "products",
    "recurrent",
    "repairs",
    "segments",
    "sparse",
    "special",
    "unpooling",
    "wrong_forward",
    "wrong_third",
]
