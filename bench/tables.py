"""Tables of the page, out of the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = [
    "against",
    "by_processes",
    "choices",
    "cost_of",
    "drop_in_rows",
    "error_and_cost",
    "exponents",
    "extent",
    "fact",
    "head",
    "in_gradients",
    "in_mib",
    "in_pairs",
    "left_out",
    "loops",
    "named",
    "rate",
    "sent",
    "series",
    "span",
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


def head(columns: list[str], first: str = "", *, several: bool = False) -> list[str]:
    """Return the first two lines of a table: names, then numbers, which stand right if a cell has one."""
    start = f"| {first} |" if first else "| |"
    side = "---|" if several else "---:|"
    return [f"{start} {' | '.join(columns)} |", "|---|" + side * len(columns)]


def table(
    problems: list[Problem],
    cell: Callable[[Record], str],
    *,
    names: Callable[[Record], bool] = lambda record: record["name"] != "gradient",
    several: bool = False,
) -> list[str]:
    """Return a row a candidate, ours bold, a column a problem; a cell may have several numbers."""
    rows = {r["name"]: r for p in problems for r in p["candidates"] if names(r)}
    lines = head([p["name"] for p in problems], several=several)
    for name, first in rows.items():
        records = [named(p, name) for p in problems]
        cells = ["-" if r is None or "left_out" in r else cell(r) for r in records]
        lines.append(f"| {_label(name, first['peer'])} | " + " | ".join(cells) + " |")
    return lines


def _label(name: str, peer: bool) -> str:
    shown = name.replace("_over_", "_over_<wbr>")  # where a long mode may be broken
    return shown if name == "gradient" else f"{shown} (other)" if peer else f"**{shown}**"


def _short(value: float) -> str:
    """Return a number with three digits, or all that stand before its point."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _ratio(value: float) -> str:
    """Return a ratio with two places, or fewer where it is large."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 99.5 else f"{value:,.0f}"


def _below(number: str, remark: str) -> str:
    """Return a cell of two lines, the second one smaller."""
    return f"{number}<br><small>{remark}</small>"


def _wrong(record: Record) -> str:
    right = record.get("right", True)
    return "" if right else f"<br><small>**wrong by {record['relative_error']:.1%}**</small>"


def _median(ratio: dict[str, float]) -> str:
    low, high = _ratio(ratio["lower_quartile"]), _ratio(ratio["upper_quartile"])
    return _below(_ratio(ratio["median"]), f"{low}–{high}")


def in_gradients(record: Record) -> str:
    """Return the median with its quartiles."""
    return _median(record["gradients"]) + _wrong(record)


def against(peer: str) -> Callable[[Record], str]:
    """Return the cell of the ratio of times to a peer's."""

    def cell(record: Record) -> str:
        ratio = 1.0 if record["name"] == peer else record.get("relative_to_peers", {}).get(peer)
        return "-" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"

    return cell


def in_mib(record: Record) -> str:
    """Return the peak, and what the call adds where a budget was given."""
    peak = _short(record["peak_mib"])
    if "budget_mib" not in record:
        return peak + _wrong(record)
    inside = "inside" if record["inside_budget"] else "**outside**"
    added = f"adds {record['added_mib']:.3g}, {inside} {record['budget_mib']:.0f}"
    return _below(peak, added) + _wrong(record)


def span(numbers: Iterable[float]) -> str:
    """Return the least and the most of some numbers."""
    ends = sorted(numbers)
    low, high = _ratio(ends[0]), _ratio(ends[-1])
    return low if low == high else f"{low}–{high}"


def extent(numbers: dict[str, float]) -> str:
    """Return the least and the most of some numbers, and below what they are of."""
    low = min(numbers, key=lambda name: numbers[name])
    high = max(numbers, key=lambda name: numbers[name])
    return _below(span(numbers.values()), low if low == high else f"{low}, {high}")


