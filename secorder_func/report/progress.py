"""Progress of the long parts: bars on a terminal, one line a stage in a log, which begins when the stage does."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console

from secorder_func.progress_bars import bars_on, titled

__all__ = ["Advance", "Stages", "make_console"]

LOG_WIDTH = 120

Advance: TypeAlias = Callable[[int], None]
"""Called with how many steps were done since the last call."""


def make_console() -> Console:
    """Return a console for standard output, as wide as the terminal, or as the tables need where there is none."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A folder's name or a sign that the encoding lacks is no reason to stop half-way.
        sys.stdout.reconfigure(errors="replace")
    # Without markup and emoji: a path may have brackets in it, and module:one: is no picture of a one.
    console = Console(highlight=False, markup=False, emoji=False)
    if console.file.isatty():
        return console
    return Console(highlight=False, markup=False, emoji=False, width=LOG_WIDTH)


class Stages:
    """The stages of a run, each with a bar while it runs and a line when it has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the first stage could begin."""
        return time.perf_counter() - self._start

    @contextmanager
    def stage(self, label: str, total: int | None = None, *, bar: bool = True) -> Iterator[Advance]:
        """Show a stage of `total` steps (None: nobody knows) and yield what counts them.

        Without a bar of its own, where `secorder_func.progress` shows what is computed inside.
        """
        start = time.perf_counter()
        terminal = self._console.file.isatty()
        if not terminal:
            self._console.print(f"  {label:<48}", end="")
            self._console.file.flush()
        # A log would keep every refresh. Not is_terminal, which FORCE_COLOR makes true.
        shown = bars_on(self._console, disable=not (bar and terminal))
        try:
            with shown, titled(label):
                task = shown.add_task(f"  {label}", total=total, unit="")
                yield lambda steps: shown.advance(task, steps)
        except BaseException:
            if not terminal:
                self._console.print()
            raise
        begun = f"  {label:<48}" if terminal else ""
        self._console.print(f"{begun}{time.perf_counter() - start:6.1f} s")
