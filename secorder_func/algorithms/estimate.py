"""The result of a randomised algorithm: a value that knows its error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secorder_func.typing import Tree

__all__ = ["Estimate"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """An unbiased estimate with its standard error.

    Attributes
    ----------
    value
        The estimate: a 0-dim tensor, or a tree.
    standard_error
        The estimated standard deviation of `value`, shaped like it; infinite after a single probe, which says nothing
        about its error.
    num_matvecs
        How many products were spent.
    chunk_size
        How many of them at most were made at once.

    Examples
    --------
    >>> import torch
    >>> print(Estimate(torch.tensor(10.0), torch.tensor(0.25), num_matvecs=8))
    10 ± 0.25 (8 products)
    """

    value: Tree
    standard_error: Tree
    num_matvecs: int
    chunk_size: int | None = None

    def __str__(self) -> str:
        if isinstance(self.value, Tensor) and self.value.ndim == 0:
            return f"{self.value.item():.6g} ± {self.standard_error.item():.2g} ({self.num_matvecs} products)"
        return f"Estimate of a tree ({self.num_matvecs} products)"
