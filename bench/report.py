"""Write docs/performance.md and its figures out of bench/results/*.json: `python -m bench.report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

from bench import plots, tables
from bench.blocks import write_blocks

__all__ = ["IMAGES", "PAGE", "RESULTS", "write_page"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images" / "performance"

_HEAD = """# Performance

<!-- Written by `python -m bench.report` from bench/results; change that, not this page. -->

The unit is one plain gradient, `torch.autograd.grad`, of the same loss on the same machine in the same process,
so that numbers of different machines can be compared, roughly.
"""

_METHOD = """## Models and method

Each entry is the median over rounds in which all candidates take turns, with the quartiles below it. Before anything
is timed, every candidate's answer is compared with one in float64 by plain autograd; what was wrong says so, and the
largest other error stands under the table. Run it with `make bench`. A file of `bench/` answers one question; its
docstring has what was expected before the first run. Bold rows are ours.
"""

_IN_GRADIENTS = "In gradients, the median above its quartiles; less is better."

Result = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page: a result, its title, and the peer of the table of ratios."""

    name: str
    title: str
    versus: str = ""
    body: Callable[[Result, Section], list[str]] | None = None


def _products(result: Result, section: Section) -> list[str]:
    problems = result["problems"]
    lines = [_IN_GRADIENTS, "", *tables.table(problems, tables.in_gradients), ""]
    right = [r for p in problems for r in p["candidates"] if r.get("right") and "gradients" in r]
    if "tolerance" not in problems[0]:  # the answers are numbers without noise
        largest = max(record["relative_error"] for record in right)
        lines += [f"Largest relative error of what is right: {largest:.1g}, in float32.", ""]
    lines += [*tables.left_out(problems), *_notes(result)]
    lines += [f"In time relative to {section.versus} (below 1 is faster):", ""]
    return [*lines, *tables.table(problems, tables.against(section.versus)), ""]


def _trace(result: Result, section: Section) -> list[str]:
    problems = result["problems"]
    lines = _products(result, section)
    lines += ["Seconds to a standard error of 5% of the trace:", ""]
    lines += [*tables.table(problems, tables.fact("seconds_to_target")), ""]
    lines += [
        "What that takes: the trace, with the standard error of the reference, and its probes.",
        "",
        *tables.head([p["name"] for p in problems]),
    ]
    traces = [f"{p['trace']:.3g} ± {p['standard_error']:.1g}" for p in problems]
    rows = {
        "trace": traces,
        "standard deviation of one probe": [f"{p['one_probe']:.3g}" for p in problems],
        "probes to 5%": [f"{p['probes_to_target']:,}" for p in problems],
    }
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]


_FORMS = {
    "samples": "The forms of all samples, in gradients of the batch",
    "ggn": "The trace of a Gauss-Newton matrix, in gradients a probe",
    "tiny": "The trace of a tiny model's Hessian, in gradients a probe",
    "laplacian": "A Laplacian, in gradients in the points",
    "chunk": "The trace of a Hessian by the size of a chunk, in gradients a probe",
}
_GROWN = {
    "probes": "By the number of probes",
    "stack": "By width, depth and batch of an MLP",
    "gpt-": "By the length of a sequence",
}


def _kinds(result: Result) -> list[list[dict[str, Any]]]:
    """Return the problems of every kind of forms."""
    problems = result["problems"]
    return [[p for p in problems if p["name"].split()[0] == kind] for kind in _FORMS]


def _forms(result: Result, section: Section) -> list[str]:
    lines = [*_notes(result)]
    for title, some in zip(_FORMS.values(), _kinds(result), strict=True):
        rows = tables.table(some, tables.in_gradients)
        lines += [f"{title}; less is better:", "", *rows, "", *tables.left_out(some)]
    return lines


def _trace_growth(result: Result, section: Section) -> list[str]:
    lines = [*_notes(result)]
    for kind, title in _GROWN.items():
        some = [p for p in result["problems"] if kind in p["name"]]
        if some:
            rows = tables.table(some, tables.in_gradients)
            lines += [f"{title}, in gradients; less is better:", "", *rows, ""]
    some = [p for p in result["problems"] if p["name"].startswith("memory")]
    if some:
        rows = tables.table(some, tables.fact("peak_mib"), names=lambda record: True)
        lines += ["MiB, by the number of layers, 256 wide, 512 rows:", "", *rows, ""]
    return lines


