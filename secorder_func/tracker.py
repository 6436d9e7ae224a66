"""Curvature along training: loss, trace, top eigenvalues and a form, every few steps and within a budget of time."""

from __future__ import annotations

import json
import math
import operator
import os
import random
import sys
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
    CheckpointWarning,
    ConvergenceWarning,
    NonFiniteError,
    message,
    warn_user,
)
from secorder_func.nn import functional_loss
from secorder_func.operators import Batches, LinearOperator, hessian_operator
from secorder_func.operators.batch_reader import to_device
from secorder_func.operators.ranks import Ranks, agreed
from secorder_func.operators.value import value_and_gradient
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

    Examples
    --------
    >>> import torch
    >>> from secorder_func import CurvatureTracker
    >>> model, loss_fn = torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss
    >>> tracker = CurvatureTracker(model, loss_fn, (torch.ones(4, 1), torch.zeros(4, 1)))
    >>> record = tracker.step()
    >>> record.step, record.trace, record.eigenvalues
    (0, 2.0, [2.0])
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
        out. The first step is always recorded, so that the share holds from the second record on, as far as a record
        takes no longer than the one before. None for no limit.
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

    Raises
    ------
    TypeError, ValueError
        As for `functional_loss`; `data` is no batch; a count is below one, or the budget is not positive.

    Notes
    -----
    Nothing of the training is touched: neither parameters, gradients, buffers, optimizer nor the random generators of
    torch, Python and NumPy, so that it is the same bit for bit. Forward hooks of the model run when it is measured.
    Call `step` after `optimizer.step()`, inside or outside of autocast: records are in the dtype of the parameters.
    With gradient accumulation, call it once for each step of the optimizer.

    A record costs about `num_probes` forms (0.8 gradients of the data each), some ten products for each eigenvalue, and
    two gradients.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import CurvatureTracker
    >>> model = torch.nn.Linear(2, 1, bias=False)
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
    [2.0, 2.0, 2.0]
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
        functional_loss(model, loss_fn)  # refuses what is no model, now

        def point() -> tuple[LossFn, Tree]:
            return functional_loss(model, loss_fn)  # which parameters are free may change

        self._begin(None, point, data, every, budget, path)
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
        f: LossFn | None,
        point: Callable[[], tuple[LossFn, Tree]] | None,
        data: Any,
        every: int,
        budget: float | None,
        path: str | os.PathLike[str] | None,
    ) -> None:
        where = "CurvatureTracker"
        check_count(every, where, name="every")
        if budget is not None:
            check_positive(budget, where, name="budget")
            if not budget < 1:
                problem = f"budget must be a share of the time below one, or None, got {budget}"
                raise ArgumentError(message(where, problem, "0.1 is a tenth of it"))
        one = not isinstance(data, Batches)
        several = isinstance(data, list) and all(isinstance(part, (tuple, list)) for part in data)
        if one and (several or not isinstance(data, (tuple, list))):
            given = "a list of batches" if several else type(data).__name__
            problem = f"data must be a batch (inputs, targets), or Batches, got {given}"
            raise ArgumentTypeError(message(where, problem, "Pass Batches(data)"))
        self._f, self._model_point = f, point
        self._batch: tuple[Any, ...] | None = tuple(data) if one else None
        self._batches: Batches | None = None if one else data
        self._every, self._budget = every, budget
        self._path = None if path is None else Path(path).absolute()
        self.records: list[CurvatureRecord] = []
        self.skipped = 0
        self._calls, self._reached = 0, -1
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
        number = self._number(self._calls, step)
        self._calls += 1
        if number // self._every <= self._reached:
            return None
        self._reached = number // self._every
        if not agreed(self._ranks, self._affordable(now - self._began)):
            self.skipped += 1
            return None
        return self._recorded(*self._point(params), number)

    def record(self, params: Tree = None, *, step: int | None = None) -> CurvatureRecord:
        """Measure now, whatever the step and the budget; arguments as for `step`."""
        if self._began is None:
            self._began = time.perf_counter()
        return self._recorded(*self._point(params), self._number(max(0, self._calls - 1), step))

    @property
    def share(self) -> float:
        """Which share of the time since the first step records have taken."""
        if self._began is None:
            return 0.0
        return self._spent / max(time.perf_counter() - self._began, 1e-9)

    def _number(self, own: int, given: Any) -> int:
        if given is None:
            return own
        try:
            return operator.index(given)
        except TypeError:
            problem = f"step must be a whole number, got {given!r}"
            raise ArgumentTypeError(message("CurvatureTracker.step", problem)) from None

    def _point(self, params: Tree) -> tuple[LossFn, Tree]:
        """Return the loss and where it is measured."""
        given = params is not None
        if given == (self._model_point is not None):
            problem = "the tracker knows its model" if given else "params are missing"
            mend = "Call step()" if given else "A tracker of a function needs them: step(params)"
            raise ArgumentError(message("CurvatureTracker.step", problem, mend))
        if self._model_point is not None:
            f, params = self._model_point()
        else:
            assert self._f is not None
            f = self._f
        return f, tree.map(Tensor.detach, params)

    def _affordable(self, elapsed: float) -> bool:
        if self._budget is None or not self.records:
            return True
        return self._spent + self._last <= self._budget * (elapsed + self._last)

    @property
    def _ranks(self) -> Ranks | None:
        return None if self._batches is None else self._batches.ranks

    # ------------------------------------------------------------------------------- measuring

    def _recorded(self, f: LossFn, params: Tree, number: int) -> CurvatureRecord:
        leaves = tree.flatten(params)[0]
        _synchronize(leaves)
        begun = time.perf_counter()
        with _undisturbed(leaves, self._seed):
            found = self._measured(f, params)
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

    def _measured(self, f: LossFn, params: Tree) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(_NUMBERS)
        found |= {"eigenvalues": [], "residuals": []}
        loss, gradient = self._loss_and_gradient(f, params)
        norm = tree.norm(gradient)
        found |= {"loss": _finite(loss), "gradient_norm": _finite(norm)}
        if found["loss"] is None or found["gradient_norm"] is None:
            return {**found, "problem": "the loss or its gradient is not finite"}
        try:
            op = self._operator(f, params)
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
            self._eigenvectors = None
            found["problem"] = str(error)
        return found

    def _loss_and_gradient(self, f: LossFn, params: Tree) -> tuple[Tensor, Tree]:
        if self._batches is not None:
            return self._batches.loss_and_gradient(f, params)
        leaves, unflatten = tree.flatten(params)
        args = self._args(leaves)
        with RandomState.now(leaves).replayed():  # the operator draws the same
            value, gradient = value_and_gradient(f, params, args, "CurvatureTracker", gradient=True)
        return value, unflatten(gradient)

    def _operator(self, f: LossFn, params: Tree) -> LinearOperator:
        if self._batches is not None:
            return self._batches.hessian_operator(f, params)
        leaves = tree.flatten(params)[0]
        with RandomState.now(leaves).replayed():
            return hessian_operator(f, params, *self._args(leaves))

    def _args(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        assert self._batch is not None
        devices = {leaf.device for leaf in leaves}
        return to_device(self._batch, devices.pop() if len(devices) == 1 else None)

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
        if self._path is None or (self._ranks is not None and not self._ranks.is_first):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record), allow_nan=False) + "\n")
        except OSError as error:
            problem = f"the record could not be written ({error})"
            mend = "The training goes on; the records are in tracker.records"
            warn_user(message("CurvatureTracker", problem, mend), CheckpointWarning)

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
            "reached": self._reached,
            "skipped": self.skipped,
            "spent": self._spent,
            "last": self._last,
            "elapsed": elapsed,
            "records": [asdict(record) for record in self.records],
            "eigenvectors": None if found is None else tree.flatten(found)[0],
        }

    def load_state_dict(self, state: dict[str, Any], params: Tree = None) -> None:
        """Go on from a state; a tracker of a function needs the parameters to know their structure."""
        self._calls, self._reached = state["calls"], state["reached"]
        self.skipped, self._spent, self._last = state["skipped"], state["spent"], state["last"]
        self._began = time.perf_counter() - state["elapsed"] if state["calls"] else None
        self.records = [CurvatureRecord(**record) for record in state["records"]]
        self._eigenvectors = None
        vectors: Sequence[Tensor] | None = state["eigenvectors"]
        like = params if self._model_point is None else self._model_point()[1]
        if vectors is None or like is None:
            return
        leaves, unflatten = tree.flatten(like)
        if len(vectors) == len(leaves):  # else other parameters are free now
            pairs = zip(vectors, leaves, strict=True)
            self._eigenvectors = unflatten([vector.to(leaf.device) for vector, leaf in pairs])


_NUMBERS = ("loss", "gradient_norm", "trace", "trace_error", "form", "problem")
_TOLERANCE = 1e-2
"""Of the eigenvectors: eigenvalues are off by about the square of it."""


@contextmanager
def _undisturbed(leaves: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Compute inside as nobody else sees: with random numbers of its own, in the parameters' dtype, not watched."""
    with ExitStack() as stack:
        stack.enter_context(RandomState.seeded(seed, leaves).replayed())
        stack.enter_context(_other_generators())
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
    return all((v.shape[1:], v.dtype, v.device) == (p.shape, p.dtype, p.device) for v, p in pairs)


@contextmanager
def _other_generators() -> Iterator[None]:
    """Put back the generators of Python and of NumPy, which a model may draw from."""
    numpy: Any = sys.modules.get("numpy")
    python = random.getstate()
    arrays = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if arrays is not None:
            numpy.random.set_state(arrays)
