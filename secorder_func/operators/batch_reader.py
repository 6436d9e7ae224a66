"""Reading a data set in batches, the same whenever it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_sums import Args
from secorder_func.rules.randomness import RandomState

__all__ = ["BatchReader", "to_device"]

_END = object()


class BatchReader:
    """Gives the batches of a data set with the random numbers of the moment at which it was made.

    Parameters
    ----------
    data, prepare
        As for `Batches`.
    where
        The public class, for messages.
    """

    def __init__(self, data: Any, prepare: Callable[[Any], Any] | None, where: str) -> None:
        if isinstance(data, Tensor):
            problem = "data must give batches, got a tensor"
            raise ArgumentTypeError(
                message(where, problem, "Pass [(inputs, targets)] for one batch")
            )
        if not isinstance(data, Iterable):
            problem = f"data must be iterable, got {type(data).__name__}"
            raise ArgumentTypeError(
                message(where, problem, "Pass a DataLoader or a list of batches")
            )
        if isinstance(data, Iterator):
            problem = f"data must be the same whenever they are read, got {type(data).__name__}, which can be read once"
            raise ArgumentTypeError(
                message(where, problem, "Pass a list, or the DataLoader itself")
            )
        if getattr(data, "persistent_workers", False):
            problem = "persistent workers go on with other random numbers at every pass"
            mend = "Make the DataLoader with persistent_workers=False"
            raise ArgumentError(message(where, problem, mend))
        self._data, self._prepare, self._where = data, prepare, where
        self._generators = _generators_of(data)
        self._states = [generator.get_state() for generator in self._generators]
        self._random = RandomState.now([])

    @property
    def length(self) -> int | None:
        """How many batches there are, None if that is not known before."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:  # an iterable data set behind a loader
            return None

    def read(self, device: torch.device | None, /) -> Iterator[Args]:
        """Yield the batches, their tensors on a device, if one is given."""
        stream = _Stream(self._random, self._generators, self._states)
        with stream.drawn():
            iterator = iter(self._data)
        while True:
            with stream.drawn():
                batch = next(iterator, _END)
                if batch is _END:
                    return
                prepared = self._prepared(batch, device)
            yield prepared

    def _prepared(self, batch: Any, device: torch.device | None) -> Args:
        if self._prepare is not None:
            found: Any = self._prepare(batch)
            if not isinstance(found, (tuple, list)):
                problem = f"prepare must return a tuple, got {type(found).__name__}"
                mend = "Write lambda batch: (batch,) for one argument"
                raise ArgumentTypeError(message(self._where, problem, mend))
            batch = found
        if not isinstance(batch, (tuple, list)):
            batch = (batch,)
        return to_device(tuple(batch), device)


def to_device(args: Args, device: torch.device | None) -> Args:
    """Return a batch with its tensors on a device, if one is given."""
    if device is None:
        return args
    tensors, restore = tree.tensors_and_rest(args)
    moved: Args = restore([tensor.to(device, non_blocking=True) for tensor in tensors])
    return moved


class _Stream:
    """Random numbers that are drawn while data are read: the same whenever they are, and nobody else's."""

    def __init__(
        self, state: RandomState, generators: Sequence[torch.Generator], states: Sequence[Tensor]
    ) -> None:
        self._state, self._generators, self._states = state, generators, list(states)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw inside from where this stream is; leave all generators as they are outside."""
        present = RandomState.now([])
        others = [generator.get_state() for generator in self._generators]
        self._state.restore()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            self._state = RandomState.now([])
            self._states = [generator.get_state() for generator in self._generators]
            present.restore()
            for generator, state in zip(self._generators, others, strict=True):
                generator.set_state(state)


def _generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader, its samplers and its data sets hold."""
    found: list[torch.Generator] = []
    pending, seen = [data], set()
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, torch.Generator) and all(value is not g for g in found):
                found.append(value)
            elif name in _HOLDERS:
                pending.extend(value if isinstance(value, (list, tuple)) else [value])
    return found


_HOLDERS = {"dataset", "datasets", "sampler", "batch_sampler", "data_source"}
