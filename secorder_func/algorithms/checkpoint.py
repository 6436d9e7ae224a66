"""Files from which an interrupted computation goes on, to the numbers of one that was not."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.files import write_whole
from secorder_func.algorithms.probes import normal
from secorder_func.checks import check_tolerance
from secorder_func.digest import digest
from secorder_func.errors import (
    ArgumentTypeError,
    CheckpointError,
    CheckpointWarning,
    message,
    warn_user,
)
from secorder_func.operators import LinearOperator, PerSampleOperator
from secorder_func.operators.outside import refuse_transforms
from secorder_func.operators.ranks import Ranks
from secorder_func.version import __version__

__all__ = ["Checkpoint", "CheckpointLike", "keeping"]

_FORMAT = 1
_PARTS = {"format", "same", "product", "state", "pass", "learned", "digest"}


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
    a pass; batches that were done are read, compared with what they were, and not computed again. No derivative of the
    result is recorded.

    Of several processes with an operator together the first one writes and reads the file, and a pass that was
    interrupted is made again.

    A file of another function, operator, setting, version of this package or of torch is refused with the reason, and
    so is a damaged one (`CheckpointError`). The operator is known by one product, of data sets with the first batch
    only. A file that can no longer be written is a `CheckpointWarning`, and the computation goes on.

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
        self.path = Path(path).absolute()
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
        yield
        return
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    refuse_transforms(where)
    with torch.no_grad():
        keeper = _Keeper(checkpoint, op, where, settings)
        with running.watched(keeper):
            yield
    if not keeper.stopped:  # else it has been written, with the pass that was cut short
        keeper.write(None)


class _Keeper(running.Watcher):
    """Writes the state of the first task that it sees, and of a pass over data inside of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        op: LinearOperator | PerSampleOperator,
        where: str,
        settings: dict[str, Any],
    ) -> None:
        self._path, self._seconds = checkpoint.path, 60 * checkpoint.minutes
        self._part = self._path.with_name(f"{self._path.name}.part")
        self._op, self._ranks, self._where = op, op.ranks, where
        self._same = {
            "version of secorder_func": __version__,
            "version of torch": str(torch.__version__),
            "function": where,
            **settings,
            **_space(op),
        }
        self._product: list[Tensor] = []
        self._task: running.Task | None = None
        self._passes: dict[str, int] = {}  # since the state of the task has changed
        self._state: Any = None
        self._pass: Any = None
        self.stopped = False
        content = self._content() if self._ranks is None else _agreed(self._ranks, self._content)
        if content is not None:
            self._state, self._pass = content["state"], content["pass"]
            op.learned.clear()
            op.learned.update(content["learned"])
        self._written = time.monotonic()

    # ------------------------------------------------------------------------ as a watcher

    def begun(self, task: running.Task, /) -> None:
        if self._task is None:
            self._task, task.resumed, task.kept = task, self._state, True
        elif self._is_pass(task):
            number = self._passes[task.detail] = self._passes.get(task.detail, 0) + 1
            task.kept = True
            if self._pass is not None and self._pass["number"] == [task.detail, number]:
                task.resumed, self._pass = self._pass["state"], None

    def advanced(self, task: running.Task, /) -> None:
        if task is self._task:
            self._passes, self._pass = {}, None
        elif not self._is_pass(task):
            return
        if time.monotonic() - self._written >= self._seconds:
            self.write(task)

    def cancelled(self, task: running.Task, /) -> None:
        if not self.stopped and (task is self._task or self._is_pass(task)):
            self.stopped = True
            self.write(task)

    def _is_pass(self, task: running.Task) -> bool:
        """Say whether it is a pass; of several processes each has a part of the sums, and none is kept."""
        inside = task.parent is not None and task.parent is self._task
        return inside and task.state is not None and self._ranks is None

    # ------------------------------------------------------------------------------ the file

    def write(self, task: running.Task | None) -> None:
        """Write the state; that of a pass, too, if that is where the computation is."""
        if self._task is None or self._task.state is None:
            return
        if self._ranks is not None and not self._ranks.is_first:
            return  # all have the same state
        within = None
        if task is not None and task is not self._task and task.state is not None:
            number = [task.detail, self._passes[task.detail]]
            within = {"number": number, "state": task.state()}
        content = {
            "format": _FORMAT,
            "same": self._same,
            "product": self._product,
            "state": self._task.state(),
            "pass": within,
            "learned": copy.deepcopy(self._op.learned),
        }
        content["digest"] = digest(content)
        try:
            write_whole(content, self._path, self._part)
        except OSError as error:
            problem = f"the checkpoint could not be written ({error})"
            mend = "The computation goes on; if it is interrupted, it begins with the last one that was"
            warn_user(message(self._where, problem, mend), CheckpointWarning)
        self._written = time.monotonic()

    def _content(self) -> dict[str, Any] | None:
        """Return what is in the file, None if there is none and one can be written."""
        self._product = _product(self._op)
        if self._path.exists():
            return self._read()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part.touch()  # fails now, rather than after hours
        self._part.unlink()
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
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            raise self._refusal("it is the file of something else")
        if content["format"] != _FORMAT:
            given = content["format"]
            raise self._refusal(f"it is of format {given}, this version writes {_FORMAT}")
        found = content.pop("digest", None)
        if found != digest(content) or content.keys() | {"digest"} != _PARTS:
            raise self._refusal("it is damaged: its content is not what was written")
        theirs = content["same"]
        for name, ours in self._same.items():
            if theirs.get(name) != ours:
                problem = f"its {name} is {theirs.get(name)!r}, here it is {ours!r}"
                if name == "seed":
                    problem += "; the generator must be where it was at the first call"
                raise self._refusal(problem)
        self._require_same_product(content["product"])
        return content

    def _require_same_product(self, theirs: list[Any]) -> None:
        leaves, names = tree.flatten(self._op.like)[0], tree.names(self._op.like)
        for name, leaf, before, now in zip(names, leaves, theirs, self._product, strict=True):
            most = _ROUNDINGS * torch.finfo(leaf.dtype).eps * float(before.nan_to_num().abs().max())
            if not bool(torch.isclose(now, before, rtol=0, atol=most, equal_nan=True).all()):
                problem = (
                    f"its operator is another one: a product differs in {name or 'its entries'!r}"
                )
                mend = (
                    "Give it the same parameters, data and loss (a loader that shuffles needs the same "
                    "torch.manual_seed before), or remove the file to begin anew"
                )
                raise self._refusal(problem, mend)

    def _refusal(self, problem: str, mend: str = "") -> CheckpointError:
        mend = mend or "Continue with what it was made with, or remove the file to begin anew"
        problem = f"cannot go on from {self._path}: {problem}"
        return CheckpointError(message(self._where, problem, mend))