def _compile(result: Result, section: Section) -> list[str]:
    problems = result["problems"]
    lines = _products(result, section)
    for title, key in (
        ("Seconds to compile:", "compile_seconds"),
        (
            "Seconds to make a second operator at other parameters and multiply:",
            "second_operator_seconds",
        ),
        ("Was anything compiled again for it?", "compiled_again"),
    ):
        with_it = tables.table(problems, tables.fact(key), names=lambda r, key=key: key in r)
        lines += [title, "", *with_it, ""]
    return lines


def _memory(result: Result, _: Section) -> list[str]:
    problems = result["problems"]
    rows = tables.table(problems, tables.in_mib, names=lambda record: True)
    lines = ["MiB at the peak; less is better.", "", *rows, ""]
    return [*lines, *tables.left_out(problems), *_notes(result)]


def _per_sample_curvature(result: Result, _: Section) -> list[str]:
    problems = result["problems"]
    models = list(dict.fromkeys(p["name"] for p in problems))
    tasks = list(dict.fromkeys(p["task"] for p in problems))
    by = {(p["name"], p["task"]): p for p in problems}
    lines = []
    for name in models:
        p = by[name, tasks[0]]
        ms = p["candidates"][0]["milliseconds"]["median"]
        text = f"{p['description']}; {p['parameters']:,} parameters; a gradient takes {ms:.3g} ms"
        lines.append(f"- **{name}**: {text}")
    lines += ["", "How many times as long loops take, of our operators and of plain PyTorch:", ""]
    lines += tables.head(models)
    for task in tasks:
        cells = [tables.loops(by[name, task]) for name in models]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    for task in tasks:
        some = [by[name, task] for name in models]
        lines += ["", f"`{task}`, in gradients of the batch; less is better:", ""]
        lines += tables.table(some, tables.in_gradients)
    lines += ["", *tables.left_out(problems)]
    right = [r for p in problems for r in p["candidates"] if r.get("right")]
    errors = max(r["relative_error"] for r in right), max(p["float64_error"] for p in problems)
    lines += [
        "Largest relative error of what is right: {:.1g}; of ours in float64: {:.1g}.".format(
            *errors
        ),
    ]
    return [*lines, "", *_notes(result)]


def _estimators(result: Result, _: Section) -> list[str]:
    problems = result["problems"]
    lines = ["| | eigenvalues | size | products |", "|---|---|---|---|"]
    for p in problems:
        counts = " · ".join(map(str, p["products"]))
        lines.append(f"| {p['name']} | {p['description']} | {p['parameters']} | {counts} |")

    def ours(record: dict[str, Any]) -> bool:
        return not record["peer"]

    def stated(record: dict[str, Any]) -> str:
        pairs = zip(record["standard_errors"], record["errors"], strict=True)
        return tables.in_pairs([f"{said / true:.2f}" for said, true in pairs])

    adaptive = "Products to {:.0%} (median); below, the share of runs as near, and of 95 % intervals that hold:"
    parts: list[tuple[str, list[str]]] = [
        (
            f"Relative error over {problems[0]['seeds']} seeds, with as many products as above:",
            tables.table(problems, tables.series("errors"), names=lambda r: True, several=True),
        ),
        (
            "Stated standard error over the error:",
            tables.table(problems, stated, names=ours, several=True),
        ),
        (
            "Share of 95 % intervals that hold the truth:",
            tables.table(problems, tables.series("coverage", ".0%"), names=ours, several=True),
        ),
        (
            "How the error falls: power of the number of products, or factor a product, and theory's:",
            tables.table(problems, tables.rate, names=ours),
        ),
        *(
            (adaptive.format(rtol), tables.table(problems, tables.to_tolerance(rtol), names=ours))
            for rtol in [a["rtol"] for a in problems[0]["candidates"][0]["adaptive"]]
        ),
    ]
    lines += ["", *(line for title, rows in parts for line in (title, "", *rows, ""))]
    return [*lines, *tables.left_out(problems), *_notes(result)]


