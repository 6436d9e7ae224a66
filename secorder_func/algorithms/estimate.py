"""The result of a randomised algorithm: a value that knows its error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_number
from secorder_func.errors import message
from secorder_func.typing import Tree

__all__ = ["Estimate"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """An unbiased estimate with its standard error.

    Attributes
    ----------
    value
        The estimate: a tensor, or a tree.
    standard_error
        The estimated standard deviation of `value`, shaped like it; infinite after a single probe, which says nothing
        about its error.
    num_matvecs
        How many products were spent, or forms without products.
    chunk_size
        How many of them at most were made at once.
    degrees_of_freedom
        One less than the number of independent values behind the standard error: one a probe, or one a group of probes.
    by_propagation
        Whether forms were had by second-order forward propagation, without products.

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
    degrees_of_freedom: int | None = None
    by_propagation: bool = False

    def interval(self, confidence: float = 0.95) -> tuple[Tree, Tree]:
        """Return the bounds between which the exact value lies with this probability, by Student's t.

        >>> import torch
        >>> low, high = Estimate(torch.tensor(10.0), torch.tensor(1.0), 8).interval()
        >>> f"{float(low):.2f} {float(high):.2f}"
        '7.64 12.36'
        """
        where = "Estimate.interval"
        check_number(confidence, where, name="confidence")
        if not 0 < confidence < 1:
            problem = f"confidence must be in (0, 1), got {confidence}"
            raise ValueError(message(where, problem, "Pass a probability, such as 0.95"))
        degrees = self.num_matvecs - 1
        if self.degrees_of_freedom is not None:
            degrees = self.degrees_of_freedom
        width = _student(confidence, degrees) if degrees else math.inf
        half = tree.scale(width, self.standard_error)
        return tree.sub(self.value, half), tree.add(self.value, half)

    def __str__(self) -> str:
        spent = f"{self.num_matvecs} {'propagated forms' if self.by_propagation else 'products'}"
        if isinstance(self.value, Tensor) and self.value.ndim == 0:
            return f"{self.value.item():.6g} ± {self.standard_error.item():.2g} ({spent})"
        return f"Estimate of a tree ({spent})"


def _student(confidence: float, degrees: int) -> float:
    """Return what a Student t variable stays below in size with some probability, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _within(size: float, degrees: int) -> float:
    """Return the probability that a Student t variable is at most so large, by the finite series for whole degrees.

    M. Abramowitz, I. A. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(size, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * (total if degrees > 1 else 0.0)
