"""`python -m secorder_func report`: measure, print, write."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from secorder_func import interruptible, progress, running
from secorder_func.report import INTERRUPTED, demo, user
from secorder_func.report.example import digits_subject
from secorder_func.report.finding import Settings
from secorder_func.report.measure import begun, measure_parts
from secorder_func.report.outcome import Report
from secorder_func.report.page import write
from secorder_func.report.parts import PARTS
from secorder_func.report.progress import Stages, make_console
from secorder_func.report.subject import Subject
from secorder_func.report.tables import listed_table, number_table

__all__ = ["FULL", "QUICK", "run_report"]

FULL = Settings(
    num_probes=64,
    num_eigenvalues=5,
    num_vectors=8,
    num_steps=48,
    num_sample_probes=64,
    num_samples=1024,
    num_shown=6,
    num_points=25,
)
QUICK = Settings(
    num_probes=16,
    num_eigenvalues=3,
    num_vectors=4,
    num_steps=24,
    num_sample_probes=16,
    num_samples=128,
    num_shown=4,
    num_points=11,
)


def run_report(
    output: Path,
    *,
    problem: str | None = None,
    seed: int = 0,
    quick: bool = False,
    num_probes: int | None = None,
    num_eigenvalues: int | None = None,
) -> int:
    """Report on a user's problem or the digits; return 0, 1 if a part failed, 2 if it cannot run, 130 after Ctrl-C."""
    settings = QUICK if quick else FULL
    settings = replace(
        settings,
        num_probes=num_probes or settings.num_probes,
        num_eigenvalues=num_eigenvalues or settings.num_eigenvalues,
    )
    output.mkdir(parents=True, exist_ok=True)
    console = make_console()
    stages = Stages(console)
    report: Report | None = None
    paths: tuple[Path, ...] = ()
    interrupted = False
    try:
        with ExitStack() as stack:
            if (
                problem is not None
            ):  # not yet interruptible: an import may take long and never looks
                subject = stack.enter_context(user.load(problem, seed=seed))
            stack.enter_context(interruptible())
            stack.enter_context(progress())
            if problem is None:
                subject = _digits(quick, seed, stages)
            with stages.stage("read the data", bar=False):
                report = begun(subject, PARTS, settings, seed)
            console.print(f"  {report.headline}")
            measure_parts(report, subject, settings, seed, stages)
            report.seconds = stages.seconds
            paths = write(report, output)
    except user.TargetError as error:
        print(f"report {problem}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if report is None or not paths:
            print("Interrupted; nothing was written.", file=sys.stderr)
            return INTERRUPTED
        interrupted = True
    _print(console, report)
    for path in paths:
        console.print(f"Written: {path}", soft_wrap=True)
    if interrupted or report.interrupted:
        return INTERRUPTED
    return 1 if report.titles("failed") else 0


def _digits(quick: bool, seed: int, stages: Stages) -> Subject:
    chosen = demo.QUICK if quick else demo.FULL
    with stages.stage(f"train, {chosen.num_steps} steps of Adam", chosen.num_steps) as advance:

        def counted(steps: int) -> None:
            advance(steps)
            running.look()

        return digits_subject(chosen, seed=seed, advance=counted)


def _print(console: Console, report: Report) -> None:
    console.print(f"\nCurvature of {report.title}: {report.headline}.\n")
    if report.key_numbers:
        console.print(number_table(report.key_numbers))
    for outcome in report.outcomes:
        for table in outcome.finding.tables if outcome.finding else ():
            console.print()
            console.print(listed_table(table))
    console.print()
    for outcome in report.outcomes:
        if outcome.status == "failed":
            console.print(f"{outcome.part.title}: failed. {' '.join(outcome.reason.split())}")
        elif outcome.status == "not applicable":
            console.print(f"{outcome.part.title}: does not apply, {outcome.reason}.")
        for note in outcome.notes:
            console.print(f"{outcome.part.title}: {note}")
    for said in report.shortcomings:
        console.print(said, style="bold red")
