"""Tables of the page, out of the records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "against",
    "by_processes",
    "drop_in_rows",
    "exponents",
    "fact",
    "in_gradients",
    "in_mib",
    "left_out",
    "loops",
    "named",
    "rate",
    "sent",
    "series",
    "speed",
    "table",
    "to_one",
    "to_tolerance",
]

Problem = dict[str, Any]
Record = dict[str, Any]


def named(problem: Problem, name: str) -> Record | None:
    """Return the record of a candidate."""
    return next((r for r in problem["candidates"] if r["name"] == name), None)


def table(
    problems: list[Problem],
    cell: Callable[[Record], str],
    *,
    names: Callable[[Record], bool] = lambda record: record["name"] != "gradient",
) -> list[str]:
    """Return a row a candidate, ours bold, a column a problem."""
    rows = {r["name"]: r for p in problems for r in p["candidates"] if names(r)}
    lines = ["| | " + " | ".join(p["name"] for p in problems) + " |"]
    lines += ["|---|" + "---|" * len(problems)]
    for name, first in rows.items():
        records = [named(p, name) for p in problems]
        cells = ["-" if r is None or "left_out" in r else cell(r) for r in records]
        lines.append(f"| {_label(name, first['peer'])} | " + " | ".join(cells) + " |")
    return lines


def _label(name: str, peer: bool) -> str:
    return name if name == "gradient" else f"{name} (other)" if peer else f"**{name}**"


def _wrong(record: Record) -> str:
    return "" if record.get("right", True) else f"; **wrong by {record['relative_error']:.1%}**"


def in_gradients(record: Record) -> str:
    """Return the median with its quartiles."""
    ratio = record["gradients"]
    spread = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
    return f"{ratio['median']:.2f} ({spread}){_wrong(record)}"


def against(peer: str) -> Callable[[Record], str]:
    """Return the cell of the ratio of times to a peer's."""

    def cell(record: Record) -> str:
        ratio = 1.0 if record["name"] == peer else record.get("relative_to_peers", {}).get(peer)
        return "-" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"

    return cell


def in_mib(record: Record) -> str:
    """Return the peak, and what the call adds where a budget was given."""
    peak = f"{record['peak_mib']:.3g}{_wrong(record)}"
    if "budget_mib" not in record:
        return peak
    inside = "inside" if record["inside_budget"] else "**outside**"
    return f"{peak}; adds {record['added_mib']:.3g}, {inside} {record['budget_mib']:.0f}"


def fact(name: str, form: str = ".3g") -> Callable[[Record], str]:
    """Return the cell of one entry of a record."""

    def cell(record: Record) -> str:
        value = record.get(name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "-" if value is None else f"{value:{form}}"

    return cell


def series(key: str, form: str = ".2g") -> Callable[[Record], str]:
    """Return the cell of the numbers of a record, one for every count of products."""
    return lambda record: " · ".join(f"{value:{form}}" for value in record[key])


def rate(record: Record) -> str:
    """Return how an error falls, with what theory has for it."""
    found, theory = record["rate"]["found"], record["rate"]["theory"]
    if record["rate"]["kind"] == "factor":
        return f"{found:.3f} a product ({theory:.3f})"
    return f"{found:.2f}" if theory is None else f"{found:.2f} ({theory:g})"


def to_tolerance(rtol: float) -> Callable[[Record], str]:
    """Return the cell of what runs to a tolerance spent, and how often they were right."""

    def cell(record: Record) -> str:
        found = next(a for a in record["adaptive"] if a["rtol"] == rtol)
        if not found["converged"]:
            return f"not within {found['products']:,}"
        part = "" if found["converged"] == 1 else f"{found['converged']:.0%} stopped; "
        return f"{part}{found['products']:,}; {found['within']:.0%}, {found['coverage']:.0%}"

    return cell


def left_out(problems: list[Problem]) -> list[str]:
    """Return a line for every reason for which something was left out."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        for record in problem["candidates"]:
            if "left_out" in record:
                key = record["name"], record["left_out"]
                reasons.setdefault(key, []).append(problem["name"])
    found = [
        f"- {name} on {', '.join(dict.fromkeys(on))}: {why}" for (name, why), on in reasons.items()
    ]
    return ["Left out:", "", *found, ""] if found else []


def loops(problem: Problem) -> str:
    """Return how many times as long as the first candidate every loop takes."""
    ratios = problem["candidates"][1]["relative_to_peers"]
    return " · ".join(f"{1 / r:.3g}" for name, r in ratios.items() if name.startswith("loop"))


def exponents(axes: list[dict[str, Any]], kind: str) -> list[str]:
    """Return a row a candidate, a column an axis of growth."""
    grown = [axis for axis in axes if axis[kind]]
    names = {line["name"]: line["peer"] for axis in grown for line in axis[kind]}
    lines = [f"| {kind} | " + " | ".join(axis["name"] for axis in grown) + " |"]
    lines += ["|---|" + "---|" * len(grown)]
    for name, peer in names.items():
        cells = []
        for axis in grown:
            line = next((line for line in axis[kind] if line["name"] == name), None)
            slope = None if line is None else line["exponent"]
            cells.append("-" if slope is None else f"{slope:.2f}")
        lines.append(f"| {_label(name, peer)} | " + " | ".join(cells) + " |")
    return lines


def by_processes(problems: list[Problem], cell: Callable[[Record], str]) -> list[str]:
    """Return a row for what is computed and what is shared, a column a number of processes."""
    grouped = [(p, r) for p in problems for r in p["candidates"] if r["shared"]]
    counts = sorted({r["processes"] for _, r in grouped})
    lines = ["| | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    rows: dict[str, dict[int, str]] = {}
    for p, r in grouped:
        rows.setdefault(f"{p['name']}, {r['shared']} shared", {})[r["processes"]] = cell(r)
    for name, cells in rows.items():
        lines.append(f"| **{name}** | " + " | ".join(cells[count] for count in counts) + " |")
    return lines


def to_one(record: Record) -> str:
    """Return the time relative to one process, with its quartiles."""
    ratio = record["to_one"]
    return f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"


def sent(record: Record) -> str:
    """Return the messages of a call and their bytes."""
    size = record["bytes"]
    shown = f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size:,} B"
    return f"{record['calls']}; {shown}"


def speed(measured: Problem) -> float:
    """Return how many times as fast as the package ours is, in a record of the drop-in."""
    ours, package = (r for r in measured["candidates"] if r["name"] != "gradient")
    return float(1 / ours["relative_to_peers"][package["name"]])


def drop_in_rows(problems: list[Problem]) -> list[str]:
    """Return a row a function of the drop-in, beside the package's."""
    lines = [
        "| | on | ours | torch-secorder | times as fast | error |",
        "|---|---|---|---|---|---|",
    ]
    for measured in problems:
        ours, package = (r for r in measured["candidates"] if r["name"] != "gradient")
        name, comma, rest = measured["name"].partition(",")
        cells = [
            f"`{name}`{comma}{rest}",
            measured["problem"],
            f"{ours['milliseconds']['median']:.3g}",
            f"{package['milliseconds']['median']:.3g}",
            f"{speed(measured):.3g}",
            f"{ours['relative_error']:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
