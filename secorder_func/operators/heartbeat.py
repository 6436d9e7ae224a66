"""Signs of life of every process, so that one that is missing can be named."""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import distributed

__all__ = ["Heartbeat"]

_SECONDS = 0.5
"""Between two signs."""
_PATIENCE = 4
"""How many are waited for."""
_ALIVE, _LEFT = "secorder_func/alive", "secorder_func/left"


@dataclass
class _Sign:
    """What a process says: how many signs it gave, who it is, how many calls it has begun in each group, and which."""

    beats: int = 0
    process: int = 0
    host: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    what: dict[str, str] = field(default_factory=dict)


class Heartbeat:
    """Writes signs of this process into the store of the default process group, twice a second, from a thread.

    So a process that waits for others is told from one that is gone (its signs stand still) and from one that does
    something else (it has not begun as many calls together, or others).
    """

    _one: Heartbeat | None = None
    _lock = threading.RLock()

    def __init__(self, store: Any) -> None:
        self._store = store
        self._rank = distributed.get_rank()
        self._own = _Sign(process=os.getpid(), host=socket.gethostname())
        self._over = threading.Event()
        if store is not None:
            self._beat()
            self._thread = threading.Thread(
                target=self._run, name="secorder_func heartbeat", daemon=True
            )
            self._thread.start()
            atexit.register(
                self._stop
            )  # a thread that is in the store when all is torn down aborts

    @classmethod
    def of_this_process(cls) -> Heartbeat:
        """Return that of the present default group; there is one."""
        with cls._lock:
            store = _default_store()
            if cls._one is None or cls._one._store is not store:
                cls._one = cls(store)
            return cls._one

    def enter(self, group: str, what: str) -> None:
        """Note that this process begins another call together with the others of a group."""
        with self._lock:
            self._own.calls[group] = self._own.calls.get(group, 0) + 1
            self._own.what[group] = what

    def suspects(self, group: str, ranks: list[int]) -> str:
        """Return in words which processes did not answer, and why, as far as that can be known."""
        if self._store is None:
            return "another process died or hangs"
        others = [rank for rank in ranks if rank != self._rank]
        left = f"{_LEFT}/{group}/{self._own.calls.get(group, 0)}"
        now: dict[int, _Sign | None] = {}
        try:
            self._beat()  # with the number of this call
            before = now = {rank: self._seen(rank) for rank in others}
            for _ in range(_PATIENCE):
                time.sleep(_SECONDS)
                now = {rank: self._seen(rank) for rank in others}
                if all(_moved(before[rank], now[rank]) for rank in others):
                    break
            gone = [rank for rank in others if not _moved(before[rank], now[rank])]
            reasons = {rank: self._text(f"{left}/{rank}") for rank in others}
            verdict = self._verdict(group, gone, now, reasons)
            self._store.set(f"{left}/{self._rank}", verdict)
            waiting = [r for r in others if r not in gone and not self._late(group, now[r])]
            self._stay([f"{left}/{rank}" for rank in waiting])
        except Exception:  # the store is in a process that is gone
            if any(self._late(group, sign) for sign in now.values()):
                return self._verdict(group, [], now, {})
            return "rank 0, or the launcher, which holds what all processes share, is gone"
        return verdict

    def _verdict(
        self,
        group: str,
        gone: list[int],
        now: dict[int, _Sign | None],
        reasons: dict[int, str | None],
    ) -> str:
        first = [rank for rank in gone if reasons.get(rank) is None]
        if first:
            return "; ".join(f"{_named(rank, now[rank])} is gone or frozen" for rank in first)
        known = [reason for reason in reasons.values() if reason is not None]
        if known:  # who gave up before knew best
            return known[0]
        late = [rank for rank, sign in now.items() if self._late(group, sign)]
        if late:
            names = ", ".join(_named(rank, now[rank]) for rank in late)
            return f"{names} is alive, but did not make this call in time"
        own = self._own.what.get(group)
        for rank, sign in now.items():
            if sign is not None and sign.what.get(group) != own:
                return f"{_named(rank, sign)} is in {sign.what.get(group)}, this process in {own}"
        return "all processes are alive, but do not hear each other"

    def _late(self, group: str, sign: _Sign | None) -> bool:
        return sign is not None and sign.calls.get(group, 0) < self._own.calls.get(group, 0)

    def _stay(self, keys: list[str]) -> None:
        """Let the first process, which may hold the store, stay until the others have read it."""
        for _ in range(_PATIENCE if self._rank == 0 else 0):
            if all(self._text(key) is not None for key in keys):
                return
            time.sleep(_SECONDS)

    def _text(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _seen(self, rank: int) -> _Sign | None:
        text = self._text(f"{_ALIVE}/{rank}")
        return None if text is None else _Sign(**json.loads(text))

    def _beat(self) -> None:
        with self._lock:
            self._own.beats += 1
            content = json.dumps(vars(self._own))
        self._store.set(f"{_ALIVE}/{self._rank}", content)

    def _stop(self) -> None:
        self._over.set()
        self._thread.join(_PATIENCE * _SECONDS)

    def _run(self) -> None:
        with suppress(Exception):  # the group was destroyed, or the store is gone
            while not self._over.wait(_SECONDS):
                if _default_store() is not self._store:
                    return
                self._beat()


def _moved(before: _Sign | None, now: _Sign | None) -> bool:
    return now is not None and (before is None or now.beats > before.beats)


def _named(rank: int, sign: _Sign | None) -> str:
    return (
        f"rank {rank}" if sign is None else f"rank {rank} (process {sign.process} on {sign.host})"
    )


def _default_store() -> Any:
    """Return the store of the default group, None where this torch does not show it."""
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    try:
        return None if get is None else get()
    except (RuntimeError, ValueError):
        return None
