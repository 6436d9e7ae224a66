"""How far long computations are, and how long they will still take, on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from secorder_func import running
from secorder_func.errors import MissingExtraError

__all__ = ["progress"]

_SECONDS = 2.0
"""What takes no longer is not shown."""


@contextmanager
def progress(*, seconds: float = _SECONDS) -> Iterator[None]:
    """Show a bar with the time left for every computation inside that takes longer than two seconds.

    Estimators, eigensolvers, densities, matrix functions and linear solvers count products, and passes over `Batches`
    count batches. Bars are written to standard error, if that is a terminal, or into a notebook, by the first
    process of several; nowhere else.

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
    bars = _Bars(seconds)
    try:
        with running.watched(bars):
            yield
    finally:
        bars.close()


def _is_first() -> bool:
    """Say whether this is the first process of its group, or the only one."""
    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


class _Bars:
    """A bar for each task, from some seconds after the first of them began."""

    def __init__(self, seconds: float) -> None:
        try:
            from rich.console import Console
        except ModuleNotFoundError as error:
            raise MissingExtraError("progress", "rich", "progress") from error
        console = Console(stderr=True)
        shown = (sys.stderr.isatty() or console.is_jupyter) and _is_first()
        self._console = console if shown else None
        self._seconds = seconds
        self._lock = threading.RLock()
        self._tasks: list[running.Task] = []
        self._bars: dict[int, Any] = {}
        self._live: Any = None
        self._timer: threading.Timer | None = None

    def begun(self, task: running.Task, /) -> None:
        if self._console is None:
            return
        with self._lock:
            self._tasks.append(task)
            if self._live is not None:
                self._add(task)
            elif self._timer is None:
                self._timer = threading.Timer(self._seconds, self._show)
                self._timer.daemon = True
                self._timer.start()

    def advanced(self, task: running.Task, /) -> None:
        with self._lock:
            if self._live is not None and id(task) in self._bars:
                self._live.update(self._bars[id(task)], completed=task.done, total=task.total)

    def cancelled(self, task: running.Task, /) -> None:
        pass

    def ended(self, task: running.Task, /) -> None:
        with self._lock:
            if task in self._tasks:
                self._tasks.remove(task)
            bar = self._bars.pop(id(task), None)
            if bar is not None and self._live is not None:
                self._live.remove_task(bar)
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Take everything away."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._live is not None:
                self._live.stop()
                self._live = None
            self._bars.clear()

    def _show(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with self._lock:
            if not self._tasks or self._live is not None:
                return
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                speed_estimate_period=float("inf"),  # steps may take minutes
            )
            for task in self._tasks:
                self._add(task)
            self._live.start()

    def _add(self, task: running.Task) -> None:
        self._bars[id(task)] = self._live.add_task(
            task.what, total=task.total, completed=task.done, unit=task.unit
        )
