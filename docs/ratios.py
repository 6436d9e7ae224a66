"""Write the measured ratios of the front page out of bench/results/*.json: `python docs/ratios.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"

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
BLOCK = re.compile(r"(<!-- ratios[^>]*-->\n).*?(<!-- end of ratios -->)", re.DOTALL)


def ratios(result: dict[str, Any], ours: str, theirs: str) -> str:
    """Return the least and the largest of our time by theirs, over the problems on which theirs is right."""
    found = []
    for problem in result["problems"]:
        records = {record["name"]: record for record in problem["candidates"]}
        if theirs in records and records[theirs].get("right", True):
            found.append(records[ours]["relative_to_peers"].get(theirs))
    known = [ratio for ratio in found if ratio is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "wrong"


def table() -> str:
    """Return a row a task, a column a package."""
    lines = ["| | file | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for label, name, ours, peers in ROWS:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        cells = [ratios(result, ours, peers[c]) if c in peers else "-" for c in COLUMNS]
        file = f"[{name}](bench/results/{name}.json)"
        lines.append(f"| {label} | {file} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = README.read_text()
    written, blocks = BLOCK.subn(lambda found: found[1] + "\n" + table() + "\n\n" + found[2], text)
    if blocks != 1:
        raise SystemExit("README.md must have one block of ratios")
    README.write_text(written)
