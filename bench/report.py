"""Write docs/performance.md out of bench/results/*.json: `python -m bench.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

<!-- Written by `python -m bench.report` from bench/results; change that, not this page. -->

The unit is one plain gradient, `torch.autograd.grad`, of the same loss on the same machine in the same process,
so that numbers of different machines can be compared, roughly. Each entry is the median over rounds in which all
candidates take turns, with the quartiles behind it. Before anything is timed, every candidate's product is compared
with a double backward in float64; what was wrong says so, and the largest other error stands under the table. Run it
with `make bench`; the candidates are in `bench/single_product.py`, one function each.
"""


def write_page() -> None:
    """Write the page of all results that are there."""
    products, drop_in = (_read(name) for name in ("single_product", "drop_in"))
    sections = [_HEAD, _single_product(products), _drop_in(drop_in)]
    PAGE.write_text("\n".join([*sections, _machine(products["machine"], drop_in["machine"])]))


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _single_product(result: dict[str, Any]) -> str:
    problems = result["problems"]
    lines = ["## One exact Hessian-vector product", ""]
    lines += [
        f"- **{p['name']}**: {p['description']}; {p['parameters']:,} parameters" for p in problems
    ]
    lines += ["", "In gradients; less is better.", "", *_table(problems, _in_gradients)]
    largest = max(
        record["relative_error"]
        for p in problems
        for record in p["candidates"]
        if record.get("right")
    )
    lines += ["", f"Largest relative error of the others: {largest:.1g}, in float32.", ""]
    lines += [line for note in result["notes"] for line in (note, "")]
    lines += ["The gradient itself, in milliseconds: " + _gradients(problems) + ".", ""]
    lines += ["The same in time relative to torch-secorder's `exact_hvp` (below 1 is faster):", ""]
    lines += [*_table(problems, _against("torch-secorder exact_hvp")), ""]
    return "\n".join(lines)


def _drop_in(result: dict[str, Any]) -> str:
    """Return how many times as fast as the package each function of the drop-in is."""
    lines = [
        "## The drop-in beside torch-secorder",
        "",
        "Milliseconds of a call, and how many times as fast ours is: the median over rounds in which both take",
        "turns. On the baseline MLP above, and on a small one, 64-100-32-10, batch 32, with 10,062 parameters.",
        "",
        "| | on | ours | torch-secorder | times as fast | error |",
        "|---|---|---|---|---|---|",
    ]
    for measured in result["problems"]:
        ours, package = (r for r in measured["candidates"] if r["name"] != "gradient")
        name, comma, rest = measured["name"].partition(",")
        cells = [
            f"`{name}`{comma}{rest}",
            measured["problem"],
            f"{ours['milliseconds']['median']:.3g}",
            f"{package['milliseconds']['median']:.3g}",
            f"{1 / ours['relative_to_peers'][package['name']]:.3g}",
            f"{ours['relative_error']:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(line for note in result["notes"] for line in (note, ""))])


def _table(problems: list[dict[str, Any]], cell: Any) -> list[str]:
    names = [record["name"] for record in problems[0]["candidates"] if record["name"] != "gradient"]
    rows = [
        "| | " + " | ".join(p["name"] for p in problems) + " |",
        "|---|" + "---|" * len(problems),
    ]
    for name in names:
        records = [next(r for r in p["candidates"] if r["name"] == name) for p in problems]
        label = f"{name} (other)" if records[0]["peer"] else f"**{name}**"
        rows.append(f"| {label} | " + " | ".join(cell(record) for record in records) + " |")
    return rows


def _in_gradients(record: dict[str, Any]) -> str:
    if "left_out" in record:
        return "-"
    ratio = record["gradients"]
    spread = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
    wrong = "" if record.get("right", True) else f"; **wrong by {record['relative_error']:.1%}**"
    return f"{ratio['median']:.2f} ({spread}){wrong}"


def _against(peer: str) -> Any:
    def cell(record: dict[str, Any]) -> str:
        ratio = 1.0 if record["name"] == peer else record.get("relative_to_peers", {}).get(peer)
        return "-" if ratio is None else f"{ratio:.2f}"

    return cell


def _gradients(problems: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{p['name']} {p['candidates'][0]['milliseconds']['median']:.3g}" for p in problems
    )


def _machine(machine: dict[str, Any], *others: dict[str, Any]) -> str:
    if any(other != machine for other in others):
        raise ValueError("the results are of different machines or versions: run make bench")
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        "## Machine and versions\n\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads for torch, "
        f"{machine['system']}.\n\n{versions}.\n"
    )


if __name__ == "__main__":
    write_page()
