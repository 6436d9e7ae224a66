"""One figure a question, as SVG that is the same for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, NullLocator

__all__ = ["bars", "by_processes", "costs", "decays", "kinds", "lines", "speedups"]

# Okabe and Ito's colours, which the colour-blind can tell apart.
_OURS, _PEER, _UNIT = "#0072B2", "#E69F00", "#999999"
_LINES = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP*"
_STYLE: Any = {
    "svg.hashsalt": "secorder_func",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
}
_LONGEST = 4.0
"""Bars longer than so many times the median bar are cut, with their number at the end."""


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
    path.write_text(text + "\n")


def _legend(figure: Any, wrong: bool) -> None:
    patches = [Rectangle((0, 0), 1, 1, color=color) for color in (_OURS, _PEER)]
    labels = ["secorder_func", "others"]
    if wrong:
        patches.append(Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="black", hatch="////"))
        labels.append("hatched: wrong")
    figure.legend(
        patches, labels, loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 1)
    )


def bars(problems: Sequence[dict[str, Any]], path: Path, *, key: str, label: str) -> None:
    """Draw a panel a problem, a bar a candidate: the median with its quartiles, or one number."""
    names = _names(problems, key)
    columns = min(4, len(problems))
    rows = -(-len(problems) // columns)
    with plt.rc_context(_STYLE):
        size = (2.6 + 2.0 * columns, rows * (0.7 + 0.2 * len(names)))
        figure, axes = plt.subplots(
            rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axis, problem in zip(axes.flat, problems, strict=False):
            _panel(axis, problem, names, key)
        for axis in axes.flat[len(problems) :]:
            axis.set_visible(False)
        figure.supxlabel(label)
        records = [r for p in problems for r in p["candidates"]]
        _legend(figure, any(not r.get("right", True) for r in records))
        _save(figure, path)


def _names(problems: Sequence[dict[str, Any]], key: str) -> list[str]:
    names = list(dict.fromkeys(r["name"] for p in problems for r in p["candidates"] if key in r))
    return [name for name in names if name != "gradient" or key == "peak_mib"]


def kinds(groups: Sequence[Sequence[dict[str, Any]]], path: Path, *, key: str, label: str) -> None:
    """Draw a row of panels a kind of problems, with the candidates of that kind and no others."""
    names = [_names(group, key) for group in groups]
    heights = [0.6 + 0.2 * len(own) for own in names]
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(8.6, sum(heights)), layout="constrained")
        rows = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
        for row, group, own in zip(rows, groups, names, strict=True):
            axes = row.subplots(1, len(group), sharey=True, squeeze=False)[0]
            for axis, problem in zip(axes, group, strict=True):
                _panel(axis, problem, own, key)
        figure.supxlabel(label)
        _legend(figure, wrong=False)
        _save(figure, path)


def _number(record: dict[str, Any], key: str) -> tuple[float, float, float]:
    value = record[key]
    if isinstance(value, dict):
        return value["median"], value["lower_quartile"], value["upper_quartile"]
    return value, value, value


def _panel(axis: Any, problem: dict[str, Any], names: list[str], key: str) -> None:
    records = {r["name"]: r for r in problem["candidates"] if key in r}
    numbers = sorted(_number(records[name], key) for name in names if name in records)
    limit = _LONGEST * numbers[len(numbers) // 2][0]
    longest = min(limit, max(high for _, _, high in numbers))
    for y, name in enumerate(names):
        if name not in records:
            axis.text(0.02 * longest, y, "left out", va="center", color="0.4", fontsize=6)
            continue
        middle, low, high = _number(records[name], key)
        record, shown = records[name], min(middle, limit)
        axis.barh(
            y,
            shown,
            color=_UNIT if name == "gradient" else _PEER if record["peer"] else _OURS,
            edgecolor="black" if not record.get("right", True) else "none",
            hatch=None if record.get("right", True) else "////",
            linewidth=0.5,
            height=0.75,
        )
        if high > low and middle <= limit:
            axis.plot([low, min(high, limit)], [y, y], color="black", linewidth=0.8)
        cut = "" if middle <= limit else "→ "
        end = max(shown, min(high, limit))
        axis.text(end + 0.02 * longest, y, f"{cut}{middle:.3g}", va="center", fontsize=6)
    axis.set_xlim(0, 1.2 * longest)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(problem["name"], fontsize=9)
    axis.grid(axis="x", color="0.9", linewidth=0.6)


def lines(axes_of: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time and memory along every axis, both logarithmic, with the exponents in the legends."""
    with plt.rc_context(_STYLE):
        size = (3.2 * len(axes_of), 5.6)
        figure, axes = plt.subplots(
            2, len(axes_of), figsize=size, squeeze=False, layout="constrained"
        )
        for column, grown in enumerate(axes_of):
            for row, (kind, unit) in enumerate((("time", "milliseconds"), ("memory", "peak, MiB"))):
                axis = axes[row, column]
                for i, line in enumerate(grown[kind]):
                    slope = "" if line["exponent"] is None else f" ({line['exponent']:.2f})"
                    axis.loglog(
                        line["x"],
                        line["y"],
                        color=_LINES[i],
                        marker=_MARKERS[i],
                        markersize=3.5,
                        linewidth=1.2,
                        linestyle="--" if line["peer"] else "-",
                        label=line["name"] + slope,
                    )
                if not grown[kind]:
                    axis.set_visible(False)
                    continue
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.set_xlabel(grown["name"])
                axis.grid(color="0.9", linewidth=0.6)
                low, high = axis.get_ylim()
                axis.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
                axis.legend(fontsize=6, frameon=False, loc="upper left")
                if column == 0:
                    axis.set_ylabel(unit)
        _save(figure, path)


