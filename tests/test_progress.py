"""Bars are shown on a terminal after some seconds, and nowhere else."""

from __future__ import annotations

import builtins
import io
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import (
    Batches,
    LinearOperator,
    eigsh,
    hutchinson_trace,
    progress,
    running,
    verify,
)
from secorder_func.errors import MissingExtraError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal; in the test itself, as pytest exchanges the streams after every fixture."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def slow(seconds: float = 0.01) -> LinearOperator:
    def product(v: Tensor) -> Tensor:
        time.sleep(seconds)
        return 2 * v

    return LinearOperator(product, torch.zeros(30))


def timers() -> list[threading.Thread]:
    return [
        t
        for t in threading.enumerate()
        if isinstance(t, threading.Timer) and not t.finished.is_set()
    ]


def test_a_bar_counts_products_and_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress(seconds=0):
        found = hutchinson_trace(slow(), 40, chunk_size=2)
    assert float(found.value) == 60.0
    shown = terminal.getvalue()
    assert "hutchinson_trace" in shown
    assert "/40 products" in shown.replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "left" in shown
    assert not timers()


def test_passes_count_batches_inside_of_what_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)

    def loss(p: Tensor, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return (x * p**4).mean()

    batches = Batches([torch.ones(2)] * 7, check_weights=False)
    with progress(seconds=0):
        eigsh(batches.hessian_operator(loss, torch.ones(2)), 1)
    shown = terminal.getvalue()
    assert "eigsh" in shown
    assert "pass over the data" in shown
    assert "/7" in shown


def test_a_verification_counts_its_checks_all_of_them_where_all_is_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    seen = []

    class Watching(running.Watcher):
        def advanced(self, task: running.Task, /) -> None:
            seen.append((task.what, task.done, task.total))

    def loss(p: Tensor) -> Tensor:
        time.sleep(0.01)
        return (p**3).sum()

    with progress(seconds=0), running.watched(Watching()):
        result = verify(loss, torch.tensor([1.0, 2.0]))
    assert result.ok
    shown = terminal.getvalue().replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "verify" in shown
    assert "/12 checks" in shown
    assert seen[-1] == ("verify", len(result.checks) - 1, 12)  # the last one ends it
    assert len(result.checks) == 12


def test_what_is_short_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress():
        for _ in range(20):
            hutchinson_trace(slow(0), 4)
    assert terminal.getvalue() == ""
    assert not timers()


def test_without_a_terminal_there_is_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(seconds=0):
        hutchinson_trace(slow(), 20, chunk_size=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [None, object()], ids=["none", "no terminal"])
def test_a_missing_stream_is_no_terminal(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(seconds=0):
        assert float(hutchinson_trace(slow(0), 8).value) == 60.0


def test_what_goes_to_a_file_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)

    def product(v: Tensor) -> Tensor:
        time.sleep(0.02)
        print("mine")
        return 2 * v

    with progress(seconds=0):
        hutchinson_trace(LinearOperator(product, torch.zeros(3)), 20, chunk_size=1)
    assert out.getvalue().count("mine") == 20
    assert "mine" not in terminal.getvalue()


def test_an_error_takes_the_bars_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    calls = [0]

    def product(v: Tensor) -> Tensor:
        time.sleep(0.02)
        calls[0] += 1
        if calls[0] == 10:
            raise ZeroDivisionError("mine")
        return v

    with progress(seconds=0), pytest.raises(ZeroDivisionError, match="mine"):
        hutchinson_trace(LinearOperator(product, torch.zeros(3)), 20, chunk_size=1)
    assert not timers()
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is shown again


def test_a_block_within_a_block_shows_each_bar_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress(seconds=0), progress(seconds=0):
        hutchinson_trace(slow(), 20, chunk_size=2)
    frames = terminal.getvalue().split("\x1b[2K")
    assert all(frame.count("hutchinson_trace") <= 1 for frame in frames)


def test_without_rich_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"secorder-func\[progress\]"), progress():
        pass


@pytest.mark.parametrize("seconds", ["a", -1, float("nan"), None])
def test_bad_seconds_are_named(seconds: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="seconds"), progress(seconds=seconds):
        pass
