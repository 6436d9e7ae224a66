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
    "with_error",
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
        return with_error(self.value, self.error)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is of names. The note, below them, says what they do not tell."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


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
    captions
        What is to be known of a figure, by its name; sentences.
    tables
        What is listed.
    sentences
        What was done, and what follows from it.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    key: list[Number] = field(default_factory=list)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
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


def with_error(value: float, error: float | None) -> str:
    """Return a value to the digits of its error, which has two; None for a value that is exact but for rounding.

    Without exponents from 1e-4 to 1e5. An error below a ten-thousandth of the value leaves it six digits.

    >>> with_error(131.4, 228.0), with_error(0.012345, 0.00067), with_error(2.0178612, 1.1e-11)
    ('130 ± 230', '0.01235 ± 0.00067', '2.01786 ± 1.1e-11')
    >>> with_error(3.21e-7, 4e-8), with_error(1234567.0, 89000.0)
    ('(3.21 ± 0.40)e-07', '(1.235 ± 0.089)e+06')
    """
    if not math.isfinite(value):
        return "not finite"
    if error is None or not error:
        return f"{value:.6g}" + ("" if error is None else " ± 0")
    if not math.isfinite(error):
        return f"{value:.4g} ± ?"
    if error < _SURE * abs(value):
        return f"{value:.6g} ± {_two_digits(error)}"
    size = max(abs(value), error)
    if 1e-4 <= size < 1e5:
        return _to_the_digits_of(error, value)
    power = _power(size)
    scale = 10.0**power
    return f"({_to_the_digits_of(error / scale, value / scale)})e{power:+03d}"


_SURE = 1e-4


def _power(number: float) -> int:
    """Return the power of ten of the first of two digits."""
    return int(f"{number:.1e}".partition("e")[2])


def _two_digits(error: float) -> str:
    if not 1e-4 <= error < 1e5:
        return f"{error:.1e}"
    return f"{round(error, 1 - _power(error)):.{max(0, 1 - _power(error))}f}"


def _to_the_digits_of(error: float, value: float) -> str:
    places = 1 - _power(error)
    rounded = round(value, places) + 0.0  # no -0
    return f"{rounded:.{max(0, places)}f} ± {round(error, places):.{max(0, places)}f}"
