"""A report from the command line, `python -m secorder_func report`, and from Python, `write_report`."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from secorder_func import interruptible, progress, running
from secorder_func.errors import ArgumentError
from secorder_func.report import INTERRUPTED, demo, user
from secorder_func.report.example import digits_subject
from secorder_func.report.finding import Settings
from secorder_func.report.folders import make_folder
from secorder_func.report.measure import begun, measure_parts
from secorder_func.report.outcome import Report
from secorder_func.report.page import write
from secorder_func.report.parts import PARTS
from secorder_func.report.progress import Stages, make_console
from secorder_func.report.subject import Subject
from secorder_func.report.tables import listed_table, number_table

__all__ = ["FULL", "QUICK", "report_of", "run_report", "settings_of"]

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
    settings = settings_of(quick, num_probes, num_eigenvalues)
    make_folder(output, "report", "--output")
    folder = output.absolute()  # the user's function may change the current one
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
            report = _begun(subject, settings, seed, stages)
            console.print(f"  {report.headline}")
            paths = _finished(report, subject, folder, settings, seed, stages)
    except user.TargetError as error:
        print(f"report {problem}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if report is None or not paths:
            print("Interrupted; nothing was written.", file=sys.stderr)
            return INTERRUPTED
        interrupted = True
    except OSError as error:
        if report is None:
            raise
        _print(console, report)
        print(f"report: it could not be written: {error}", file=sys.stderr)
        return 2
    _print(console, report)
    for path in paths:
        console.print(f"Written: {output / path.name}", soft_wrap=True)
    if interrupted or report.interrupted:
        return INTERRUPTED
    return 1 if report.titles("failed") else 0


def report_of(
    given: tuple[Any, ...],
    folder: Path,
    *,
    title: str,
    seed: int,
    settings: Settings,
) -> Path:
    """Write the report of a problem that is at hand, without printing; return where its page is.

    Raises
    ------
    ArgumentError
        What is given is no loss with parameters and data.
    KeyboardInterrupt
        After Ctrl-C, when the partial report is written.
    """
    make_folder(folder, "write_report", "folder=")
    folder = folder.absolute()
    stages = Stages(Console(quiet=True))
    try:
        with interruptible(), progress():
            subject = user.subject_of(given, title)
            report = _begun(subject, settings, seed, stages)
            page, _ = _finished(report, subject, folder, settings, seed, stages)
    except user.TargetError as error:
        raise ArgumentError(f"write_report: {' '.join(str(error).split())}") from error
    if report.interrupted:
        raise KeyboardInterrupt
    for outcome in report.outcomes:
        if outcome.status == "failed":
            text = f"write_report: {outcome.part.title.lower()} failed. {outcome.reason}"
            warnings.warn(text, stacklevel=3)
    return page


def settings_of(quick: bool, num_probes: int | None, num_eigenvalues: int | None) -> Settings:
    """Return the full or the quick settings, with other counts where they are given."""
    settings = QUICK if quick else FULL
    return replace(
        settings,
        num_probes=num_probes or settings.num_probes,
        num_eigenvalues=num_eigenvalues or settings.num_eigenvalues,
    )


def _begun(subject: Subject, settings: Settings, seed: int, stages: Stages) -> Report:
    with stages.stage("read the data", bar=False):
        return begun(subject, PARTS, settings, seed)


def _finished(
    report: Report, subject: Subject, folder: Path, settings: Settings, seed: int, stages: Stages
) -> tuple[Path, Path]:
    measure_parts(report, subject, settings, seed, stages)
    report.seconds = stages.seconds
    return write(report, folder)


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
