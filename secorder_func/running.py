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
from typing import Any

__all__ = [
    "Cancelled",
    "Task",
    "Watcher",
    "advance",
    "further",
    "interruptible",
    "look",
    "only_outermost",
    "task",
    "unwatched",
    "watched",
    "watchers",
]


class Cancelled(KeyboardInterrupt):
    """Someone asked for the computation to end."""


@dataclass(eq=False)
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
    detail
        Which one it is, of several of the same name.
    together
        Whether other processes take part: then it is not cancelled by itself, but where all learn of it.
    parent
        The task that waits for it.
    resumed
        The state of an interrupted run to go on from, put here by a watcher that has one.
    kept
        Whether a watcher will ask for the state.
    """

    what: str
    unit: str
    total: int | None
    state: Callable[[], dict[str, Any]] | None = None
    detail: str = ""
    together: bool = False
    parent: Task | None = None
    resumed: dict[str, Any] | None = None
    kept: bool = False
    done: int = field(default=0, init=False)


class Watcher:
    """Who is told of tasks."""

    def begun(self, task: Task, /) -> None:
        """One begins."""

    def advanced(self, task: Task, /) -> None:
        """One has got further."""

    def looked(self, task: Task | None, /) -> None:
        """One goes on, and is not further; or something that is no task."""

    def cancelled(self, task: Task, /) -> None:
        """One is about to be cancelled where it is; those that wait for it follow."""

    def ended(self, task: Task, /) -> None:
        """One has ended, or failed."""


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("secorder_func_watchers", default=())
_task: ContextVar[Task | None] = ContextVar("secorder_func_task", default=None)


def watchers() -> tuple[Watcher, ...]:
    """Return who watches."""
    return _watchers.get()


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let someone watch what is computed inside."""
    _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:  # by name: a generator may leave its context in another order
        _watchers.set(tuple(other for other in _watchers.get() if other is not watcher))


@contextmanager
def unwatched() -> Iterator[None]:
    """Let nobody watch: what follows a cancellation is to be done."""
    before = _watchers.get()
    _watchers.set(())
    try:
        yield
    finally:
        _watchers.set(before)


@contextmanager
def task(
    what: str,
    total: int | None,
    unit: str,
    state: Callable[[], dict[str, Any]] | None = None,
    *,
    detail: str = "",
    together: bool = False,
) -> Iterator[Task]:
    """Say what is computed inside."""
    new = Task(what, unit, total, state, detail, together, _task.get())
    _task.set(new)
    begun: list[Watcher] = []
    try:
        for watcher in _watchers.get():
            watcher.begun(new)
            begun.append(watcher)
        yield new
    finally:
        _task.set(new.parent)
        for watcher in begun:
            watcher.ended(new)


def advance(done: int) -> None:
    """Say how far the present task is."""
    present = _task.get()
    if present is None:
        return
    present.done = done
    _tell(present, lambda watcher: watcher.advanced(present))


def further(steps: int) -> None:
    """Say that the present task has got further by some steps."""
    present = _task.get()
    if present is not None:
        advance(present.done + steps)


def look(*, shared: bool = False) -> None:
    """Let who watches end what is going on, if it is asked for; if `shared`, where other processes learn of it."""
    present = _task.get()
    _tell(present, lambda watcher: watcher.looked(None if shared else present))


def only_outermost() -> bool:
    """Say whether nothing waits for the present task: only then may it end with what it has, being cancelled."""
    present = _task.get()
    return present is not None and present.parent is None


def _tell(present: Task | None, what: Callable[[Watcher], None]) -> None:
    all_watchers = _watchers.get()
    try:
        for watcher in all_watchers:
            what(watcher)
    except Cancelled:
        while present is not None:
            for watcher in all_watchers:
                watcher.cancelled(present)
            present = present.parent
        raise


class _Interruption(Watcher):
    """Ends what is watched, once it was asked for."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.heard = False

    def advanced(self, task: Task, /) -> None:
        self.looked(task)

    def looked(self, task: Task | None, /) -> None:
        if self.asked.is_set() and not (task is not None and task.together):
            self.heard = True
            what = "the computation" if task is None else f"{task.what}"
            where = "" if task is None else f" after {task.done} {task.unit}"
            raise Cancelled(f"{what} was cancelled{where}")


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C end a long computation inside so that it returns what it has.

    Estimators, `eigsh`, densities, matrix functions and linear solvers stop at the next step and return the partial
    result, with a `ConvergenceWarning`. Where there is no partial result, as of an exact function, or of an estimate
    over `Batches` all of whose probes share one pass, `KeyboardInterrupt` follows; a checkpoint keeps the pass. What
    comes after it in the same block is cancelled, too. A second Ctrl-C interrupts at once.

    What is yielded is a function that asks for the same, from another thread say. The block must be entered in the
    thread that computes; outside of the main thread, which alone gets signals, only the function ends it. Who ignores
    SIGINT (`nohup`) is not interrupted.

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
    outer = [watcher for watcher in watchers() if isinstance(watcher, _Interruption)]
    before: Any = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
    catches = before not in (None, signal.SIG_IGN)

    def asked(number: int, frame: Any) -> None:
        if not interruption.asked.is_set():
            interruption.asked.set()
            return
        interruption.heard = True
        signal.signal(signal.SIGINT, before)
        if not callable(before):
            raise KeyboardInterrupt
        before(number, frame)

    if catches:
        signal.signal(signal.SIGINT, asked)
    try:
        with watched(interruption):
            yield interruption.asked.set
        if interruption.asked.is_set() and not interruption.heard:
            raise KeyboardInterrupt  # nothing inside has looked
    finally:
        if interruption.asked.is_set():
            for other in outer:
                other.asked.set()
        if catches and signal.getsignal(signal.SIGINT) is asked:
            signal.signal(signal.SIGINT, before)
