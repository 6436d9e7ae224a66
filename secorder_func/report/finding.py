"""What a part of a report found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from secorder_func import running
from secorder_func.report.subject import Subject

__all__ = [
    "Finding",
    "NotApplicable",
    "Number",
    "Part",
    "Settings",
    "Table",
    "unless_cancelled",
]

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818, no error: the report says why and goes on
    """A part has no meaning for this subject; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    num_probes: int
    num_eigenvalues: int
    num_vectors: int
    num_steps: int
    num_sample_probes: int
    num_samples: int
    num_shown: int
    num_points: int


@dataclass(frozen=True)
class Number:
    """A number of the first table.

    Attributes
    ----------
    label
        What it is.
    value, error
        And how sure it is; None for a number that is exact but for rounding.
    meaning
        What the error is.
    """

    label: str
    value: float
    error: float | None = None
    meaning: str = "exact but for rounding"

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "not finite"
        if self.error is None:
            return f"{self.value:.6g}"
        if not math.isfinite(self.error):
            return f"{self.value:.4g} ± ?"
        return f"{self.value:.{_digits(self.value, self.error)}g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is of names."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Finding:
    """What a part found.

    Attributes
    ----------
    numbers
        For the JSON file: numbers, strings, and lists and dicts of them.
    key
        For the first table.
    figures
        What is drawn, by a name for people.
    tables
        What is listed.
    sentences
        What was done, and what follows from it.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    key: list[Number] = field(default_factory=list)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part of a report.

    Attributes
    ----------
    name, title
        For the JSON file, and for people.
    reading
        How to read it, and what its error bars are.
    measure
        Measures it: of a subject, with these settings, given what earlier parts left for later ones.
    """

    name: str
    title: str
    reading: str
    measure: Callable[[Subject, Settings, torch.Generator, dict[str, Any]], Finding]


def unless_cancelled(compute: Callable[[], T]) -> T | None:
    """Return what is computed, None if it was cancelled: what was found before is not lost."""
    try:
        return compute()
    except running.Cancelled:
        return None


def _digits(value: float, error: float) -> int:
    """Return how many digits of a value matter beside its error, three to six."""
    if not value or not error:
        return 6
    return max(3, min(6, 2 + math.floor(math.log10(abs(value))) - math.floor(math.log10(error))))
