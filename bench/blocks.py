"""Measured tables within pages that are written by hand, between comments that name them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import tables

__all__ = ["write_blocks"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

# The label, the file, our candidate there, and the others' names by column.
ROWS: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "a product, `hvp`",
        "single_product",
        "hvp",
        {
            "torch-secorder": "torch-secorder exact_hvp",
            "curvlinops": "curvlinops Hessian @ v, made before",
            "BackPACK": "BackPACK hessian_vector_product",
            "JAX, compiled": "JAX jit jvp(grad(f))",
        },
    ),
    (
        "many with one matrix, `hessian_operator.mm`",
        "k_products",
        "hessian_operator.mm(V)",
        {
            "torch-secorder": "loop of torch-secorder exact_hvp",
            "curvlinops": "curvlinops Hessian @ M",
            "JAX, compiled": "JAX jit jvp(grad(f)), mapped",
        },
    ),
    (
        "a trace, `hutchinson_trace`",
        "trace",
        "hutchinson_trace, operator made anew",
        {
            "torch-secorder": "torch-secorder hessian_trace",
            "curvlinops": "curvlinops hutchinson_trace",
            "JAX, compiled": "JAX jit, probes mapped",
        },
    ),
    (
        "a Gauss-Newton product, `ggnvp`",
        "ggn",
        "ggnvp",
        {
            "torch-secorder": "torch-secorder gauss_newton_product",
            "curvlinops": "curvlinops GGN @ v, made before",
            "BackPACK": "BackPACK ggn_vector_product",
            "JAX, compiled": "JAX jit",
        },
    ),
]
COLUMNS = ["torch-secorder", "curvlinops", "BackPACK", "JAX, compiled"]


def ratios(result: dict[str, Any], ours: str, theirs: str) -> str:
    """Return the least and the largest of our time by theirs, over the problems on which theirs is right."""
    found = []
    for problem in result["problems"]:
        records = {record["name"]: record for record in problem["candidates"]}
        if theirs in records and records[theirs].get("right", True):
            found.append(records[ours]["relative_to_peers"].get(theirs))
    known = [ratio for ratio in found if ratio is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "wrong"


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _beside_others() -> list[str]:
    """Return a row a task, a column a package."""
    lines = ["| | file | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for label, name, ours, peers in ROWS:
        result = _result(name)
        cells = [ratios(result, ours, peers[c]) if c in peers else "-" for c in COLUMNS]
        file = f"[{name}](bench/results/{name}.json)"
        lines.append(f"| {label} | {file} | " + " | ".join(cells) + " |")
    return lines


def _choice(of: str) -> list[str]:
    return tables.choices([p for p in _result("choice")["problems"] if p["of"] == of])


BLOCKS: dict[tuple[str, str], Callable[[], list[str]]] = {
    ("README.md", "ratios"): _beside_others,
    ("docs/how-to/estimates.md", "traces"): lambda: _choice("trace"),
    ("docs/how-to/estimates.md", "diagonals"): lambda: _choice("diagonal"),
}


def write_blocks() -> None:
    """Write every block into its page."""
    for (page, name), rows in BLOCKS.items():
        path = ROOT / page
        marked = re.compile(rf"(<!-- {name},[^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        block = "\n".join(["", *rows(), "", ""])
        text, count = marked.subn(lambda found, b=block: found[1] + b + found[2], path.read_text())
        if count != 1:
            raise ValueError(f"{page} must have one block of {name}")
        path.write_text(text)
