"""Signs of life of every process, so that one that is missing can be named."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from torch import distributed

__all__ = ["Heartbeat"]

_SECONDS = 0.5
"""Between two signs."""
_PATIENCE = 4
"""How many are waited for."""
_PREFIX, _LEFT = "secorder_func/alive", "secorder_func/left"


class Heartbeat:
    """Writes `count calls process host` into the store of the default process group, twice a second, from a thread.

    So a process that waits for others is told from one that is gone (its count stands still) and from one that does
    something else (it has not begun as many calls together).
    """

    _one: Heartbeat | None = None
    _lock = threading.Lock()

    def __init__(self, store: Any) -> None:
        self._store = store
        self._rank = distributed.get_rank()
        self._calls = 0
        self._beats = 0
        if store is not None:
            self._beat()
            threading.Thread(target=self._run, name="secorder_func heartbeat", daemon=True).start()

    @classmethod
    def of_this_process(cls) -> Heartbeat:
        """Return that of the present default group; there is one."""
        with cls._lock:
            store = _default_store()
            if cls._one is None or cls._one._store is not store:
                cls._one = cls(store)
            return cls._one

    def enter(self) -> None:
        """Note that this process begins another call together with the others."""
        self._calls += 1

    def suspects(self, ranks: list[int]) -> str:
        """Return in words which processes did not answer, and why, as far as that can be known."""
        if self._store is None:
            return "another process died or hangs"
        others = [rank for rank in ranks if rank != self._rank]
        before: dict[int, Any] = {}
        now: dict[int, Any] = {}
        try:
            self._beat()  # with the number of this call
            before = now = {rank: self._seen(rank) for rank in others}
            for _ in range(_PATIENCE):
                time.sleep(_SECONDS)
                now = {rank: self._seen(rank) for rank in others}
                if all(_moved(before[rank], now[rank]) for rank in others):
                    break
            gone = [rank for rank in others if not _moved(before[rank], now[rank])]
            verdict = self._verdict(gone, now, {rank: self._left(rank) for rank in others})
            self._store.set(f"{_LEFT}/{self._rank}", verdict)
            self._stay([rank for rank in others if rank not in gone and not self._late(now[rank])])
        except Exception:  # the store is in a process that is gone
            late = [rank for rank in others if rank in now and self._late(now[rank])]
            if late:
                return self._verdict([], now, {})
            return "rank 0, or the launcher, which holds what all processes share, is gone"
        return verdict

    def _verdict(self, gone: list[int], now: dict[int, Any], left: dict[int, str | None]) -> str:
        first = [rank for rank in gone if left.get(rank) is None]
        if first:
            return "; ".join(f"{_named(rank, now[rank])} is gone or frozen" for rank in first)
        reasons = [reason for reason in left.values() if reason is not None]
        if reasons:  # who gave up before knew best
            return reasons[0]
        late = [rank for rank, seen in now.items() if self._late(seen)]
        if late:
            names = ", ".join(_named(rank, now[rank]) for rank in late)
            return f"{names} is alive, but did not make this call in time"
        return "all processes are alive, but do not hear each other"

    def _late(self, seen: tuple[int, int, str, str] | None) -> bool:
        return seen is not None and seen[1] < self._calls

    def _stay(self, waiting: list[int]) -> None:
        """Let the first process, which may hold the store, stay until the others have read it."""
        for _ in range(_PATIENCE if self._rank == 0 else 0):
            if all(self._left(rank) is not None for rank in waiting):
                return
            time.sleep(_SECONDS)

    def _left(self, rank: int) -> str | None:
        """Return why a process gave up, None if it did not."""
        key = f"{_LEFT}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _seen(self, rank: int) -> tuple[int, int, str, str] | None:
        key = f"{_PREFIX}/{rank}"
        if not self._store.check([key]):
            return None
        count, calls, process, host = self._store.get(key).decode().split(" ", 3)
        return int(count), int(calls), process, host

    def _beat(self) -> None:
        self._beats += 1
        content = f"{self._beats} {self._calls} {os.getpid()} {socket.gethostname()}"
        self._store.set(f"{_PREFIX}/{self._rank}", content)

    def _run(self) -> None:
        while True:
            time.sleep(_SECONDS)
            try:
                if _default_store() is not self._store:
                    return
                self._beat()
            except Exception:  # the group was destroyed, or the store is gone
                return


def _moved(before: Any, now: Any) -> bool:
    return now is not None and (before is None or now[0] > before[0])


def _named(rank: int, seen: tuple[int, int, str, str] | None) -> str:
    return f"rank {rank}" if seen is None else f"rank {rank} (process {seen[2]} on {seen[3]})"


def _default_store() -> Any:
    """Return the store of the default group, None where this torch does not show it."""
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    try:
        return None if get is None else get()
    except (RuntimeError, ValueError):
        return None
