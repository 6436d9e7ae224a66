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

__all__ = [
    "Candidate",
    "Made",
    "Run",
    "UnavailableError",
    "compare",
    "described",
    "gradient",
    "leaves",
    "machine",
    "relative_error",
    "rounded",
    "summary",
    "write",
]

Run = Callable[[], Any]

_PACKAGES = (
    "secorder-func",
    "torch",
    "torch-secorder",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "jax",
)
_WARM = 0.5


class UnavailableError(Exception):
    """A candidate cannot take part here; the message says why."""


@dataclass(frozen=True)
class Made:
    """A call to be timed, and what is known of it after it ran: entries of the record."""

    run: Run
    facts: Callable[[], dict[str, Any]] = dict


def leaves(result: Any) -> list[Tensor]:
    """Return the tensors of nested dicts, lists and arrays, in order."""
    if isinstance(result, dict):
        result = list(result.values())
    if not isinstance(result, (list, tuple)):
        return [torch.as_tensor(result)]
    return [leaf for item in result for leaf in leaves(item)]


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
    read
        What the call returns -> what the check expects.
    times
        How many such calls the whole would take, where a part of it is timed.
    """

    name: str
    make: Callable[[Any], Run | Made]
    peer: bool = False
    read: Callable[[Any], Any] = leaves
    times: int = 1


def compare(
    problem: Any,
    unit: Run,
    candidates: Sequence[Candidate],
    check: Callable[[Any], float],
    *,
    tolerance: float,
    seconds: float,
    per: int = 1,
    beside: str | None = None,
) -> list[dict[str, Any]]:
    """Measure `candidates` beside `unit` for about `seconds`; return one record for each, the unit's first.

    `check` maps what a candidate returns to its relative error. One of ours above `tolerance` stops everything, as
    does one that raises; a peer's is recorded as not right, and timed all the same, or as left out with its error.
    A call counts as `per` things: times are those of one. Ratios are to every peer, and to the one `beside`.
    """
    runs: dict[str, Run] = {"gradient": unit}
    once = {"gradient": 0.0}
    records: dict[str, dict[str, Any]] = {"gradient": {"name": "gradient", "peer": False}}
    for candidate in candidates:
        records[candidate.name] = {"name": candidate.name, "peer": candidate.peer}
        try:
            made = candidate.make(problem)
            run = made.run if isinstance(made, Made) else made
            begin = time.perf_counter()
            result = run()
            first = time.perf_counter() - begin
            error = check(candidate.read(result))
            del result
        except UnavailableError as reason:
            records[candidate.name]["left_out"] = str(reason)
            continue
        except Exception as reason:
            if not candidate.peer:
                raise
            line = next(iter(str(reason).strip().splitlines()), "")
            records[candidate.name]["left_out"] = f"{type(reason).__name__}: {line[:120]}"
            continue
        right = error <= tolerance
        if not right and not candidate.peer:
            raise AssertionError(f"{candidate.name} on {problem.name}: relative error {error:.2g}")
        records[candidate.name] |= {"relative_error": float(f"{error:.2g}"), "right": right}
        records[candidate.name] |= made.facts() if isinstance(made, Made) else {}
        runs[candidate.name] = run
        once[candidate.name] = first

    times = _interleaved(runs, once, seconds)
    shares = {candidate.name: candidate.times / per for candidate in candidates}
    for name, measured in times.items():
        times[name] = [t * shares.get(name, 1) for t in measured]
    for name, measured in times.items():
        ratios = [t / g for t, g in zip(measured, times["gradient"], strict=True)]
        records[name]["milliseconds"] = summary([1e3 * t for t in measured])
        records[name]["gradients"] = summary(ratios)
    for name in times:
        records[name]["relative_to_peers"] = {
            peer: rounded(
                statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))
            )
            for peer in times
            if (records[peer]["peer"] or peer == beside) and peer != name
        }
    return list(records.values())


def _interleaved(
    runs: dict[str, Run], once: dict[str, float], seconds: float
) -> dict[str, list[float]]:
    """Return one time a round for each: of one call, or the mean of some where a call is short beside the slowest.

    `once` is the time of the call that was checked: where that was long, it was the warm-up.
    """
    warm = min(_WARM, seconds / 4)
    once = {
        name: _warmed_up(run, warm) if once[name] < warm else once[name]
        for name, run in runs.items()
    }
    slowest = max(once.values())
    calls = {name: max(1, min(16, round(0.1 * slowest / t))) for name, t in once.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["gradient"]) < 3:
        turn = len(times["gradient"]) % len(order)
        for name in order[turn:] + order[:turn]:  # whoever follows the gradient finds cold caches
            times[name].append(_timed(runs[name], calls[name]))
    return times


def _warmed_up(run: Run, seconds: float) -> float:
    """Call it for so long, at least once; return the time of the last call."""
    begin = time.perf_counter()
    last = _timed(run, 1)
    while time.perf_counter() - begin < seconds:
        last = _timed(run, 1)
    return last


def _timed(run: Run, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def rounded(value: float) -> float:
    """Return it with four digits."""
    return float(f"{value:.4g}")


def summary(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, middle, upper = statistics.quantiles(values, n=4)
    return {
        "median": rounded(middle),
        "lower_quartile": rounded(lower),
        "upper_quartile": rounded(upper),
        "rounds": len(values),
    }


def relative_error(result: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return `|result - truth| / |truth|` over all leaves together."""
    sizes = [[t.numel() for t in tensors] for tensors in (result, truth)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"expected leaves of {sizes[1]} entries, got {sizes[0]}")
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


def gradient(problem: Any) -> Run:
    """Return the unit: one plain gradient of the problem's loss."""
    return lambda: torch.autograd.grad(problem.closure(), problem.parameters)


def described(problem: Any, records: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Return the entry of a problem in a result."""
    return {
        "name": problem.name,
        "description": problem.description,
        "parameters": problem.num_parameters,
        **facts,
        "candidates": records,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Store a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)
