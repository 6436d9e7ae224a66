"""The files of a report: HTML and JSON, each whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import jinja2
from markupsafe import Markup

from secorder_func.report.outcome import Report

__all__ = ["html_of", "write"]

_LABELS = {
    "num_probes": "probes of traces and diagonals",
    "num_eigenvalues": "eigenvalues at either end",
    "num_vectors": "random vectors of the density",
    "num_steps": "Lanczos steps of each",
    "num_sample_probes": "probes of single samples",
    "num_samples": "samples looked at singly, at most",
    "num_shown": "samples listed at either end",
    "num_points": "points of the slice, a direction",
}


def html_of(report: Report) -> str:
    """Return the page, which needs nothing beside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {
        outcome.part.name: [(name, Markup(svg)) for name, svg in outcome.svgs.items()]
        for outcome in report.outcomes
    }
    template = environment.get_template("report.html.j2")
    return template.render(report=report, figures=figures, labels=_LABELS)


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` to a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "report.html", folder / "report.json"
    texts = {
        page: html_of(report),
        numbers: json.dumps(report.as_json(), allow_nan=False, indent=1) + "\n",
    }
    _write_whole(texts)
    return page, numbers


def _write_whole(texts: dict[Path, str]) -> None:
    """Write all files beside their places, then put them there: nothing, or all of it."""
    own = f"{os.getpid()}.{uuid.uuid4().hex[:8]}.part"
    parts = {path: path.with_name(f"{path.name}.{own}") for path in texts}
    try:
        for path, part in parts.items():
            with part.open("w", encoding="utf-8") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
