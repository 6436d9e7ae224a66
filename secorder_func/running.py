"""Long computations and who watches them: to show how far they are, to keep what they have, to stop them.

A computation says what it does (`task`) and how far it is (`advance`), at moments at which nothing is half done. Who
watches is told so, and may raise `Cancelled` there. Neither knows the other.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "Cancelled",
    "Task",
    "Watcher",
    "advance",
    "further",
    "interruptible",
    "task",
    "unwatched",
    "watched",
]


class Cancelled(KeyboardInterrupt):
    """Someone asked for the computation to end."""


@dataclass
class Task:
    """A computation that is going on.

    Attributes
    ----------
    what, unit
        Names, for people: of the function, and of what is counted.
    total
        How many there will be, None if nobody knows.
    state
        What it takes to go on from where it is, in numbers, strings and tensors; valid until the next `advance`.
    parent
        The task that waits for it.
    resumed
        The state of an interrupted run to go on from, put here by a watcher that has one.
    kept
        Whether a watcher asks for the state.
    together
        Whether other processes take part: then it is not cancelled by itself, but where all learn of it.
    """

    what: str
    unit: str
    total: int | None
    state: Callable[[], dict[str, Any]] | None = None
    parent: Task | None = None
    resumed: dict[str, Any] | None = None
    kept: bool = False
    together: bool = False
    done: int = field(default=0, init=False)


class Watcher(Protocol):
    """Who is told of tasks."""

    def begun(self, task: Task, /) -> None:
        """One begins."""

    def advanced(self, task: Task, /) -> None:
        """One has got further."""

    def cancelled(self, task: Task, /) -> None:
        """One is about to be cancelled where it is."""

    def ended(self, task: Task, /) -> None:
        """One has ended, or failed."""


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("secorder_func_watchers", default=())
_task: ContextVar[Task | None] = ContextVar("secorder_func_task", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let someone watch what is computed inside."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


@contextmanager
def unwatched() -> Iterator[None]:
    """Let nobody watch: what follows a cancellation is to be done."""
    token = _watchers.set(())
    try:
        yield
    finally:
        _watchers.reset(token)


@contextmanager
def task(
    what: str,
    total: int | None,
    unit: str,
    state: Callable[[], dict[str, Any]] | None = None,
    *,
    together: bool = False,
) -> Iterator[Task]:
    """Say what is computed inside."""
    new = Task(what, unit, total, state, _task.get(), together=together)
    token = _task.set(new)
    begun: list[Watcher] = []
    try:
        for watcher in _watchers.get():
            watcher.begun(new)
            begun.append(watcher)
        yield new
    finally:
        _task.reset(token)
        for watcher in begun:
            watcher.ended(new)


def advance(done: int, total: int | None = None) -> None:
    """Say how far the present task is, and to how many it goes if that has changed."""
    present = _task.get()
    if present is None:
        return
    present.done = done
    if total is not None:
        present.total = total
    watchers = _watchers.get()
    try:
        for watcher in watchers:
            watcher.advanced(present)
    except Cancelled:
        for watcher in watchers:
            watcher.cancelled(present)
        raise


def further(steps: int) -> None:
    """Say that the present task has got further by some steps."""
    present = _task.get()
    if present is not None:
        advance(present.done + steps)


class _Interruption:
    """Ends what is watched, once it was asked for."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def begun(self, task: Task, /) -> None:
        pass

    def advanced(self, task: Task, /) -> None:
        if self.asked.is_set() and not task.together:
            raise Cancelled(f"{task.what} was cancelled after {task.done} {task.unit}")

    def cancelled(self, task: Task, /) -> None:
        pass

    def ended(self, task: Task, /) -> None:
        pass


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C end a long computation inside so that it returns what it has.

    Estimators, eigensolvers, densities and linear solvers stop at the next step and return the partial result, with a
    `ConvergenceWarning`; only where there is nothing yet, `KeyboardInterrupt` follows. A second Ctrl-C interrupts at
    once. What is yielded is a function that asks for the same, from another thread say; outside of the main thread,
    which alone gets signals, it is the only way.

    Examples
    --------
    >>> import warnings
    >>> import torch
    >>> from secorder_func import LinearOperator, hutchinson_trace, interruptible
    >>> def product(v):
    ...     stop()
    ...     return 2 * v
    >>> op = LinearOperator(product, like=torch.zeros(3))
    >>> with warnings.catch_warnings(), interruptible() as stop:
    ...     warnings.simplefilter("ignore")
    ...     print(hutchinson_trace(op, 1000, chunk_size=8))
    6 ± 0 (8 products)
    """
    interruption = _Interruption()
    main = threading.current_thread() is threading.main_thread()
    before: Any = signal.getsignal(signal.SIGINT) if main else None

    def asked(number: int, frame: Any) -> None:
        if interruption.asked.is_set():
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        interruption.asked.set()

    catches = main and before is not None
    if catches:
        signal.signal(signal.SIGINT, asked)
    try:
        with watched(interruption):
            yield interruption.asked.set
    finally:
        if catches:
            signal.signal(signal.SIGINT, before)