def _choice(result: Result, _: Section) -> list[str]:
    problems = result["problems"]
    lines = [*_notes(result)]
    for name, p in {p["name"].partition(",")[0]: p for p in problems}.items():
        ms = p["candidates"][0]["milliseconds"]["median"]
        lines.append(f"- **{name}**: {p['parameters']:,} parameters; a gradient takes {ms:.3g} ms")
    for of in ("trace", "diagonal"):
        some = [p for p in problems if p["of"] == of]
        costs = tables.choices(some)
        rows = tables.table(some, tables.error_and_cost, names=lambda r: "method" in r)
        lines += ["", f"Gradients to a {of} with an error of 5 %, and of 1 % below:", "", *costs]
        lines += ["", f"Errors of the {of}, and below the gradients that it took:", "", *rows]
    return [*lines, ""]


def _growth(result: Result, _: Section) -> list[str]:
    lines = ["Fitted exponents:", "", *tables.exponents(result["axes"], "time"), ""]
    if any(axis["memory"] for axis in result["axes"]):
        lines += [*tables.exponents(result["axes"], "memory"), ""]
    return [*lines, *_notes(result)]


def _processes(result: Result, _: Section) -> list[str]:
    problems = result["problems"]
    p = problems[0]
    ones = ", ".join(
        f"{q['name']} {q['candidates'][0]['milliseconds']['median']:.3g}" for q in problems
    )
    lines = [f"{p['description']}, {p['parameters']:,} parameters, float32.", ""]
    lines += [f"Milliseconds of one process without a group: {ones}.", ""]
    lines += ["Time relative to it, by the number of processes; less is better:", ""]
    lines += [*tables.by_processes(problems, tables.to_one), ""]
    lines += ["Messages of a call, and the bytes that a process gives into them:", ""]
    lines += [*tables.by_processes(problems, tables.sent), ""]
    largest = max(r["relative_error"] for q in problems for r in q["candidates"])
    lines += [f"Largest relative error against one process: {largest:.1g}, in float32.", ""]
    return [*lines, *_notes(result)]


def _drop_in(result: Result, _: Section) -> list[str]:
    head = (
        "Milliseconds of a call, and how many times as fast ours is: the median over rounds in which both take\n"
        "turns. On the baseline MLP, and on a small one, 64-100-32-10, batch 32, with 10,062 parameters."
    )
    return [head, "", *tables.drop_in_rows(result["problems"]), "", *_notes(result)]


SECTIONS = (
    Section("single_product", "One exact Hessian-vector product", "torch-secorder exact_hvp"),
    Section("k_products", "Many products with one Hessian", "loop of torch-secorder exact_hvp"),
    Section("trace", "A trace by random probes", "torch-secorder hessian_trace", _trace),
    Section("forms", "Forms without products", body=_forms),
    Section("trace_growth", "Growth of a trace", body=_trace_growth),
    Section("per_sample", "A product for every sample", "loop of torch-secorder exact_hvp"),
    Section("per_sample_curvature", "Curvature of every sample", body=_per_sample_curvature),
    Section("ggn", "One Gauss-Newton product", "curvlinops GGN @ v, made before"),
    Section("memory", "Memory", body=_memory),
    Section("growth", "Growth", body=_growth),
    Section("data_growth", "Growth over data sets", body=_growth),
    Section("processes", "Several processes", body=_processes),
    Section("estimators", "Errors of the estimators", body=_estimators),
    Section("choice", "Which trace and which diagonal", body=_choice),
    Section("compile", "Compiled products", "torch-secorder exact_hvp", _compile),
    Section("drop_in", "The drop-in beside torch-secorder", body=_drop_in),
)


@dataclass(frozen=True)
class Line:
    """A line of the summary: one of ours beside one of another package, in a section."""

    section: str
    label: str
    ours: str
    peer: str
    key: str = "gradients"


