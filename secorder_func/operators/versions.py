"""Operators belong to the values that parameters had when they were made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secorder_func.errors import message

__all__ = ["Versions"]


class Versions:
    """Notices that a parameter, or the data, was changed in place."""

    def __init__(self, leaves: Sequence[Tensor], data: Sequence[Tensor] = ()) -> None:
        self._leaves, self._data = leaves, data
        self._made_at = _versions(leaves), _versions(data)

    def require_unchanged(self) -> None:
        """Raise if one was."""
        for what, tensors, made_at in (
            ("a parameter was", self._leaves, self._made_at[0]),
            ("the data were", self._data, self._made_at[1]),
        ):
            if _versions(tensors) != made_at:
                problem = f"{what} changed in place after the operator was made"
                mend = "Make a new operator at the new parameters"
                raise RuntimeError(message("LinearOperator", problem, mend))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else int(tensor._version) for tensor in tensors]
