"""Measuring the parts of a report, one after the other."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from secorder_func import __version__, running
from secorder_func.report.finding import Finding, NotApplicable, Part, Settings
from secorder_func.report.outcome import Outcome, Report
from secorder_func.report.parts.scalars import LOSS
from secorder_func.report.progress import Stages
from secorder_func.report.subject import Subject
from secorder_func.report.svg import svg_of
from secorder_func.seeds import draw_seed
from secorder_func.verify.target import TargetError, quoted

__all__ = ["begun", "measure_parts"]


def begun(subject: Subject, parts: Sequence[Part], settings: Settings, seed: int) -> Report:
    """Return a report all of whose parts are missing."""
    return Report(
        title=subject.title,
        headline=subject.headline(),
        settings={"seed": seed, **asdict(settings), "threads": torch.get_num_threads()},
        versions={
            "secorder_func": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "matplotlib": mpl.__version__,
            "Python": platform.python_version(),
        },
        problem={
            "num_parameters": subject.num_params,
            "num_samples": subject.num_samples,
            "num_batches": len(subject.sizes),
            "dtype": subject.dtype,
            "device": str(subject.device),
        },
        outcomes=[Outcome(part) for part in parts],
    )


def measure_parts(
    report: Report, subject: Subject, settings: Settings, seed: int, stages: Stages
) -> None:
    """Measure and draw every part; stop where Ctrl-C is heard, with the others missing.

    To be called inside of `interruptible()`.

    Raises
    ------
    TargetError
        The loss of all the data cannot be had: then nothing can.
    """
    root = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {}
    for number, outcome in enumerate(report.outcomes, 1):
        generator = torch.Generator().manual_seed(draw_seed(root))
        try:
            running.look()
            title = f"{number} of {len(report.outcomes)}: {outcome.part.title.lower()}"
            with stages.stage(title, bar=False):
                _measure(outcome, subject, settings, generator, shared)
            if outcome.part is LOSS and outcome.status == "failed":
                raise TargetError(f"the loss of the data cannot be had. {outcome.reason}")
            running.look()
        except KeyboardInterrupt:
            report.interrupted = True
            if outcome.status == "done":
                outcome.status = "partial"
            return


def _measure(
    outcome: Outcome,
    subject: Subject,
    settings: Settings,
    generator: torch.Generator,
    shared: dict[str, Any],
) -> None:
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            finding = outcome.part.measure(subject, settings, generator, shared)
            outcome.svgs = _drawn(outcome.part, finding)
            outcome.finding, outcome.status = finding, "done"
        except NotApplicable as error:
            outcome.status, outcome.reason = "not applicable", str(error)
        except Exception as error:  # whatever a user's loss does: the other parts go on
            outcome.status, outcome.reason = "failed", quoted(error)
        finally:
            outcome.seconds = time.perf_counter() - begin
    outcome.notes = list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))


def _drawn(part: Part, finding: Finding) -> dict[str, str]:
    return {name: svg_of(draw, f"{part.name}: {name}") for name, draw in finding.figures.items()}
