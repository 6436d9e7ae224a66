"""The result of a randomised algorithm: a value that knows its error."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.files import write_whole
from secorder_func.checks import check_number
from secorder_func.errors import ArgumentError, message
from secorder_func.typing import Tree

__all__ = ["Estimate", "State", "student"]

State: TypeAlias = dict[str, Any]
"""What an estimator needs to go on: numbers, strings, tensors, and lists of them."""

_FORMAT = 1


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
    converged
        Whether the interval is within the tolerance that was asked for; None if a count was.
    state
        What the function that made it needs to continue it (`resume=`).

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
    converged: bool | None = None
    state: State | None = field(default=None, repr=False)

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
        width = student(confidence, degrees) if degrees else math.inf
        half = tree.scale(width, self.standard_error)
        return tree.sub(self.value, half), tree.add(self.value, half)

    def sqrt(self) -> Estimate:
        """Return the square root: value and standard error by the first-order expansion, which is biased by its square.

        >>> import torch
        >>> print(Estimate(torch.tensor(16.0), torch.tensor(0.8), 8).sqrt())
        4 ± 0.1 (8 products)
        """
        root = tree.map(lambda leaf: leaf.clamp(min=0).sqrt(), self.value)
        error = tree.map(
            lambda e, r: torch.where(e > 0, e / (2 * r), torch.zeros_like(r)),
            self.standard_error,
            root,
        )
        return replace(self, value=root, standard_error=error, state=None)

    def with_state(self, state: State, converged: bool | None) -> Estimate:
        """Return the same with what it takes to continue it."""
        return replace(self, state=state, converged=converged)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all.

        `load` reads it without running any code of the file (`weights_only=True`).
        """
        leaves, _ = tree.flatten(self.value)
        errors, _ = tree.flatten(self.standard_error)
        content = {
            "format": _FORMAT,
            "value": [leaf.detach() for leaf in leaves],
            "standard_error": [leaf.detach() for leaf in errors],
            "plain": _indexed(self.value),
            **{name: getattr(self, name) for name in _PLAIN},
        }
        target = Path(path)
        part = target.with_name(f"{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
        write_whole(content, target, part)

    @staticmethod
    def load(path: str | os.PathLike[str], *, like: Tree | None = None) -> Estimate:
        """Read what `save` wrote.

        `like` is a tree of the structure of the value, needed only where that has other containers than dicts, lists
        and tuples.
        """
        where = "Estimate.load"
        content = torch.load(path, weights_only=True)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            given = content.get("format") if isinstance(content, dict) else type(content).__name__
            problem = f"expected a file of Estimate.save, format {_FORMAT}, got {given!r}"
            raise ArgumentError(message(where, problem))
        skeleton = content["plain"] if like is None else like
        if skeleton is None:
            problem = "the value has containers that are not stored"
            raise ArgumentError(message(where, problem, "Pass like=, a tree of its structure"))
        found, unflatten = tree.flatten(skeleton)
        if len(found) != len(content["value"]):
            problem = f"like has {len(found)} leaves, the stored value {len(content['value'])}"
            raise ArgumentError(message(where, problem))
        parts = {name: unflatten(content[name]) for name in ("value", "standard_error")}
        return Estimate(**parts, **{name: content[name] for name in _PLAIN})

    def __str__(self) -> str:
        spent = f"{self.num_matvecs} {'propagated forms' if self.by_propagation else 'products'}"
        if isinstance(self.value, Tensor) and self.value.ndim == 0:
            return f"{self.value.item():.6g} ± {self.standard_error.item():.2g} ({spent})"
        values, errors = (tree.ravel(part)[0] for part in (self.value, self.standard_error))
        if not len(values):
            return f"no values ({spent})"
        low, high = float(values.min()), float(values.max())
        worst = float(errors.max())
        return f"{len(values)} values from {low:.6g} to {high:.6g}, errors at most {worst:.2g} ({spent})"


_PLAIN = (
    "num_matvecs",
    "chunk_size",
    "degrees_of_freedom",
    "by_propagation",
    "converged",
    "state",
)


def _indexed(value: Tree) -> Any:
    """Return a tree with its leaves numbered, None if it has containers other than dicts, lists and tuples."""
    leaves, unflatten = tree.flatten(value)
    numbered = unflatten(list(range(len(leaves))))
    return numbered if _is_plain(numbered) else None


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) is int


def student(confidence: float, degrees: int) -> float:
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
