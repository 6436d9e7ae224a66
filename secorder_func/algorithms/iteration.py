"""Iterations for several right-hand sides side by side, each of which ends on its own."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

from secorder_func import running
from secorder_func.algorithms.linear_system import LinearSystem

__all__ = ["Direction", "End", "Iteration", "run"]

_LOOK_EVERY = 8

Direction: TypeAlias = tuple[Tensor, float]
"""A direction of curvature that is not positive, `(n,)`, and the curvature."""


class End(IntEnum):
    """Why the iteration of a right-hand side ended."""

    NOT_YET = 0
    CONVERGED = 1
    CURVATURE = 2
    """A direction of curvature that is not positive."""
    SINGULAR = 3
    """What is left of `b` is outside the range of the matrix."""
    NOT_FINITE = 4
    BAD_PRECONDITIONER = 5
    SPENT = 6
    ROUNDING = 7
    """The recurrence converged, the true residual did not, and starting from it again did not help."""
    CANCELLED = 8


class Iteration:
    """Steps from `x = 0` towards `A x = r` for unit vectors `r`, the rows of a tensor that may be overwritten.

    Every attribute that is a tensor has one row a right-hand side. A row that has ended must stay as it is, so that it
    does not matter when that is seen.

    Attributes
    ----------
    x
        The iterates, `(k, n)`.
    goal
        How large the residuals may be, `(k,)`.
    end
        Why each row ended, `(k,)`, as an `End`; 0 while it goes on.
    """

    def __init__(self, system: LinearSystem, r: Tensor, goal: Tensor) -> None:
        self.system = system
        self.x = torch.zeros_like(r)
        self.goal = goal
        self.end = torch.zeros(len(r), dtype=torch.int8, device=r.device)
        self._products = torch.empty_like(r)

    def step(self) -> None:
        """Take one step, one product a row."""
        raise NotImplementedError

    def direction(self, row: int) -> Direction:
        """Return the last direction of a row that ended by its curvature."""
        raise NotImplementedError

    def mark(self, condition: Tensor, end: End) -> None:
        """Note why rows end that have not ended before."""
        self.end.masked_fill_(condition & (self.end == 0), int(end))

    def dots(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the inner products of rows, `(k,)`; summed pairwise, which `torch.dot` does not."""
        return torch.mul(x, y, out=self._products).sum(1)

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.x.device)
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value[index])


def run(iteration: Iteration, steps: int) -> tuple[Tensor, list[End], dict[int, Direction], int]:
    """Take steps until all rows have ended.

    Rows that have are taken out of the iteration, so that no product is made with them.

    Returns
    -------
    The last iterates, why each row ended (`NOT_YET` where the steps were used up), directions of curvature that is not
    positive, by row, and the number of steps.
    """
    count = len(iteration.goal)
    period = _steps_between_looks(iteration.x.device)
    rows = list(range(count))  # those of the iteration
    order: list[int] = []
    parts: list[Tensor] = []
    ends, directions, taken = [End.NOT_YET] * count, {}, 0
    while rows:
        try:
            iteration.step()
            running.further(1)
        except running.Cancelled:  # in the middle of a product, before which nothing has changed
            if not running.only_outermost():
                raise
            iteration.end.fill_(int(End.CANCELLED))
            steps = taken
        else:
            taken += 1
        if taken % period and taken < steps:
            continue
        now = [End(code) for code in iteration.end.tolist()]
        if End.NOT_FINITE in now:
            iteration.system.refuse_values()
        if End.BAD_PRECONDITIONER in now:
            iteration.system.refuse_preconditioner()
        gone = [i for i, end in enumerate(now) if end != End.NOT_YET or taken == steps]
        if not gone:
            continue
        parts.append(iteration.x if len(gone) == count else iteration.x[gone])
        order += [rows[i] for i in gone]
        for i in gone:
            ends[rows[i]] = now[i]
            if now[i] == End.CURVATURE:
                directions[rows[i]] = iteration.direction(i)
        going = [i for i in range(len(rows)) if i not in set(gone)]
        rows = [rows[i] for i in going]
        iteration.keep(going)
    if len(parts) == 1:
        return parts[0], ends, directions, taken
    places = torch.tensor(order, device=iteration.x.device).argsort()
    return torch.cat(parts)[places], ends, directions, taken


def _steps_between_looks(device: torch.device) -> int:
    """Return after how many steps to look at who has ended: a look waits for a device that works by itself."""
    return 1 if device.type == "cpu" else _LOOK_EVERY
