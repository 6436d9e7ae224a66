"""Curvature along training: loss, trace, top eigenvalues and a form, every few steps and within a budget of time."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from secorder_func import running, tree
from secorder_func.algorithms import eigsh, hutchinson_trace
from secorder_func.checks import check_callable, check_count, check_like, check_positive
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    NonFiniteError,
    message,
)
from secorder_func.nn import functional_loss
from secorder_func.operators import Batches, LinearOperator, hessian_operator
from secorder_func.rules.randomness import RandomState
from secorder_func.typing import LossFn, Tree

__all__ = ["CurvatureRecord", "CurvatureTracker"]

Direction: TypeAlias = Literal["gradient"] | Callable[[Tree], Tree] | None


@dataclass(frozen=True)
class CurvatureRecord:
    """What was measured after a step.

    Attributes
    ----------
    step
        How many steps were made before, by the tracker's count or the caller's.
    seconds
        Since the first step.
    loss, gradient_norm
        Of the tracker's data, at these parameters; None where a number is not finite.
    trace, trace_error
        Of the Hessian: the estimate and its standard error.
    eigenvalues, residuals
        The algebraically largest, descending, and how far off each may be.
    form
        `v . H v / v . v` of the chosen direction; None without one.
    cost
        The seconds that this record took.
    share
        Which share of the time since the first step all records have taken, this one included.
    problem
        Why numbers are missing, if they are.
    """

    step: int
    seconds: float
    loss: float | None
    gradient_norm: float | None
    trace: float | None
    trace_error: float | None
    eigenvalues: list[float]
    residuals: list[float]
    form: float | None
    cost: float
    share: float
    problem: str | None = None


class CurvatureTracker:
    """Measures the Hessian of a loss every few steps of a training, which goes on as if it did not.

    Parameters
    ----------
    model, loss_fn
        As for `functional_loss`; the model that is trained, in whatever wrapper. Its present mode counts.
    data
        On which the loss is measured, the same whenever it is: a batch `(inputs, targets)`, or `Batches`. With
        `Batches(..., group=True)` every process has a share of them, all call `step`, and the first one writes.
    every
        Steps between two records.
    budget
        Which share of the time records may take. One that would exceed it, going by what the last one took, is left
        out. The first step is always recorded, so that the share holds from the second record on. None for no limit.
    path
        A file to which every record is appended as a line of JSON, at once.
    num_probes
        Of the trace, the same at every record, so that its curve is smooth.
    num_eigenvalues
        How many; each search begins with the eigenvectors that the last one found. 0 for none.
    direction
        Of which to record `v . H v / v . v`: `"gradient"`, or a function from the parameters to a tree like them.
    seed
        Of the probes, and of what the loss draws at random (dropout) when it is measured.

    Attributes
    ----------
    records
        All records, in order.
    skipped
        How many were left out to stay within the budget.

    Notes
    -----
    Nothing of the training is touched: neither parameters, gradients, buffers, optimizer nor any random generator, so
    that it is the same bit for bit. Call `step` after `optimizer.step()`, inside or outside of autocast: records are in
    the dtype of the parameters. With gradient accumulation, call it once for each step of the optimizer.

    A record costs about `num_probes` forms (0.8 gradients of the data each), some ten products for each eigenvalue, and
    two gradients.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import CurvatureTracker
    >>> model = torch.nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.zeros(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> tracker = CurvatureTracker(model, torch.nn.functional.mse_loss, (x, y), every=10, budget=None)
    >>> for _ in range(21):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x), y).backward()
    ...     optimizer.step()
    ...     record = tracker.step()
    >>> [record.step for record in tracker.records]
    [0, 10, 20]
    >>> [round(record.trace, 4) for record in tracker.records]
    [4.0, 4.0, 4.0]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        every: int = 100,
        budget: float | None = 0.1,
        path: str | os.PathLike[str] | None = None,
        num_probes: int = 8,
        num_eigenvalues: int = 1,
        direction: Direction = None,
        seed: int = 0,
    ) -> None:
        f, _ = functional_loss(model, loss_fn)

        def params() -> Tree:
            return functional_loss(model, loss_fn)[1]

        self._begin(f, params, data, every, budget, path)
        self._measure(num_probes, num_eigenvalues, direction, seed)

    @classmethod
    def of_function(
        cls,
        f: LossFn,
        data: Any,
        *,
        every: int = 100,
        budget: float | None = 0.1,
        path: str | os.PathLike[str] | None = None,
        num_probes: int = 8,
        num_eigenvalues: int = 1,
        direction: Direction = None,
        seed: int = 0,
    ) -> CurvatureTracker:
        """Return a tracker of `f(params, *batch)`, whose `step` is given the parameters; else as the class."""
        check_callable(f, "CurvatureTracker.of_function")
        self = cls.__new__(cls)
        self._begin(f, None, data, every, budget, path)
        self._measure(num_probes, num_eigenvalues, direction, seed)
        return self

    def _begin(
        self,
        f: LossFn,
        params: Callable[[], Tree] | None,
        data: Any,
        every: int,
        budget: float | None,
        path: str | os.PathLike[str] | None,
    ) -> None:
        where = "CurvatureTracker"
        check_count(every, where, name="every")
        if budget is not None:
            check_positive(budget, where, name="budget")
        one = not isinstance(data, Batches)
        if one and not isinstance(data, (tuple, list)):
            problem = (
                f"data must be a batch (inputs, targets), or Batches, got {type(data).__name__}"
            )
            raise ArgumentTypeError(message(where, problem, "Pass Batches(loader) for a loader"))
        self._f, self._params = f, params
        self._batch = tuple(data) if one else None
        self._batches = (
            Batches([tuple(data)], reduction="sum", check_weights=False) if one else data
        )
        self._every, self._budget = every, budget
        self._path = None if path is None else Path(path).absolute()
        self.records: list[CurvatureRecord] = []
        self.skipped = 0
        self._calls = 0
        self._began: float | None = None
        self._spent = self._last = 0.0

    def _measure(
        self, num_probes: int, num_eigenvalues: int, direction: Direction, seed: int
    ) -> None:
        where = "CurvatureTracker"
        check_count(num_probes, where, name="num_probes")
        if num_eigenvalues:
            check_count(num_eigenvalues, where, name="num_eigenvalues")
        if direction not in (None, "gradient") and not callable(direction):
            problem = (
                f"direction must be 'gradient' or a function of the parameters, got {direction!r}"
            )
            raise ArgumentTypeError(message(where, problem))
        self._num_probes, self._num_eigenvalues = num_probes, num_eigenvalues
        self._direction, self._seed = direction, seed
        self._eigenvectors: Tree | None = None

    # -------------------------------------------------------------------------------- stepping

    def step(self, params: Tree = None, *, step: int | None = None) -> CurvatureRecord | None:
        """Count a step, and return what was measured after it, None if nothing was.

        Parameters
        ----------
        params
            Of a tracker of a function: where it is.
        step
            The caller's count of steps, to be stored, and to go by for `every`; the tracker's own if None.
        """
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        number = self._calls if step is None else step
        self._calls += 1
        if number % self._every or not self._agreed(self._affordable(now - self._began)):
            return None
        return self._recorded(self._point(params), number)

    def record(self, params: Tree = None, *, step: int | None = None) -> CurvatureRecord:
        """Measure now, whatever the step and the budget; arguments as for `step`."""
        if self._began is None:
            self._began = time.perf_counter()
        number = max(0, self._calls - 1) if step is None else step
        return self._recorded(self._point(params), number)

    @property
    def share(self) -> float:
        """Which share of the time since the first step records have taken."""
        if self._began is None:
            return 0.0
        return self._spent / max(time.perf_counter() - self._began, 1e-9)

    def _point(self, params: Tree) -> Tree:
        given = params is not None
        if given == (self._params is not None):
            problem = "the tracker knows its model" if given else "params are missing"
            mend = "Call step()" if given else "A tracker of a function needs them: step(params)"
            raise ArgumentError(message("CurvatureTracker.step", problem, mend))
        return tree.map(Tensor.detach, params if self._params is None else self._params())

    def _affordable(self, elapsed: float) -> bool:
        if self._budget is None or not self.records:
            return True
        within = self._spent + self._last <= self._budget * (elapsed + self._last)
        self.skipped += not within
        return within

    def _agreed(self, answer: bool) -> bool:
        ranks = self._batches.ranks
        return answer if ranks is None else bool(ranks.agree(answer))

    # ------------------------------------------------------------------------------- measuring

    def _recorded(self, params: Tree, number: int) -> CurvatureRecord:
        leaves = tree.flatten(params)[0]
        _synchronize(leaves)
        begun = time.perf_counter()
        with _undisturbed(leaves, self._seed):
            found = self._measured(params)
        _synchronize(leaves)
        ended = time.perf_counter()
        assert self._began is not None
        self._last = ended - begun
        self._spent += self._last
        elapsed = ended - self._began
        record = CurvatureRecord(
            step=number,
            seconds=elapsed,
            cost=self._last,
            share=self._spent / max(elapsed, 1e-9),
            **found,
        )
        self.records.append(record)
        self._write(record)
        return record

    def _measured(self, params: Tree) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(_NUMBERS)
        found |= {"eigenvalues": [], "residuals": []}
        loss, gradient = self._batches.loss_and_gradient(self._f, params)
        norm = tree.norm(gradient)
        found |= {"loss": _finite(loss), "gradient_norm": _finite(norm)}
        if found["loss"] is None or found["gradient_norm"] is None:
            return {**found, "problem": "the loss or its gradient is not finite"}
        try:
            op = self._operator(params)
            generator = torch.Generator().manual_seed(self._seed)
            trace = hutchinson_trace(op, self._num_probes, generator=generator)
            found |= {
                "trace": _finite(trace.value),
                "trace_error": _finite(trace.standard_error),
                "form": self._form(op, params, gradient),
            }
            if self._num_eigenvalues:
                found |= self._searched(op, generator)
        except NonFiniteError as error:
            found["problem"] = str(error)
        return found

    def _operator(self, params: Tree) -> LinearOperator:
        if self._batch is None:
            return self._batches.hessian_operator(self._f, params)
        return hessian_operator(self._f, params, *self._batch)

    def _form(self, op: LinearOperator, params: Tree, gradient: Tree) -> float | None:
        if self._direction is None:
            return None
        v = gradient
        if callable(self._direction):
            v = self._direction(params)
            check_like(v, params, "CurvatureTracker", name="direction(params)")
        size = tree.dot(v, v)
        if not float(size):
            return None
        one = tree.map(lambda leaf: leaf.unsqueeze(0), v)
        return _finite(op.quadratic_forms(one)[0] / size)

    def _searched(self, op: LinearOperator, generator: torch.Generator) -> dict[str, Any]:
        before = self._eigenvectors
        if before is not None and not _fits(before, op.like):
            before = None
        k = min(self._num_eigenvalues, op.shape[0])
        pairs = eigsh(
            op, k, rtol=_TOLERANCE, max_matvecs=10 * k + 20, v0=before, generator=generator
        )
        self._eigenvectors = pairs.eigenvectors
        return {
            "eigenvalues": pairs.eigenvalues.tolist(),
            "residuals": pairs.residual_norms.tolist(),
        }

    # ---------------------------------------------------------------------------------- files

    def _write(self, record: CurvatureRecord) -> None:
        ranks = self._batches.ranks
        if self._path is None or (ranks is not None and ranks.rank != 0):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), allow_nan=False) + "\n")

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[CurvatureRecord]:
        """Return the records of a file, also of one that is being written: half a last line is left out."""
        records = []
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines):
            if not line.endswith("\n") and number == len(lines) - 1:
                break
            try:
                records.append(CurvatureRecord(**json.loads(line)))
            except (ValueError, TypeError) as error:
                problem = f"line {number + 1} of {path} is no record ({error})"
                raise ArgumentError(message("CurvatureTracker.read", problem)) from error
        return records

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on in another process: counts, and eigenvectors."""
        found = self._eigenvectors
        elapsed = 0.0 if self._began is None else time.perf_counter() - self._began
        return {
            "calls": self._calls,
            "skipped": self.skipped,
            "spent": self._spent,
            "last": self._last,
            "elapsed": elapsed,
            "records": [asdict(record) for record in self.records],
            "eigenvectors": None if found is None else tree.flatten(found)[0],
        }

    def load_state_dict(self, state: dict[str, Any], params: Tree = None) -> None:
        """Go on from a state; a tracker of a function needs the parameters to know their structure."""
        self._calls, self.skipped = state["calls"], state["skipped"]
        self._spent, self._last = state["spent"], state["last"]
        self._began = time.perf_counter() - state["elapsed"]
        self.records = [CurvatureRecord(**record) for record in state["records"]]
        vectors: Sequence[Tensor] | None = state["eigenvectors"]
        like = params if self._params is None else self._params()
        if vectors is not None and like is not None:
            self._eigenvectors = tree.flatten(like)[1](vectors)


_NUMBERS = ("loss", "gradient_norm", "trace", "trace_error", "form", "problem")
_TOLERANCE = 1e-2
"""Of the eigenvectors: eigenvalues are off by about the square of it."""


@contextmanager
def _undisturbed(leaves: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Compute inside as nobody else sees: with random numbers of its own, in the parameters' dtype, not watched."""
    with ExitStack() as stack:
        stack.enter_context(RandomState.seeded(seed, leaves).replayed())
        for kind in {"cpu", *(leaf.device.type for leaf in leaves)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(running.unwatched())
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ConvergenceWarning)  # residuals say how far off they are
        yield


def _synchronize(leaves: Sequence[Tensor]) -> None:
    """Wait for devices that work by themselves, so that what is timed is what was asked for."""
    for device in {leaf.device for leaf in leaves}:
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).synchronize(device)


def _finite(number: Tensor) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


def _fits(vectors: Tree, like: Tree) -> bool:
    """Say whether stacked vectors are of a space."""
    if tree.structure(vectors) != tree.structure(like):
        return False
    pairs = zip(tree.flatten(vectors)[0], tree.flatten(like)[0], strict=True)
    return all(v.shape[1:] == p.shape and v.dtype == p.dtype for v, p in pairs)
