"""`python -m bench [QUESTION ...] [--quick] [--threads N]`."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine, write
from bench.report import write_page

HERE = Path(__file__).parent
QUESTIONS = ("single_product", "drop_in")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"one of {QUESTIONS}")
    parser.add_argument(
        "--quick", action="store_true", help="only see that it runs; results go to bench/scratch"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(
            f"unknown question {', '.join(sorted(unknown))}; known: {', '.join(QUESTIONS)}"
        )

    torch.set_num_threads(options.threads)
    folder = HERE / ("scratch" if options.quick else "results")
    for name in options.questions or QUESTIONS:
        answer = import_module(f"bench.{name}").measure(quick=options.quick)
        result = {**answer, "machine": machine()}
        write(folder / f"{name}.json", result)
        show(result)
    if not options.quick:
        write_page()


def show(result: dict[str, Any]) -> None:
    """Print the ratios to one gradient."""
    print(result["question"])
    print(json.dumps(result["machine"]))
    for problem in result["problems"]:
        print(f"\n{problem['description']}, {problem['parameters']} parameters")
        for record in problem["candidates"]:
            if "left_out" in record:
                print(f"  {record['name']:40} left out: {record['left_out']}")
                continue
            ratio, ms = record["gradients"], record["milliseconds"]
            print(
                f"  {record['name']:40} {ratio['median']:6.2f} gradients "
                f"({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}) "
                f"{ms['median']:8.2f} ms{'' if record.get('right', True) else '   WRONG'}"
            )


if __name__ == "__main__":
    main()
