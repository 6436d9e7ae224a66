"""Operators belong to the values that parameters had when they were made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secorder_func.errors import message

__all__ = ["Versions"]


class Versions:
    """Notices that a parameter was changed in place."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._made_at = self._now()

    def require_unchanged(self) -> None:
        """Raise if one was."""
        if self._now() != self._made_at:
            raise RuntimeError(
                message(
                    "LinearOperator",
                    "a parameter was changed in place after the operator was made",
                    "Make a new operator at the new parameters",
                )
            )

    def _now(self) -> list[int]:
        return [-1 if leaf.is_inference() else int(leaf._version) for leaf in self._leaves]
