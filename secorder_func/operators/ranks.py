"""What the processes of a `torch.distributed` group do together, and what they say of one that fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from secorder_func import running
from secorder_func.errors import ArgumentError, ArgumentTypeError, RankError, message
from secorder_func.operators.heartbeat import Heartbeat

__all__ = ["NoFormsError", "Ranks", "mark_of"]

_SLOTS = 5
_NEAR = 1e-2


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
        self._where = where
        self._heartbeat = Heartbeat.of_this_process()

    def sum(
        self,
        tensors: Sequence[Tensor],
        failure: BaseException | None = None,
        *,
        mark: float = 0.0,
    ) -> list[Tensor]:
        """Return the sums over all processes, by one all-reduce; the same bits everywhere.

        Parameters
        ----------
        tensors
            Of the same shapes everywhere.
        failure
            What happened in this process instead; all learn of it and raise.
        mark
            A number of order one that is the same everywhere, if all are in the same computation.
        """
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        device = tensors[0].device
        no_forms, cancelled = (
            isinstance(failure, kind) for kind in (NoFormsError, running.Cancelled)
        )
        failed = failure is not None and not no_forms and not cancelled
        status = [float(failed), float(no_forms), float(cancelled), mark, mark * mark]
        slots = torch.tensor(status, dtype=dtype, device=device)
        parts = [tensor.detach().reshape(-1).to(device, dtype) for tensor in tensors]
        buffer = torch.cat([*parts, slots])
        if failure is not None:
            buffer[:-_SLOTS] = 0
        self._together(lambda: distributed.all_reduce(buffer, group=self.group))
        failures, without, stopped, marks, squares = buffer[-_SLOTS:].tolist()
        if failures:
            self._raise_together(failure if failed else None)
        if stopped:
            raise failure if cancelled else running.Cancelled("another process was cancelled")  # type: ignore[misc]
        if without:
            raise failure if no_forms else NoFormsError("a batch of another process has no forms")  # type: ignore[misc]
        spread = squares / self.size - (marks / self.size) ** 2
        if spread > _NEAR * max(1.0, squares / self.size):
            problem = "the processes multiply different vectors, or are in different computations"
            mend = "Let every process make the same calls with the same vectors and seeds"
            raise RankError(message(self._where, problem, mend))
        found = buffer[:-_SLOTS].split([tensor.numel() for tensor in tensors])
        return [
            part.reshape(tensor.shape).to(tensor)
            for part, tensor in zip(found, tensors, strict=True)
        ]

    def agree(self, value: Any) -> Any:
        """Return the value that the first process has, anything that can be pickled."""
        held = [value]
        first = distributed.get_global_rank(self.group, 0)
        self._together(lambda: distributed.broadcast_object_list(held, first, group=self.group))
        return held[0]

    def first_gives(self, tensors: Sequence[Tensor], failure: BaseException | None) -> list[Tensor]:
        """Return the tensors that the first process has; others give zeros of the same shapes."""
        zeros = tensors if self.rank == 0 else [torch.zeros_like(tensor) for tensor in tensors]
        return self.sum(zeros, failure)

    def require_same(self, text: str, what: str) -> None:
        """Refuse what is not the same everywhere."""
        texts = self._gathered(text)
        for rank, other in enumerate(texts):
            if other != texts[0]:
                problem = f"{what} of rank {rank} are not those of rank 0"
                mend = "Broadcast them before, as DistributedDataParallel does"
                raise RankError(message(self._where, problem, mend))

    def all(self, answer: bool | None) -> bool:
        """Say whether all processes that have an answer say yes, and one at least has."""
        answers = [a for a in self._gathered(answer) if a is not None]
        return bool(answers) and all(answers)

    # ------------------------------------------------------------------------------- failures

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._together(lambda: distributed.all_gather_object(values, value, group=self.group))
        return values

    def _raise_together(self, own: BaseException | None) -> None:
        told = None if own is None else f"{type(own).__name__}: {own}"
        reasons = self._gathered(told)
        if own is not None:
            raise own
        failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
        problem = "; ".join(f"rank {rank} failed with {reason}" for rank, reason in failed.items())
        raise RankError(message(self._where, problem, "See the traceback of that process"))

    def _together(self, call: Callable[[], Any]) -> None:
        self._heartbeat.enter()
        try:
            call()
        except RuntimeError as error:
            ranks = distributed.get_process_group_ranks(self.group)
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            problem = f"{self._heartbeat.suspects(ranks)} ({reason})"
            mend = (
                "Every process must make the same calls, and end with an exception if it fails; "
                "init_process_group(timeout=...) says how long the others wait"
            )
            raise RankError(message(self._where, problem, mend)) from error


def mark_of(tensors: Sequence[Tensor]) -> float:
    """Return a number of order one by which vectors are told from others: the sum of entries over the norm."""
    total = squares = 0.0
    for tensor in tensors:
        if tensor.numel() and not tensor.is_complex():
            wide = tensor.detach().double()
            total += float(wide.sum())
            squares += float(wide.square().sum())
    if not (squares > 0 and math.isfinite(squares) and math.isfinite(total)):
        return 0.0
    return total / math.sqrt(squares)