SUMMARY = (
    Line("single_product", "a product", "hvp", "torch-secorder exact_hvp"),
    Line(
        "single_product",
        "a product, operator kept",
        "hessian_operator @ v, made before",
        "PyHessian-style, graph made before",
    ),
    Line(
        "k_products",
        "one of many products",
        "hessian_operator.mm(V)",
        "loop of torch-secorder exact_hvp",
    ),
    Line(
        "trace",
        "a probe of a trace",
        "hutchinson_trace, operator made before",
        "torch-secorder hessian_trace",
    ),
    Line(
        "per_sample",
        "a product for every sample",
        "vmap(hvp)",
        "loop of torch-secorder exact_hvp",
    ),
    Line("ggn", "a Gauss-Newton product", "ggnvp", "BackPACK ggn_vector_product"),
    Line(
        "ggn",
        "a Gauss-Newton product, operator kept",
        "ggn_operator @ v, made before",
        "curvlinops GGN @ v, made before",
    ),
    Line("memory", "memory of a product", "hvp", "torch-secorder exact_hvp", "peak_mib"),
)


_EVEN = 1.05
"""Ratios up to this one count as even."""


def _summary(found: dict[Section, Result]) -> list[str]:
    """Return what ours cost beside one other package, where others are faster, and what follows."""
    by_name = {section.name: (section, result) for section, result in found.items()}
    rows = [
        _summary_row(line, *by_name[line.section]) for line in SUMMARY if line.section in by_name
    ]
    faster = [row for section, result in found.items() for row in _faster(section, result)]
    lines = ["## In short", ""]
    if any(rows):
        lines += [
            "What ours takes in gradients (memory: in the memory of a gradient), the least and the most of all",
            "models. Beside it the ratio to another package's way, below 1 where ours takes less, and the models",
            f"on which it takes more. Up to {_EVEN} counts as even.",
            "",
            "| | ours | gradients | beside | ours / theirs | takes more on |",
            "|---|---|---:|---|---:|---|",
            *filter(None, rows),
            "",
        ]
    if faster:
        lines += [
            "Others that are right and faster than all of ours, and how many times:",
            "",
            "| | faster | times | on |",
            "|---|---|---:|---|",
            *faster,
            "",
        ]
    listed = [f"- {_link(section, section.title)}: {r['question']}" for section, r in found.items()]
    return [*lines, "The sections, and what each one asks:", "", *listed, ""]