def _agreed(ranks: Ranks, read: Callable[[], Any]) -> Any:
    """Return what the first process reads; raise everywhere what that raises."""
    content = failure = None
    if ranks.is_first:
        try:
            content = read()
        except Exception as error:
            failure = error
    content, failure = ranks.agree((content, failure))
    if failure is not None:
        raise failure
    return content


def _space(op: LinearOperator | PerSampleOperator) -> dict[str, Any]:
    leaves = tree.flatten(op.like)[0]
    return {
        "names of parameters": tree.names(op.like),
        "shapes": [list(leaf.shape) for leaf in leaves],
        "dtypes": [str(leaf.dtype) for leaf in leaves],
        "devices": [str(leaf.device) for leaf in leaves],
        "number of samples": list(op.batch_shape),
    }


def _product(op: LinearOperator | PerSampleOperator) -> list[Tensor]:
    """Return a product leaf by leaf: its norm, and what is seen of it along a few random directions."""
    like = op if isinstance(op, PerSampleOperator) or op.witness is None else op.witness
    vectors = tree.unstack(normal(_SEED, range(_DIRECTIONS + 1), op.like))
    devices = {leaf.device for leaf in tree.flatten(op.like)[0] if leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        product = tree.flatten(like @ vectors[0])[0]
    found = []
    for leaf, *directions in zip(product, *(tree.flatten(v)[0] for v in vectors[1:]), strict=True):
        wide = leaf.double()
        seen = [torch.linalg.vector_norm(wide), *((wide * u.double()).sum() for u in directions)]
        found.append(torch.stack(seen).cpu())
    return found


_SEED, _DIRECTIONS = 0x5EC0DE, 4
_ROUNDINGS = 64
"""By how many roundings a product with the same operator may differ, in another process."""
