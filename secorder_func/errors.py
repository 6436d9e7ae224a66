"""Error and warning classes, and the one shape of message they carry.

Every message says where it happened, what is wrong, what was expected and given, and how to mend it.
"""

import sys
import warnings

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "CheckpointWarning",
    "ConvergenceWarning",
    "CurvatureFallbackWarning",
    "HiddenParameterError",
    "MissingExtraError",
    "NoExactRouteError",
    "NonFiniteError",
    "RankError",
    "VerificationError",
    "message",
    "warn_user",
]


class CurvatureFallbackWarning(UserWarning):
    """An exact product had to take another exact route than the default one.

    The numbers are as exact as before; time and memory may differ. The message names the cause.
    """


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; the computation goes on."""


class ConvergenceWarning(UserWarning):
    """An iteration used up its steps before its result was within the tolerance.

    The result is returned all the same; the message says how far off it is.
    """


class NoExactRouteError(RuntimeError):
    """No exact route through torch's derivatives exists for this loss.

    `finite_difference_hvp` estimates the product from gradients alone.
    """


class ArgumentError(ValueError, RuntimeError):
    """A bad argument, or a loss that is not one real number.

    It is both a `ValueError`, which it is by nature, and a `RuntimeError`, which is what torch raises in
    its place and what code written against `torch_secorder` expects.
    """


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument, or what a user's function returned, is of the wrong type."""


class CheckpointError(ArgumentError):
    """A checkpoint is damaged, or belongs to another problem, version or setting."""


class NonFiniteError(ArithmeticError):
    """A product has NaN or infinite entries where `check_finite=True` or an iteration needs finite ones."""


class HiddenParameterError(RuntimeError):
    """A closure reaches a parameter by a path on which it cannot be exchanged.

    Only plain autograd, which differentiates the parameters where they are, sees such a path.
    """


class RankError(RuntimeError):
    """Another process of the group failed, is gone, or is in another computation."""


class VerificationError(RuntimeError):
    """A check of `verify` failed; the message is the report."""


class MissingExtraError(ImportError):
    """An optional dependency is needed for this call and is not installed."""

    def __init__(self, where: str, package: str, extra: str) -> None:
        super().__init__(
            f"{where} needs {package}, which is not installed. "
            f"Install it with: pip install 'secorder-func[{extra}]'.",
            name=package,
        )


def message(where: str, problem: str, mend: str = "") -> str:
    """Return `where: problem. mend` with exactly one full stop between the parts.

    >>> message("hvp", "v must match params", "Build v with tree.random_like(params)")
    'hvp: v must match params. Build v with tree.random_like(params).'
    """
    parts = [f"{where}: {problem.rstrip('.')}."]
    if mend:
        parts.append(f"{mend.rstrip('.')}.")
    return " ".join(parts)


def warn_user(text: str, category: type[Warning]) -> None:
    """Warn at the line of the caller's own code, outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("secorder_func", "torch", "contextlib")
