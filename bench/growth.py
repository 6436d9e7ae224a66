"""How do time and peak memory grow with parameters, samples, depth and vectors?

Command: `python -m bench growth` (`--quick` only sees that it runs).

MLPs of equal layers; an exponent is the slope of a least-squares line through the logarithms, over all points, so
that it is that of the range and not of the limit.

Expected story, written before the first run of this file. Time is linear in what there is to do and overhead flattens
the small end: 0.8 to 0.9 in the parameters for a gradient and a double backward, 0.6 to 0.7 for `hvp`, whose overhead
is larger, 0.9 for an operator; in the samples 0.7 to 0.8; in the depth 1.0 for all, because overhead is a layer's as
well. Memory of every reverse mode is linear in the depth, 0.9 to 1.0, and in the parameters with little in the batch,
0.9. In the samples 0.6 to 0.8, because the parameters stay. Many vectors: time of `mm` 0.7 to 0.9 in their number, of
a loop 1.0; memory with a budget flat above the result, which is linear: 0.5 to 0.9 for `mm` and 0 to 0.1 for a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import k_products, memory, oracles, peers, products, trace
from bench.harness import Candidate, compare, described, gradient, leaves, relative_error
from bench.problems import Problem, problem
from bench.products import looped, single

QUESTION = "How do time and peak memory grow with parameters, samples, depth and vectors?"
NOTES = (
    "An exponent is the slope of a least-squares line through the logarithms, over the range that is shown.",
)
_SINGLE = {
    "hvp": single("hvp", products.transform()),
    "operator": single("hessian_operator @ v", products.operator),
    "torch-secorder": single("torch-secorder exact_hvp", peers.torch_secorder_hvp, peer=True),
}


@dataclass(frozen=True)
class Axis:
    """What grows: problem names and vectors a call along it, and the number that a problem has of it."""

    name: str
    points: tuple[tuple[str, int], ...]
    number: Callable[[Problem, int], int]
    keys: tuple[str, ...]

    @property
    def many(self) -> bool:
        return self.name == "vectors"


_KEYS = ("gradient", *_SINGLE)
AXES = (
    Axis(
        "parameters",
        tuple((f"stack-{width}-3-64", 1) for width in (64, 128, 256, 512, 1024)),
        lambda p, _: p.num_parameters,
        _KEYS,
    ),
    Axis(
        "samples",
        tuple((f"stack-128-3-{batch}", 1) for batch in (32, 128, 512, 2048, 8192)),
        lambda p, _: p.inputs.shape[0],
        _KEYS,
    ),
    Axis(
        "depth",
        tuple((f"stack-64-{depth}-128", 1) for depth in (4, 8, 16, 32, 64)),
        lambda p, _: sum(isinstance(m, torch.nn.Tanh) for m in p.model.modules()),
        _KEYS,
    ),
    Axis(
        "vectors",
        tuple(("stack-256-3-64", count) for count in (2, 8, 32, 128, 512)),
        lambda _, count: count,
        ("several", "trace", "several-torch-secorder"),
    ),
)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return the slope of the line through the logarithms; None where something is not positive."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > 0]
    if len(pairs) < len(xs):
        return None
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return round(float(above / sum((x - mean_x) ** 2 for x, _ in pairs)), 2)


def _check(p: Problem, count: int) -> Callable[[Any], float]:
    truth = oracles.hessian(p)
    if count == 1:
        return lambda result: relative_error(result, truth)
    products_check, trace_check = k_products.check_of(p, count), memory.trace_check(p, count)

    def check(result: list[Tensor]) -> float:
        return trace_check(result) if len(leaves(result)) == 1 else products_check(result)

    return check


def _candidates(count: int) -> list[Candidate]:
    if count == 1:
        return list(_SINGLE.values())
    loop = "loop of torch-secorder exact_hvp"
    return [
        k_products.several("hessian_operator.mm(V)", count),
        trace.ours("hutchinson_trace", count),
        looped(loop, peers.torch_secorder_hvp, count, peer=True),
    ]


def _timed(axis: Axis, points: Sequence[tuple[str, int]], seconds: float) -> list[dict[str, Any]]:
    found = []
    for name, count in points:
        p = problem(name)
        check, candidates = _check(p, count if axis.many else 1), _candidates(count)
        records = compare(p, gradient(p), candidates, check, tolerance=1e-4, seconds=seconds)
        entry = described(p, records, axis=axis.name, number=axis.number(p, count))
        found.append(entry | {"name": f"{axis.name} {entry['number']}"})
    return found


def _lines(axis: Axis, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the time of every candidate along an axis."""
    xs = [entry["number"] for entry in entries]
    lines = []
    for i, record in enumerate(entries[0]["candidates"]):
        if axis.many and record["name"] == "gradient":
            continue
        of = [entry["candidates"][i] for entry in entries]
        if any("milliseconds" not in r for r in of):
            continue
        ys = [r["milliseconds"]["median"] for r in of]
        line = {"name": record["name"], "peer": record["peer"], "x": xs, "y": ys}
        lines.append(line | {"exponent": exponent(xs, ys)})
    return lines


def _memory(axis: Axis, points: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return the peak of every method along an axis, a process a point."""
    xs = [axis.number(problem(name), count) for name, count in points]
    lines = []
    for key in axis.keys:
        records = [memory.measured(key, name, count) for name, count in points]
        if any("peak_mib" not in r for r in records):
            continue
        ys = [r["peak_mib"] for r in records]
        name = memory.METHODS[key].candidate.name if key in memory.METHODS else _many_name(key)
        line = {"name": name, "peer": records[0]["peer"], "x": xs, "y": ys}
        lines.append(line | {"exponent": exponent(xs, ys)})
    return lines


def _many_name(key: str) -> str:
    return {
        "several": "hessian_operator.mm(V), budget 64 MiB",
        "trace": "hutchinson_trace, budget 64 MiB",
        "several-torch-secorder": "loop of torch-secorder exact_hvp",
    }[key]


def measure(*, quick: bool) -> dict[str, Any]:
    """Return time and memory along every axis, with exponents; `problems` has the records of all points."""
    torch.manual_seed(0)
    problems, axes = [], []
    for axis in AXES:
        points = axis.points[:2] if quick else axis.points
        entries = _timed(axis, points, 0.2 if quick else 1.5)
        problems += entries
        measured = (
            []
            if quick and axis.name != "depth"
            else _memory(axis, points if quick else points[::2])
        )
        axes.append({"name": axis.name, "time": _lines(axis, entries), "memory": measured})
    return {"question": QUESTION, "notes": NOTES, "axes": axes, "problems": problems}
