"""How far long computations are, and how long they will still take, on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import distributed

from secorder_func import running
from secorder_func.checks import check_tolerance
from secorder_func.errors import MissingExtraError

__all__ = ["bars_on", "progress", "titled"]

_title: ContextVar[str] = ContextVar("secorder_func_title", default="")


@contextmanager
def progress(*, seconds: float = 2.0) -> Iterator[None]:
    """Show a bar with the time left for every computation inside that takes longer than two seconds.

    Estimators, eigensolvers, densities, matrix functions and linear solvers count products, and passes over `Batches`
    count batches. Bars are written to standard error, if that is a terminal, or into a notebook, by the first process
    of several; nowhere else.

    Parameters
    ----------
    seconds
        How long a computation runs before it is shown.

    Raises
    ------
    MissingExtraError
        rich is not installed: `pip install secorder-func[progress]`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, hutchinson_trace, progress
    >>> with progress():
    ...     print(hutchinson_trace(LinearOperator(lambda v: 2 * v, torch.zeros(3)), 8))
    6 ± 0 (8 products)
    """
    check_tolerance(seconds, "progress", name="seconds")
    console = _console()
    if console is None or any(isinstance(other, _Bars) for other in running.watchers()):
        yield  # there is nothing to show it on, or someone shows it
        return
    bars = _Bars(console, float(seconds))
    try:
        with running.watched(bars):
            yield
    finally:
        bars.close()


@contextmanager
def titled(title: str) -> Iterator[None]:
    """Write a title before the names of the bars inside: which part of something larger they are."""
    before = _title.get()
    _title.set(title)
    try:
        yield
    finally:
        _title.set(before)


def _console() -> Any:
    """Return where bars are shown, None for nowhere."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise MissingExtraError("progress", "rich", "progress") from error
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return None
    if not _is_terminal(sys.stderr):
        console = Console(file=sys.stdout) if sys.stdout is not None else None
        return console if console is not None and console.is_jupyter else None
    return Console(stderr=True)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is none, or it was closed
        return False


class _Bars(running.Watcher):
    """A bar for each task, from some seconds after the first of them began."""

    def __init__(self, console: Any, seconds: float) -> None:
        self._console, self._seconds = console, seconds
        self._lock = threading.RLock()
        self._tasks: list[running.Task] = []
        self._bars: dict[int, Any] = {}
        self._titles: dict[int, str] = {}
        self._since = 0.0
        self._live: Any = None
        self._timer: threading.Timer | None = None
        self._closed = False

    def begun(self, task: running.Task, /) -> None:
        with self._lock:
            if not self._tasks:
                self._since = time.monotonic()
            self._tasks.append(task)
            self._titles[id(task)] = "" if task.parent else _title.get()
            if self._live is not None:
                self._add(task)
            elif self._timer is None:
                self._wait(self._seconds)

    def advanced(self, task: running.Task, /) -> None:
        with self._lock:
            if self._live is not None and id(task) in self._bars:
                self._live.update(self._bars[id(task)], completed=task.done, total=task.total)

    def ended(self, task: running.Task, /) -> None:
        with self._lock:
            if task in self._tasks:
                self._tasks.remove(task)
                del self._titles[id(task)]
            bar = self._bars.pop(id(task), None)
            if bar is not None and self._live is not None:
                self._live.remove_task(bar)
            if not self._tasks:
                self._hide()

    def close(self) -> None:
        """Take everything away, for good."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._hide()

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._bars.clear()

    def _wait(self, seconds: float) -> None:
        if self._closed:
            return
        self._timer = threading.Timer(seconds, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            self._timer = None
            if self._closed or not self._tasks or self._live is not None:
                return
            left = self._since + self._seconds - time.monotonic()
            if left > 0:  # what was begun when the wait began is over
                self._wait(left)
                return
            # What goes to a file stays there.
            self._live = bars_on(self._console, redirect_stdout=_is_terminal(sys.stdout))
            for task in self._tasks:
                self._add(task)
            self._live.start()

    def _add(self, task: running.Task) -> None:
        title = self._titles[id(task)]
        what = f"{title}: {task.what}" if title else task.what
        self._bars[id(task)] = self._live.add_task(
            what, total=task.total, completed=task.done, unit=task.unit
        )


def bars_on(console: Any, **options: Any) -> Any:
    """Return rich's bars with the time left, for tasks with a field `unit`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        **options,
        speed_estimate_period=float("inf"),  # steps may take minutes
    )
