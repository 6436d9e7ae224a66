"""What a function reaches beside its arguments: modules, generators of random numbers, iterators, counters.

Only for evidence and for keeping things as they are: what is not found here is not missed by the checks.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = [
    "Source",
    "changes",
    "iterators",
    "modules_in",
    "plain_values",
    "random_sources",
    "training_effects",
    "walk",
]

_MOST, _DEEPEST, _FIRST_ITEMS = 2000, 6, 64
_LIBRARIES = ("torch", "numpy", "secorder_func", "optree", "builtins", "functools")
_PLAIN = (bool, int, float, complex, str, type(None))
_SIZED = (list, dict, set, deque)


def walk(*roots: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Return the objects that the named roots reach, each once, with the expression that leads there."""
    found: list[tuple[str, Any]] = []
    seen: dict[int, Any] = {}  # keeps temporary objects, so that no id is used twice
    queue = deque((name, thing, 0) for name, thing in roots)
    while queue and len(found) < _MOST:
        name, thing, depth = queue.popleft()
        if not isinstance(thing, _PLAIN):
            if id(thing) in seen:
                continue
            seen[id(thing)] = thing
        found.append((name, thing))
        if depth < _DEEPEST:
            queue.extend((child, part, depth + 1) for child, part in _parts(name, thing))
    return found


def _parts(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, (Tensor, types.ModuleType, type, *_PLAIN)):
        return
    if isinstance(thing, types.FunctionType):
        yield from _of_function(thing)
    elif isinstance(thing, types.MethodType):
        yield type(thing.__self__).__name__, thing.__self__
        yield name, thing.__func__
    elif isinstance(thing, functools.partial):
        yield name, thing.func
        yield name, thing.args
        yield name, thing.keywords
    elif isinstance(thing, dict):
        for key in list(thing)[:_FIRST_ITEMS]:
            yield f"{name}[{key!r}]", thing[key]
    elif isinstance(thing, (list, tuple)):
        for index, item in enumerate(thing[:_FIRST_ITEMS]):
            yield f"{name}[{index}]", item
    elif hasattr(thing, "__dict__") and not _is_of_library(type(thing)):
        for attribute, value in list(vars(thing).items())[:_FIRST_ITEMS]:
            if not (isinstance(thing, nn.Module) and attribute.startswith("_")):
                yield f"{name}.{attribute}", value
        call = getattr(type(thing), "forward" if isinstance(thing, nn.Module) else "__call__", None)
        if isinstance(call, types.FunctionType):
            yield from _of_function(call)


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # noqa: PERF203 - not assigned yet
            continue
    if not _is_of_library(function):
        for name in _names(function.__code__):
            if name in function.__globals__:
                yield name, function.__globals__[name]
    defaults = function.__defaults__ or ()
    yield from zip(
        function.__code__.co_varnames[function.__code__.co_argcount - len(defaults) :],
        defaults,
        strict=False,
    )
    yield from (function.__kwdefaults__ or {}).items()


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_of_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", "") or "").split(".")[0] in _LIBRARIES


# ------------------------------------------------------------------------------- what was found


def modules_in(reached: list[tuple[str, Any]]) -> list[tuple[str, nn.Module]]:
    """Return the modules of torch."""
    return [(name, thing) for name, thing in reached if isinstance(thing, nn.Module)]


def training_effects(modules: list[nn.Module]) -> list[str]:
    """Return what these modules, and those inside of them, do in training mode and not in evaluation mode."""
    inner = [module for outer in modules for module in outer.modules() if module.training]
    effects = []
    if any(_drops(module) for module in inner):
        effects.append("dropout is active")
    if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in inner):
        effects.append("BatchNorm uses the statistics of each batch")
    return effects


def _drops(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", None)
    return isinstance(rate, (int, float)) and rate > 0


def iterators(reached: list[tuple[str, Any]]) -> list[str]:
    """Return the names of iterators, which are somewhere else at every call."""
    return [
        name
        for name, thing in reached
        if hasattr(type(thing), "__next__") and not isinstance(thing, Tensor)
    ]


def plain_values(reached: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return numbers, strings and the lengths of containers by name."""
    plain = {name: thing for name, thing in reached if isinstance(thing, _PLAIN)}
    sizes = {f"len({name})": len(thing) for name, thing in reached if isinstance(thing, _SIZED)}
    return plain | sizes


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what has another value than before, as text."""
    return [
        f"{name} went from {before[name]!r} to {value!r}"
        for name, value in after.items()
        if name in before and before[name] != value and before[name] == before[name]
    ]


class Source(NamedTuple):
    """Random numbers that torch's global state does not govern, and how to read and set their state."""

    name: str
    state: Callable[[], Any]
    restore: Callable[[Any], Any]


def random_sources(reached: list[tuple[str, Any]]) -> list[Source]:
    """Return Python's and NumPy's global generators, and the generators that are reached."""
    sources = [Source("Python's random module", random.getstate, random.setstate)]
    numpy: Any = sys.modules.get("numpy")  # never imported from here
    if numpy is not None:
        sources.append(Source("numpy.random", numpy.random.get_state, numpy.random.set_state))
    for name, thing in reached:
        if isinstance(thing, torch.Generator):
            sources.append(Source(f"the torch.Generator {name}", thing.get_state, thing.set_state))
        elif isinstance(thing, random.Random):
            sources.append(Source(f"the random.Random {name}", thing.getstate, thing.setstate))
        elif numpy is not None and isinstance(thing, numpy.random.Generator):
            sources.append(_numpy_generator(name, thing))
    return sources


def _numpy_generator(name: str, generator: Any) -> Source:
    bits = generator.bit_generator
    return Source(
        f"the numpy.random.Generator {name}",
        lambda: bits.state,
        lambda state: setattr(bits, "state", state),
    )
