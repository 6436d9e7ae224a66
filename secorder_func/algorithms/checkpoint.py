"""Files from which an interrupted computation goes on, to the numbers of one that was not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch

from secorder_func import running, tree
from secorder_func.algorithms.files import write_whole
from secorder_func.algorithms.probes import normal
from secorder_func.checks import check_tolerance
from secorder_func.digest import digest
from secorder_func.errors import ArgumentTypeError, CheckpointError, message
from secorder_func.operators import LinearOperator, PerSampleOperator
from secorder_func.operators.ranks import Ranks
from secorder_func.version import __version__

__all__ = ["Checkpoint", "CheckpointLike", "keeping"]

_FORMAT = 1
_CLOSE = 1e-3
"""By how much a product with the same operator may differ in another process, by rounding."""


class Checkpoint:
    """A file in which a long computation is kept while it runs, and from which it goes on if it was interrupted.

    Parameters
    ----------
    path
        The file. It is written whole or not at all, and only ever read as data (`weights_only=True`). At the end it
        holds the result, so that the same call returns at once; remove it when it is no longer wanted. One file belongs
        to one call.
    minutes
        How often it is written: no more than the work of so many minutes is lost.

    Notes
    -----
    Given as `checkpoint=` to an estimator, `eigsh` or `spectral_density`; a path alone is a checkpoint every five
    minutes. An interrupted call, made again with the same arguments on the same machine, ends with the numbers of an
    uninterrupted one, bit for bit, as far as torch computes the same twice. Over `Batches` it goes on in the middle of
    a pass; batches that were done are read, compared with what they were, and not computed again.

    Of several processes with an operator together the first one writes and reads the file, and a pass that was
    interrupted is made again.

    A file of another function, operator, setting, version of this package or of torch is refused with the reason, and
    so is a damaged one. The operator is known by one product, of data sets with the first batch only.

    Examples
    --------
    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from secorder_func import Checkpoint, LinearOperator, hutchinson_trace
    >>> op = LinearOperator(lambda v: 2 * v, like=torch.zeros(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = Checkpoint(Path(folder) / "trace.pt", minutes=1)
    ...     print(hutchinson_trace(op, 8, checkpoint=kept))
    6 ± 0 (8 products)
    """

    def __init__(self, path: str | os.PathLike[str], *, minutes: float = 5.0) -> None:
        given: Any = path
        if not isinstance(given, (str, os.PathLike)):
            problem = f"path must be the name of a file, got {type(given).__name__}"
            raise ArgumentTypeError(message("Checkpoint", problem))
        check_tolerance(minutes, "Checkpoint", name="minutes")
        self.path = Path(path)
        self.minutes = float(minutes)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, minutes={self.minutes:g})"


CheckpointLike: TypeAlias = "Checkpoint | str | os.PathLike[str] | None"


@contextmanager
def keeping(
    checkpoint: CheckpointLike,
    op: LinearOperator | PerSampleOperator,
    where: str,
    settings: dict[str, Any],
) -> Iterator[None]:
    """Keep the task that is begun inside, and hand it the state of an interrupted run if there is one.

    Parameters
    ----------
    checkpoint
        Where; None for nowhere.
    op
        The operator, by which the problem is known.
    where
        The public function.
    settings
        What the numbers depend on: numbers, strings, None.
    """
    if checkpoint is None:
        with nullcontext():
            yield
        return
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    keeper = _Keeper(checkpoint, {"function": where, **settings}, _problem(op), where, op.ranks)
    with running.watched(keeper):
        yield
    if not keeper.stopped:  # else it has been written, with the pass that was cut short
        keeper.write(None)


class _Keeper:
    """Writes the state of the first task that it sees, and of a pass over data inside of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: dict[str, Any],
        problem: dict[str, Any],
        where: str,
        ranks: Ranks | None,
    ) -> None:
        self._path, self._seconds = checkpoint.path, 60 * checkpoint.minutes
        self._same = {
            "version of secorder_func": __version__,
            "version of torch": str(torch.__version__),
            **settings,
            **problem,
        }
        self._where = where
        self.stopped = False
        self._task: running.Task | None = None
        self._passes = 0  # since the state of the task has changed
        self._state: Any = None
        self._pass: Any = None
        self._ranks = ranks
        content = self._content() if ranks is None else _agreed(ranks, self._content)
        if content is not None:
            self._state, self._pass = content["state"], content["pass"]
        self._written = time.monotonic()

    # ------------------------------------------------------------------------ as a watcher

    def begun(self, task: running.Task, /) -> None:
        if self._task is None:
            self._task, task.resumed, task.kept = task, self._state, True
        elif task.parent is self._task and task.state is not None:
            self._passes += 1
            # Of several processes each has a part of the sums: such a pass is made again.
            task.kept = self._ranks is None
            if self._pass is not None and self._passes == self._pass["number"]:
                task.resumed, self._pass = self._pass["state"], None

    def advanced(self, task: running.Task, /) -> None:
        if task is self._task:
            self._passes, self._pass = 0, None
        if task.kept and time.monotonic() - self._written >= self._seconds:
            self.write(task)

    def cancelled(self, task: running.Task, /) -> None:
        if task.kept and not self.stopped:
            self.stopped = True
            self.write(task)

    def ended(self, task: running.Task, /) -> None:
        pass

    # ------------------------------------------------------------------------------ the file

    def write(self, task: running.Task | None) -> None:
        """Write the state; that of a pass, too, if that is where the computation is."""
        if self._task is None or self._task.state is None:
            return
        if self._ranks is not None and self._ranks.rank != 0:
            return  # all have the same state
        within = None
        if task is not None and task is not self._task and task.state is not None:
            within = {"number": self._passes, "state": task.state()}
        content = {
            "format": _FORMAT,
            "same": self._same,
            "state": self._task.state(),
            "pass": within,
        }
        content["digest"] = digest(content)
        write_whole(content, self._path, self._path.with_name(f"{self._path.name}.part"))
        self._written = time.monotonic()

    def _content(self) -> dict[str, Any] | None:
        """Return what is in the file, None if there is none, and a folder for it then."""
        if self._path.exists():
            return self._read()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return None

    def _read(self) -> dict[str, Any]:
        """Return what is in the file; refuse what is damaged, and what belongs to something else."""
        try:
            content: Any = torch.load(self._path, weights_only=True)
        except OSError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise self._refusal(f"it is damaged, or no checkpoint ({reason})") from error
        if not isinstance(content, dict) or "format" not in content:
            raise self._refusal("it is the file of something else")
        if content["format"] != _FORMAT:
            given = content["format"]
            raise self._refusal(f"it is of format {given}, this version writes {_FORMAT}")
        found = content.pop("digest", None)
        if found != digest(content):
            raise self._refusal("it is damaged: its content is not what was written")
        theirs = content["same"]
        for name, ours in self._same.items():
            if not _alike(theirs.get(name), ours):
                raise self._refusal(f"its {name} is {theirs.get(name)!r}, here it is {ours!r}")
        return content

    def _refusal(self, problem: str) -> CheckpointError:
        mend = "Continue with what it was made with, or remove the file to begin anew"
        return CheckpointError(
            message(self._where, f"cannot go on from {self._path}: {problem}", mend)
        )


def _agreed(ranks: Ranks, read: Callable[[], Any]) -> Any:
    """Return what the first process reads; raise everywhere what that raises."""
    content = failure = None
    if ranks.rank == 0:
        try:
            content = read()
        except (OSError, CheckpointError) as error:
            failure = error
    content, failure = ranks.agree((content, failure))
    if failure is not None:
        raise failure
    return content


def _alike(theirs: Any, ours: Any) -> bool:
    numbers = isinstance(ours, list) and ours and all(type(x) is float for x in ours)
    if numbers and isinstance(theirs, list) and len(theirs) == len(ours):
        most = _CLOSE * max(map(abs, ours))
        return all(abs(a - b) <= most for a, b in zip(theirs, ours, strict=True))
    return bool(theirs == ours)


def _problem(op: LinearOperator | PerSampleOperator) -> dict[str, Any]:
    """Return by what a problem is known: its space, and one product, seen along a few random directions."""
    leaves = tree.flatten(op.like)[0]
    like = op if isinstance(op, PerSampleOperator) or op.witness is None else op.witness
    vectors = tree.unstack(normal(_SEED, range(_DIRECTIONS + 1), op.like))
    with torch.no_grad():
        product = tree.flatten(like @ vectors[0])[0]
    seen = [float(sum(t.double().square().sum().cpu() for t in product)) ** 0.5]
    for direction in vectors[1:]:
        parts = zip(product, tree.flatten(direction)[0], strict=True)
        seen.append(float(sum((t.double() * u.double()).sum().cpu() for t, u in parts)))
    return {
        "names of parameters": tree.names(op.like),
        "shapes": [list(leaf.shape) for leaf in leaves],
        "dtypes": [str(leaf.dtype) for leaf in leaves],
        "number of samples": list(op.batch_shape),
        "product with a vector": seen,
    }


_SEED, _DIRECTIONS = 0x5EC0DE, 4
