"""The tables on the terminal: of the demonstration, with whether each check holds, and of reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from secorder_func.report.finding import Number, with_error
from secorder_func.report.finding import Table as Listed

__all__ = ["DigitRow", "Row", "digit_table", "listed_table", "number_table", "result_table"]


@dataclass(frozen=True)
class Row:
    """A line of the table of results.

    Attributes
    ----------
    label, value
        What was computed and what came out.
    check
        What it was compared with, and how they differ.
    holds
        The verdict.
    closes
        Whether a rule follows.
    """

    label: str
    value: str
    check: str
    holds: bool
    closes: bool = False


@dataclass(frozen=True)
class DigitRow:
    """A line of the table of digits: which sample, what the model makes of it, and its curvature."""

    index: int
    label: int
    prediction: int
    loss: float
    exact: float
    estimate: float
    standard_error: float


def result_table(rows: Sequence[Row]) -> Table:
    """Return the table of results."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("checked against", overflow="fold")
    table.add_column("", no_wrap=True, justify="right")
    for row in rows:
        verdict = Text("ok", style="green") if row.holds else Text("OFF", style="bold red")
        table.add_row(
            Text(row.label), Text(row.value), Text(row.check), verdict, end_section=row.closes
        )
    return table


def digit_table(title: str, rows: Sequence[DigitRow]) -> Table:
    """Return a table of digits in the order given."""
    table = _titled(title)
    for heading in (
        "digit",
        "label",
        "read as",
        "loss",
        "trace, exact",
        "trace, estimated",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        wrong = row.label != row.prediction
        table.add_row(
            f"#{row.index}",
            str(row.label),
            Text(str(row.prediction), style="bold red" if wrong else ""),
            f"{row.loss:.2g}",
            f"{row.exact:.4g}",
            with_error(row.estimate, row.standard_error),
        )
    return table


def number_table(numbers: Sequence[Number]) -> Table:
    """Return the table of the key numbers of a report."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("the error is", overflow="fold")
    for number in numbers:
        table.add_row(Text(number.label), Text(str(number)), Text(number.meaning))
    return table


def listed_table(listed: Listed) -> Table:
    """Return a table of a report."""
    table = _titled(listed.title)
    if listed.note:
        table.caption, table.caption_justify = Text(listed.note), "left"
    for column, heading in enumerate(listed.head):
        table.add_column(heading, justify="right" if column else "left", overflow="fold")
    for row in listed.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _titled(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        min_width=len(title),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