def fact(name: str) -> Callable[[Record], str]:
    """Return the cell of one entry of a record."""

    def cell(record: Record) -> str:
        value = record.get(name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "-" if value is None else _short(value)

    return cell


def series(key: str, form: str = ".2g") -> Callable[[Record], str]:
    """Return the cell of the numbers of a record, one for every count of products."""
    return lambda record: in_pairs([f"{value:{form}}" for value in record[key]])


def in_pairs(numbers: list[str]) -> str:
    """Return a cell of several numbers, two in a line."""
    return "<br>".join(" · ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2))


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
            return _below("-", f"not within {found['products']:,}")
        part = "" if found["converged"] == 1 else f"{found['converged']:.0%} stopped; "
        shares = f"{part}{found['within']:.0%}, {found['coverage']:.0%}"
        return _below(f"{found['products']:,}", shares)

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
    lines = head([axis["name"] for axis in grown], kind)
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
    lines = head([str(count) for count in counts])
    rows: dict[str, dict[int, str]] = {}
    for p, r in grouped:
        rows.setdefault(f"{p['name']}, {r['shared']} shared", {})[r["processes"]] = cell(r)
    for name, cells in rows.items():
        lines.append(f"| **{name}** | " + " | ".join(cells[count] for count in counts) + " |")
    return lines


def to_one(record: Record) -> str:
    """Return the time relative to one process, with its quartiles."""
    return _median(record["to_one"])


def sent(record: Record) -> str:
    """Return the messages of a call and their bytes."""
    size = record["bytes"]
    shown = f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size:,} B"
    return _below(str(record["calls"]), shown)


def speed(measured: Problem) -> float:
    """Return how many times as fast as the package ours is, in a record of the drop-in."""
    ours, package = (r for r in measured["candidates"] if r["name"] != "gradient")
    return float(1 / ours["relative_to_peers"][package["name"]])


def drop_in_rows(problems: list[Problem]) -> list[str]:
    """Return a row a function of the drop-in, beside the package's."""
    lines = [
        "| | on | ours | torch-secorder | times as fast | error |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for measured in problems:
        ours, package = (r for r in measured["candidates"] if r["name"] != "gradient")
        name, comma, rest = measured["name"].partition(",")
        cells = [
            f"`{name}`{comma}{rest}",
            measured["problem"],
            _short(ours["milliseconds"]["median"]),
            _short(package["milliseconds"]["median"]),
            f"{speed(measured):.3g}",
            f"{ours['relative_error']:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cost_of(points: Sequence[tuple[float, float]], error: float) -> float | None:
    """Return what an error costs, from `(cost, error)` by rising cost; None if it is beyond the last."""
    before: tuple[float, float] | None = None
    for cost, reached in points:
        if reached <= error:
            if before is None:
                return cost
            share = math.log(before[1] / error) / math.log(before[1] / max(reached, 1e-300))
            return before[0] * (cost / before[0]) ** share
        before = cost, reached
    return None


def choices(problems: list[Problem]) -> list[str]:
    """Return a row a method, a column a problem: the gradients to an error of 5 %, and below to one of 1 %."""
    methods = dict.fromkeys(r["method"] for p in problems for r in p["candidates"] if "method" in r)
    lines = head([p["name"] for p in problems])
    for method in methods:
        cells = []
        for p in problems:
            own = [r for r in p["candidates"] if r.get("method") == method]
            points = [(r["gradients"]["median"], r["error"]) for r in own]
            costs = [cost_of(points, error) for error in (0.05, 0.01)]
            most = f"> {_short(points[-1][0])}" if points else ""
            five, one = (most if cost is None else _short(cost) for cost in costs)
            cells.append(_below(five, one) if points else "-")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def error_and_cost(record: Record) -> str:
    """Return the error, and below what it took."""
    error = "exact" if not record["products"] else f"{record['error']:.2%}"
    return _below(error, _ratio(record["gradients"]["median"]))