def by_processes(problems: Sequence[dict[str, Any]], path: Path, *, label: str) -> None:
    """Draw the time against the number of processes, a panel for what is computed, a line for what is shared."""
    with plt.rc_context(_STYLE):
        size = (2.3 * len(problems) + 0.6, 2.6)
        figure, axes = plt.subplots(
            1, len(problems), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axis, problem in zip(axes[0], problems, strict=True):
            axis.axhline(1, color="black", linewidth=0.8)
            records = [r for r in problem["candidates"] if r["shared"]]
            for i, shared in enumerate(dict.fromkeys(r["shared"] for r in records), 1):
                own = [r for r in records if r["shared"] == shared]
                counts = [r["processes"] for r in own]
                middle, low, high = zip(*(_number(r, "to_one") for r in own), strict=True)
                style: dict[str, Any] = {"marker": _MARKERS[i], "markersize": 3.5, "linewidth": 1.2}
                axis.plot(counts, middle, color=_LINES[i], label=f"{shared} shared", **style)
                axis.fill_between(counts, low, high, color=_LINES[i], alpha=0.15, linewidth=0)
            counts = sorted({r["processes"] for r in records})
            even = [1 / count for count in counts]
            axis.plot(counts, even, color="0.5", linestyle="--", linewidth=0.8, label="even share")
            axis.set_xticks(counts)
            axis.set_ylim(bottom=0)
            axis.grid(color="0.9", linewidth=0.6)
            axis.set_title(problem["name"], fontsize=9)
        axes[0, 0].set_ylabel(label)
        axes[0, 0].legend(fontsize=6, frameon=False, loc="lower left")
        figure.supxlabel("processes", fontsize=8)
        _save(figure, path)


def decays(problems: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw errors against products, traces above and the rest below, theory dashed, other packages by hollow marks."""
    rows = (("trace", True), ("diagonal, norms", False))
    with plt.rc_context(_STYLE):
        size = (2.3 * len(problems) + 0.6, 5.6)
        figure, axes = plt.subplots(
            2, len(problems), figsize=size, squeeze=False, layout="constrained"
        )
        for row, (title, of_traces) in enumerate(rows):
            lines: dict[str, Any] = {}
            for axis, problem in zip(axes[row], problems, strict=True):
                records = [r for r in problem["candidates"] if "errors" in r]
                shown = [
                    r for r in records if r.get("of", r["name"]).endswith("trace") == of_traces
                ]
                _decay(axis, problem["products"], shown, lines)
                axis.set_title(f"{problem['name']}, {title}", fontsize=8)
            axes[row, 0].set_ylabel("relative error")
            axes[row, 0].legend(
                lines.values(), lines.keys(), fontsize=6, frameon=False, loc="lower left"
            )
            low, high = axes[row, 0].get_ylim()
            axes[row, 0].set_ylim(low * (low / high) ** 0.7, high)  # room for the legend
        figure.supxlabel("products; dashed: theory; hollow: curvlinops", fontsize=8)
        _save(figure, path)


def _decay(
    axis: Any, products: list[int], records: list[dict[str, Any]], lines: dict[str, Any]
) -> None:
    for record in records:
        if record["peer"]:
            i = list(lines).index(record["of"])
            style: dict[str, Any] = {"linestyle": "none", "markersize": 6, "fillstyle": "none"}
        else:
            i = list(lines).index(record["name"]) if record["name"] in lines else len(lines)
            style = {"markersize": 3, "linewidth": 1.2}
        (line,) = axis.loglog(
            products, record["errors"], color=_LINES[i], marker=_MARKERS[i], **style
        )
        if not record["peer"]:
            lines.setdefault(record["name"], line)
            _theory(axis, products, record, _LINES[i])
    axis.set_xticks(products, [str(count) for count in products])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(color="0.9", linewidth=0.6)


def _theory(axis: Any, products: list[int], record: dict[str, Any], color: str) -> None:
    """Draw the rate of theory through the first error."""
    rate = record["rate"]
    if rate["theory"] is None:
        return
    first, begin = record["errors"][0], products[0]
    if rate["kind"] == "factor":
        fallen = [first * rate["theory"] ** (count - begin) for count in products]
    else:
        fallen = [first * (count / begin) ** rate["theory"] for count in products]
    axis.loglog(products, fallen, color=color, linestyle="--", linewidth=0.8, alpha=0.7)


def speedups(rows: Sequence[tuple[str, float]], path: Path, *, label: str) -> None:
    """Draw a dot a function on a logarithmic axis, with a line where both are equally fast."""
    with plt.rc_context(_STYLE):
        size = (6.4, 0.5 + 0.17 * len(rows))
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        for y, (_, factor) in enumerate(rows):
            color = _OURS if factor >= 1 else _PEER
            axis.plot([1, factor], [y, y], color=color, linewidth=1.2)
            axis.plot(factor, y, marker="o", color=color, markersize=4)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=6.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.set_xlabel(label)
        _save(figure, path)


def costs(problems: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw errors against gradients, a panel a matrix, a line a method; what is exact is a dashed line where it is."""
    kinds = list(dict.fromkeys(p["of"] for p in problems))
    columns = len(problems) // len(kinds)
    with plt.rc_context(_STYLE):
        size = (2.3 * columns + 0.6, 5.0)
        figure, axes = plt.subplots(
            len(kinds), columns, figsize=size, squeeze=False, sharey="row", layout="constrained"
        )
        for axis, problem in zip(axes.flat, problems, strict=True):
            _cost(axis, problem)
            axis.set_title(f"{problem['name']}, {problem['of']}", fontsize=8)
        for row in axes:
            row[0].set_ylabel("relative error")
            drawn = {
                label: line
                for axis in row
                for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            row[-1].legend(drawn.values(), drawn.keys(), fontsize=6, loc="lower left")
        figure.supxlabel("gradients", fontsize=8)
        _save(figure, path)


_METHODS = {
    "hutchinson_trace": 1,
    "hutchinson_diagonal": 1,
    "hutchpp_trace": 6,
    "xtrace": 3,
    "xdiag": 3,
    "xnystrace": 2,
}


def _cost(axis: Any, problem: dict[str, Any]) -> None:
    records = [r for r in problem["candidates"] if "method" in r]
    for method in dict.fromkeys(r["method"] for r in records):
        own = [r for r in records if r["method"] == method]
        spent = [r["gradients"]["median"] for r in own]
        if own[0]["products"] == 0:
            axis.axvline(spent[0], color="black", linestyle="--", linewidth=1, label=method)
            continue
        i = _METHODS[method]
        errors = [r["error"] for r in own]
        style: dict[str, Any] = {"marker": _MARKERS[i], "markersize": 3.5, "linewidth": 1.2}
        axis.plot(spent, errors, color=_LINES[i], label=method, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(color="0.9", linewidth=0.6)