def _summary_row(line: Line, section: Section, result: Result) -> str:
    costs, ratios = {}, {}
    for p in result["problems"]:
        ours, peer = tables.named(p, line.ours), tables.named(p, line.peer)
        if ours and peer and line.key in ours and line.key in peer:
            unit = p["candidates"][0]
            costs[p["name"]] = _middle(ours, line.key) / _middle(unit, line.key)
            ratios[p["name"]] = _over(ours, peer, line.key)
    if not ratios:
        return ""
    more = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if round(ratio, 2) > _EVEN]
    cells = [
        _link(section, line.label),
        f"`{line.ours.partition(', ')[0]}`",
        tables.extent(costs),
        line.peer.partition(", ")[0],
        tables.extent(ratios),
        ", ".join(more) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def _middle(record: dict[str, Any], key: str) -> float:
    value = record[key]
    return float(value["median"] if isinstance(value, dict) else value)


def _over(ours: dict[str, Any], peer: dict[str, Any], key: str) -> float:
    """Return the ratio that was measured in turns, or that of the numbers."""
    if key == "gradients" and peer["name"] in ours.get("relative_to_peers", {}):
        return float(ours["relative_to_peers"][peer["name"]])
    return _middle(ours, key) / _middle(peer, key)


def _faster(section: Section, result: Result) -> list[str]:
    """Return a row for everybody who is faster than all of ours somewhere."""
    if not section.versus and section.name != "per_sample_curvature":
        return []
    times: dict[str, dict[str, float]] = {}
    for p in result["problems"]:
        right = [r for r in p["candidates"] if r.get("right") and "gradients" in r]
        best = min((_middle(r, "gradients") for r in right if not r["peer"]), default=0.0)
        on = f"{p['task']} {p['name']}" if "task" in p else p["name"]
        for r in right:
            fold = best / _middle(r, "gradients")
            if r["peer"] and round(fold, 2) > _EVEN:
                times.setdefault(r["name"], {})[on] = fold
    start = _link(section, section.title)
    return [
        f"| {start} | {name} | {tables.span(on.values())} | {', '.join(on)} |"
        for name, on in times.items()
    ]


def _link(section: Section, text: str) -> str:
    return f"[{text}](#{section.title.lower().replace(' ', '-')})"


def write_page(results: Path = RESULTS, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Write the page and the figures of all results that are there."""
    found = {
        section: json.loads((results / f"{section.name}.json").read_text())
        for section in SECTIONS
        if (results / f"{section.name}.json").exists()
    }
    parts = [_HEAD, "\n".join(_summary(found)), _METHOD, _problems(list(found.values()))]
    for section, result in found.items():
        figure = images / f"{section.name}.svg"
        _draw(section, result, figure)
        alt = f"Figure: {result['question']} The numbers are in the tables."
        lines = [f"## {section.title}", "", result["question"], ""]
        lines += [f"![{alt}]({relpath(figure, page.parent)})", ""]
        parts.append("\n".join(lines + (section.body or _products)(result, section)))
    page.write_text("\n".join([*parts, _machine({s.name: r["machine"] for s, r in found.items()})]))


def _draw(section: Section, result: Result, path: Path) -> None:
    problems = result["problems"]
    if section.name == "trace_growth":
        timed = [p for p in problems if "gradients" in p["candidates"][-1]]
        plots.bars(timed, path, key="gradients", label="gradients; less is better")
    elif section.name == "forms":
        plots.kinds(_kinds(result), path, key="gradients", label="gradients; less is better")
    elif section.name == "estimators":
        plots.decays(problems, path)
    elif section.name == "choice":
        plots.costs(problems, path)
    elif section.name == "per_sample_curvature":
        rows = [(f"{p['task']}, {p['name']}", p["fold"]) for p in problems]
        plots.speedups(rows, path, label="times as fast as the faster loop over samples")
    elif section.name in ("growth", "data_growth"):
        plots.lines(result["axes"], path)
    elif section.name == "processes":
        plots.by_processes(problems, path, label="time relative to one process")
    elif section.name == "drop_in":
        rows = [(f"{p['name']}, {p['problem']}", tables.speed(p)) for p in problems]
        plots.speedups(rows, path, label="times as fast as torch-secorder")
    elif section.name == "memory":
        plots.bars(problems, path, key="peak_mib", label="MiB at the peak")
    else:
        plots.bars(problems, path, key="gradients", label="gradients; less is better")


def _notes(result: Result) -> list[str]:
    return [line for note in result["notes"] for line in (note, "")]


def _problems(results: list[Result]) -> str:
    """Return the list of all models that have a name of their own, and the time of a gradient."""
    described: dict[str, str] = {}
    times: dict[str, float] = {}
    for result in results:
        for p in result["problems"]:
            if {"axis", "problem", "samples", "seeds"} & p.keys():
                continue
            described.setdefault(p["name"], f"{p['description']}; {p['parameters']:,} parameters")
            if "milliseconds" in p["candidates"][0]:
                times.setdefault(p["name"], p["candidates"][0]["milliseconds"]["median"])
    lines = [f"- **{name}**: {text}" for name, text in described.items()]
    shown = ", ".join(f"{name} {time:.3g}" for name, time in times.items())
    return "\n".join([*lines, "", f"A gradient in milliseconds: {shown}.", ""])


def _machine(machines: dict[str, dict[str, Any]]) -> str:
    machine = next(iter(machines.values()))
    others = [name for name, other in machines.items() if other != machine]
    if others:
        raise ValueError(
            f"{', '.join(others)}: of another machine or other versions than the rest; run make bench"
        )
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        "## Machine and versions\n\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads for torch, "
        f"{machine['system']}.\n\n{versions}.\n"
    )


if __name__ == "__main__":
    write_page()
    write_blocks()
