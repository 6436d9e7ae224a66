"""What became of the parts of a report, and the report as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from secorder_func.report.finding import Finding, Number, Part

__all__ = ["Outcome", "Report", "Status"]

Status = Literal["done", "partial", "failed", "not applicable", "missing"]
SCHEMA = 2
"""Of the JSON file; raised when a name or a meaning in it changes."""


@dataclass
class Outcome:
    """What became of a part.

    Attributes
    ----------
    part
        Which.
    status
        `"partial"`: it was interrupted and has what it had; `"missing"`: it was not come to.
    finding
        What it found, if anything.
    reason
        Why it failed or does not apply.
    seconds
        How long it took.
    notes
        Warnings.
    svgs
        Its figures, by name.
    """

    part: Part
    status: Status = "missing"
    finding: Finding | None = None
    reason: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    svgs: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """All that is written and printed.

    Attributes
    ----------
    title, headline
        What was measured.
    settings, versions
        What is needed to do it again, by name.
    problem
        What was measured, in numbers.
    outcomes
        Of the parts, in order.
    interrupted
        Whether Ctrl-C ended it.
    """

    title: str
    headline: str
    settings: dict[str, Any]
    versions: dict[str, str]
    problem: dict[str, Any]
    outcomes: list[Outcome]
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def key_numbers(self) -> list[Number]:
        """The numbers of the first table."""
        return [n for outcome in self.outcomes if outcome.finding for n in outcome.finding.key]

    def titles(self, *statuses: Status) -> list[str]:
        """Return the parts of which this became."""
        return [outcome.part.title for outcome in self.outcomes if outcome.status in statuses]

    @property
    def shortcomings(self) -> list[str]:
        """What is to be said at the top: what is missing, what failed."""
        said = []
        if self.interrupted:
            missing = ", ".join(self.titles("missing")) or "none"
            said.append(f"Interrupted: this report is partial. Missing parts: {missing}.")
        for text, status in (
            ("Cut short, with what there was then: ", "partial"),
            ("Failed: ", "failed"),
        ):
            titles = self.titles(status)  # type: ignore[arg-type]
            if titles:
                said.append(f"{text}{', '.join(titles)}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Return everything in numbers, strings, lists and dicts; what is not finite is None."""
        content = {
            "schema": SCHEMA,
            "title": self.title,
            "problem": self.problem,
            "settings": self.settings,
            "versions": self.versions,
            "interrupted": self.interrupted,
            "missing": [o.part.name for o in self.outcomes if o.status == "missing"],
            "seconds": self.seconds,
            "parts": {
                o.part.name: {
                    "status": o.status,
                    "reason": o.reason or None,
                    "seconds": o.seconds,
                    "notes": o.notes,
                    "numbers": o.finding.numbers if o.finding else None,
                }
                for o in self.outcomes
            },
        }
        cleaned: dict[str, Any] = _finite(content)
        return cleaned


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
