"""What the commands have in common: how a problem is named, where they write, what they say meanwhile."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from secorder_func import running
from secorder_func.__main__ import main
from secorder_func.progress_bars import progress, titled
from secorder_func.report import write_report
from secorder_func.report.progress import Stages
from tests.test_progress import Terminal, on_terminal

PROBLEM = """
import torch
def squares():
    return lambda p, x: torch.tanh(x @ p).square().mean(), torch.ones(3), (torch.randn(5, 3),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder with a user's module, which no other test imports."""
    (tmp_path / "named_problem.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "named_problem", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "named", [["named_problem:squares"], ["--problem", "named_problem:squares"]]
)
@pytest.mark.parametrize("command", [["verify"], ["report", "--quick", "--output", "out"]])
def test_a_problem_is_named_with_or_without_the_option(
    command: list[str], named: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *named]) == 0
    assert "named_problem:squares" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_problem_that_is_named_twice_is_refused(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "a:b", "--problem", "c:d"])
    assert "MODULE:FUNCTION is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo", "--quick"], ["report", "named_problem:squares"]])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").write_text("")
    for place in ("taken", "taken/below"):
        assert main([*command, "--output", place]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{command[0]}: cannot write into '{place}'" in err
        assert "Name another folder with --output." in err
        assert err.count("\n") == 1
    with pytest.raises(OSError, match=r"write_report: cannot write into 'taken' .* with folder="):
        write_report(lambda p: p.sum(), {}, (), folder="taken")


def test_what_was_measured_is_printed_though_it_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["report", "named_problem:squares", "--quick", "--output", "out"]) == 2
    out, err = capsys.readouterr()
    assert "trace of the Hessian" in out
    assert "Written" not in out
    assert err == "report: it could not be written: the disk is full\n"


def test_a_report_of_ones_own_needs_no_digits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "scipy"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["report", "named_problem:squares", "--quick", "--output", "out"]) == 0
    assert json.loads((folder / "out" / "report.json").read_text())["missing"] == []
    assert main(["report", "--quick"]) == 2
    assert "needs scikit-learn" in capsys.readouterr().err


# --------------------------------------------------------------------------------- progress


class Seen(io.StringIO):
    """What a log had at every flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_a_log_says_what_begins_and_how_long_it_took() -> None:
    log = Seen()
    stages = Stages(Console(file=log, width=100))
    with stages.stage("the first thing", bar=False):
        assert log.flushed[-1].split() == ["the", "first", "thing"]
    with pytest.raises(ZeroDivisionError), stages.stage("the second", bar=False):
        raise ZeroDivisionError
    first, second = log.getvalue().splitlines()
    assert first.endswith(" s")
    assert second.split() == ["the", "second"]


def test_bars_say_which_part_they_belong_to(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: Terminal = on_terminal(monkeypatch)
    with progress(seconds=0), titled("2 of 7: trace"):
        for _ in range(3):
            with running.task("counting", 5, "steps"), running.task("inner", 2, "laps"):
                running.advance(1)
                _wait_for(terminal, "inner")
    shown: Any = terminal.getvalue()
    assert "2 of 7: trace: counting" in shown
    assert "2 of 7: trace: inner" not in shown
    with progress(seconds=0), running.task("another", 5, "steps"):
        _wait_for(terminal, "another")
    assert "trace: another" not in terminal.getvalue()


def _wait_for(terminal: Terminal, text: str) -> None:
    for _ in range(400):
        if text in terminal.getvalue():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"{text} was not shown")
