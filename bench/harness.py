"""How everything here is measured.

Candidates are made, checked against an independent answer, warmed up, and then timed interleaved in one
process (A B C, B C A, ...), so that whatever else the machine does meets all of them. The unit is one plain
gradient of the same loss. A ratio is the median over the rounds of the ratio within a round, with its quartiles.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Candidate", "UnavailableError", "compare", "machine", "relative_error", "write"]

Run = Callable[[], Any]

_PACKAGES = (
    "secorder-func",
    "torch",
    "torch-secorder",
    "curvlinops-for-pytorch",
)


class UnavailableError(Exception):
    """A candidate cannot take part here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute one thing.

    Parameters
    ----------
    name
        As the table shows it.
    make
        Problem -> the call to be timed. What it does before it returns is not timed.
    peer
        Whether it is another package or what a user would write without one.
    """

    name: str
    make: Callable[[Any], Run]
    peer: bool = False


def compare(
    problem: Any,
    unit: Run,
    candidates: Sequence[Candidate],
    check: Callable[[Any], float],
    *,
    tolerance: float,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measure `candidates` beside `unit` for about `seconds`; return one record for each, the unit's first.

    `check` maps what a candidate returns to its relative error. One of ours above `tolerance` stops everything; a
    peer's is recorded as not right, and timed all the same.
    """
    runs: dict[str, Run] = {"gradient": unit}
    records: dict[str, dict[str, Any]] = {"gradient": {"name": "gradient", "peer": False}}
    for candidate in candidates:
        records[candidate.name] = {"name": candidate.name, "peer": candidate.peer}
        try:
            run = candidate.make(problem)
            error = check(run())
        except UnavailableError as reason:
            records[candidate.name]["left_out"] = str(reason)
            continue
        right = error <= tolerance
        if not right and not candidate.peer:
            raise AssertionError(f"{candidate.name} on {problem.name}: relative error {error:.2g}")
        records[candidate.name] |= {"relative_error": float(f"{error:.2g}"), "right": right}
        runs[candidate.name] = run

    times = _interleaved(runs, seconds)
    for name, measured in times.items():
        ratios = [t / g for t, g in zip(measured, times["gradient"], strict=True)]
        records[name]["milliseconds"] = _summary([1e3 * t for t in measured])
        records[name]["gradients"] = _summary(ratios)
    for name in times:
        records[name]["relative_to_peers"] = {
            peer: _rounded(
                statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))
            )
            for peer in times
            if records[peer]["peer"] and peer != name
        }
    return list(records.values())


def _interleaved(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    for run in runs.values():
        warm = time.perf_counter() + 0.5
        run()
        while time.perf_counter() < warm:
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["gradient"]) < 3:
        turn = len(times["gradient"]) % len(order)
        for name in order[turn:] + order[:turn]:  # whoever follows the gradient finds cold caches
            run = runs[name]
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _summary(values: list[float]) -> dict[str, float]:
    lower, middle, upper = statistics.quantiles(values, n=4)
    return {
        "median": round(middle, 4),
        "lower_quartile": round(lower, 4),
        "upper_quartile": round(upper, 4),
        "rounds": len(values),
    }


def relative_error(result: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return `|result - truth| / |truth|` over all leaves together."""
    pairs = list(zip(result, truth, strict=True))
    difference = sum(float((a.detach().double() - b.detach()).square().sum()) for a, b in pairs)
    return float((difference / sum(float(b.detach().square().sum()) for _, b in pairs)) ** 0.5)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, threads, versions; no names."""
    installed = ((package, _version(package)) for package in _PACKAGES)
    versions = {"python": platform.python_version()}
    versions |= {package: number for package, number in installed if number}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def write(path: Path, result: dict[str, Any]) -> None:
    """Store a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
