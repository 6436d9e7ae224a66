"""What the processes of a `torch.distributed` group do together, and what they say of one that fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from secorder_func import running
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    NoExactRouteError,
    RankError,
    message,
)
from secorder_func.operators.heartbeat import Heartbeat
from secorder_func.operators.memory import is_out_of_memory
from secorder_func.transforms.policy import in_transform

__all__ = ["NoFormsError", "Ranks", "agreed", "marks_of"]

T = TypeVar("T")
_MARKS = 4
_NEAR, _SAME = 1e-9, 1e-14
"""By what share squares of marks may spread: of vectors, which roundings may tell apart, and of parameters."""
_TILE = 1021


class NoFormsError(Exception):
    """A batch, of this process or of another, has no forms."""


class Ranks:
    """The processes of a group, in which each makes the same calls.

    Parameters
    ----------
    group
        A process group; that of all processes if True.
    where
        The public function, for messages.

    Attributes
    ----------
    inner
        The processes of another group that each of these works with, where work is shared twice.
    """

    def __init__(self, group: Any, where: str) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            problem = "group= was given, and torch.distributed is not initialized"
            mend = (
                "Start it by torchrun, and call torch.distributed.init_process_group(timeout=...)"
            )
            raise ArgumentError(message(where, problem, mend))
        if group is True:
            group = distributed.group.WORLD
        if not isinstance(group, distributed.ProcessGroup):
            problem = f"group must be a process group or True, got {group!r}"
            mend = (
                "A process outside of the group has no part in it: do not make the operator there"
            )
            raise ArgumentTypeError(message(where, problem, mend))
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.inner: Ranks | None = None
        self._where = where
        self._all = distributed.get_process_group_ranks(group)
        self._heartbeat = Heartbeat.of_this_process()

    def around(self, inner: Ranks | None) -> Ranks:
        """Return the same processes, each of which works with others of another group."""
        if inner is None or inner.group is self.group:
            return self
        both = copy.copy(self)
        both.inner = inner if self.inner is None else self.inner.around(inner)
        return both

    @property
    def is_first(self) -> bool:
        """Whether this process is the first in all of its groups."""
        return self.rank == 0 and (self.inner is None or self.inner.is_first)

    def attempt(self, compute: Callable[[], T], instead: T) -> tuple[T, BaseException | None]:
        """Return what is computed, or something instead and why: nobody may be left waiting for `sum`."""
        try:
            if in_transform():
                problem = (
                    "what several processes compute together is neither mapped nor differentiated"
                )
                raise NoExactRouteError(message(self._where, problem, "Call it outside"))
            running.look(shared=True)
            return compute(), None
        except (Exception, KeyboardInterrupt) as error:
            return instead, error

    def sum(
        self,
        what: str,
        tensors: Sequence[Tensor],
        failure: BaseException | None = None,
        *,
        number: float = 0.0,
        marks: Sequence[float] = (),
        same: str = "",
    ) -> tuple[list[Tensor], float]:
        """Return the sums over all processes, of tensors and of a number, the same bits everywhere.

        A few numbers go first: whether all have something to sum, and the same. Then the tensors, those of a dtype in
        one message.

        Parameters
        ----------
        what
            What is computed, for messages.
        tensors
            Of the same shapes everywhere.
        failure
            What happened in this process instead; all learn of it and raise.
        marks
            Numbers that are the same everywhere, if all are in the same computation.
        same
            What of must be the same to the last digit, for messages; else roundings are allowed.
        """
        if failure is None and any(tensor.requires_grad for tensor in tensors):
            problem = "no derivative of what several processes compute together is recorded"
            mend = (
                "Detach the parameters, as functional_loss does, or call it under torch.no_grad()"
            )
            failure = ArgumentError(message(self._where, problem, mend))
        size = float(sum(tensor.numel() for tensor in tensors))
        number = self._learn(what, failure, number, [size, *marks], same)
        found = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in found):
            places = [place for place, tensor in enumerate(found) if tensor.dtype == dtype]
            parts = [found[place].reshape(-1) for place in places]
            buffer = torch.cat([part.to(parts[0].device) for part in parts])
            self._together(what, partial(distributed.all_reduce, buffer, group=self.group))
            pieces = buffer.split([len(part) for part in parts])
            for place, piece in zip(places, pieces, strict=True):
                found[place] = piece.reshape(found[place].shape).to(found[place].device)
        whole = [
            torch.view_as_complex(new.clone()) if old.is_complex() else new
            for new, old in zip(found, tensors, strict=True)
        ]
        return whole, number

    def agree(self, value: Any) -> Any:
        """Return the value that the first process has, anything that can be pickled."""
        if self.inner is not None:
            value = self.inner.agree(value)
        held = [value]
        first = distributed.get_global_rank(self.group, 0)
        self._together(
            "a value of the first process",
            lambda: distributed.broadcast_object_list(held, first, group=self.group),
        )
        return held[0]

    # ------------------------------------------------------------------------------- failures

    def _learn(
        self,
        what: str,
        failure: BaseException | None,
        number: float,
        marks: Sequence[float],
        same: str,
    ) -> float:
        """Learn whether all have something to sum, and the same; raise in all what happened in one.

        Return the sum of a number.
        """
        kinds = (NoFormsError, running.Cancelled)
        kind = next((i for i, k in enumerate(kinds, 1) if isinstance(failure, k)), 0)
        flags = [0.0, 0.0, 0.0, number]
        if failure is not None:
            flags[kind], flags[3] = 1.0, 0.0
        padded = [*marks, *[0.0] * (1 + _MARKS - len(marks))]
        if not all(map(math.isfinite, padded)):
            padded = [0.0] * len(padded)
        device = _device_of(self.group)
        status = torch.tensor(
            [*flags, *padded, *(mark * mark for mark in padded)], dtype=torch.float64, device=device
        )
        self._together(what, lambda: distributed.all_reduce(status, group=self.group))
        failed, without, stopped, total, *sums = status.tolist()
        if failed:
            self._raise_together(failure if kind == 0 else None)
        if stopped:
            if isinstance(failure, running.Cancelled):
                raise failure
            raise running.Cancelled("another process was cancelled")
        if without:
            if isinstance(failure, NoFormsError):
                raise failure
            raise NoFormsError("a batch of another process has no forms")
        first, second = sums[: len(padded)], sums[len(padded) :]
        near = _SAME if same else _NEAR
        for mark, square in zip(first, second, strict=True):
            if square / self.size - (mark / self.size) ** 2 > near * square / self.size:
                problem = f"{same or 'vectors'} differ between the processes, or they are in different computations"
                mend = "Let every process make the same calls with the same parameters, vectors and seeds"
                raise RankError(message(self._where, problem, mend))
        return float(total)

    def _raise_together(self, own: BaseException | None) -> None:
        told = None if own is None else f"{type(own).__name__}: {own}"
        reasons: list[str | None] = [None] * self.size
        self._together(
            "the reasons of a failure",
            lambda: distributed.all_gather_object(reasons, told, group=self.group),
        )
        if own is not None:
            if isinstance(own, RuntimeError) and is_out_of_memory(
                own
            ):  # nobody may try again alone
                problem = f"this process is out of memory ({own})"
                raise RankError(message(self._where, problem, "Pass memory_budget=")) from own
            raise own
        failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
        problem = "; ".join(f"rank {rank} failed with {reason}" for rank, reason in failed.items())
        raise RankError(message(self._where, problem, "See the traceback of that process"))

    def _together(self, what: str, call: Callable[[], Any]) -> None:
        name = ",".join(map(str, self._all))
        self._heartbeat.enter(name, what)
        try:
            call()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            problem = f"{self._heartbeat.suspects(name, self._all)} ({reason})"
            mend = (
                "Every process must make the same calls, and end with an exception if it fails; "
                "the timeout of the group (init_process_group, new_group) says how long the others wait"
            )
            raise RankError(message(self._where, problem, mend)) from error


def agreed(ranks: Ranks | None, value: T) -> T:
    """Return the value that the first of several processes has, that of this one if there is no other."""
    if ranks is None:
        return value
    first: T = ranks.agree(value)
    return first


def marks_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return numbers by which vectors are told from others: the norm, and sums with fixed random weights.

    The weights repeat after a prime number of entries. One synchronisation.
    """
    if not tensors:
        return [0.0] * _MARKS
    generator = torch.Generator().manual_seed(_TILE)
    weights = torch.randn(_MARKS - 1, _TILE, dtype=torch.float64, generator=generator)
    squares, seen = [], []
    for number, tensor in enumerate(tensors):
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        flat = real.detach().reshape(-1)
        squares.append(torch.linalg.vector_norm(flat, dtype=torch.float64).square().cpu())
        whole = len(flat) - len(flat) % _TILE
        folded = flat[:whole].reshape(-1, _TILE).sum(0, dtype=torch.float64).cpu()
        rest = flat[whole:].double().cpu()
        folded[: len(rest)] += rest
        seen.append((number + 1) * (weights @ folded))
    norm = torch.stack(squares).sum().sqrt().reshape(1)
    found: list[float] = torch.cat([norm, torch.stack(seen).sum(0)]).tolist()
    return found


def _device_of(group: Any) -> torch.device:
    """Return a device on which the backend of a group exchanges small tensors."""
    backend = str(distributed.get_backend(group))
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")
