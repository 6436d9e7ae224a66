"""`python -m bench [QUESTION ...] [--quick] [--threads N]`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.blocks import write_blocks
from bench.harness import machine, write
from bench.report import IMAGES, PAGE, RESULTS, write_page

SCRATCH = Path(__file__).parent / "scratch"
QUESTIONS = (
    "single_product",
    "k_products",
    "trace",
    "forms",
    "trace_growth",
    "per_sample",
    "per_sample_curvature",
    "ggn",
    "estimators",
    "choice",
    "memory",
    "growth",
    "data_growth",
    "processes",
    "compile",
    "drop_in",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"one of {QUESTIONS}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only see that it runs; everything goes to bench/scratch",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(
            f"unknown question {', '.join(sorted(unknown))}; known: {', '.join(QUESTIONS)}"
        )

    _limit(options.threads)
    results = SCRATCH if options.quick else RESULTS
    if options.quick:  # results of another day may be of other versions
        shutil.rmtree(SCRATCH, ignore_errors=True)
    begin = time.perf_counter()
    for name in options.questions or QUESTIONS:
        started = time.perf_counter()
        answer = import_module(f"bench.{name}").measure(quick=options.quick)
        result = {**answer, "machine": machine()}
        write(results / f"{name}.json", result)
        show(result)
        now = time.perf_counter()
        print(f"\n{name}: {now - started:.0f} s, {now - begin:.0f} s in all\n", flush=True)
    if options.quick:
        write_page(SCRATCH, SCRATCH / "performance.md", SCRATCH / "images")
    else:
        write_page(RESULTS, PAGE, IMAGES)
        write_blocks()


def _limit(threads: int) -> None:
    """Give torch so many threads, and the process so many processors, which every package obeys."""
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])


def show(result: dict[str, Any]) -> None:
    """Print every record."""
    print(result["question"])
    print(json.dumps(result["machine"]))
    for problem in result["problems"]:
        print(f"\n{problem['description']}, {problem['parameters']} parameters")
        for record in problem["candidates"]:
            print(f"  {record['name']:44} {_figures(record)}")


def _figures(record: dict[str, Any]) -> str:
    if "left_out" in record:
        return f"left out: {record['left_out']}"
    wrong = "" if record.get("right", True) else "   WRONG"
    if "errors" in record:
        return "errors " + " ".join(f"{error:8.2g}" for error in record["errors"])
    if "peak_mib" in record:
        inside = {None: "", True: ", inside", False: ", OUTSIDE"}[record.get("inside_budget")]
        budget = f" (adds {record['added_mib']:.1f}{inside})" if inside else ""
        return f"{record['peak_mib']:8.1f} MiB{budget}{wrong}"
    if "to_one" in record:
        ratio, ms = record["to_one"]["median"], record["milliseconds"]["median"]
        sent = f"{record['calls']:3} messages {record['bytes']:10,} bytes"
        return f"{ratio:6.2f} of one {ms:8.2f} ms {sent}, error {record['relative_error']:.1g}"
    ratio, ms = record["gradients"], record["milliseconds"]
    spread = f"({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
    return f"{ratio['median']:8.2f} gradients {spread} {ms['median']:8.2f} ms{wrong}"


if __name__ == "__main__":
    main()
