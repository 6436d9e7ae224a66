"""torch.func's derivatives with one return type each, and no more.

torch types the results of `jvp` and `vjp` as unions over `has_aux`; here every function returns one tuple.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch.func
from torch.func import grad

__all__ = [
    "forward_mode_lock",
    "grad",
    "jvp",
    "jvp_aux",
    "prepare_forward_mode",
    "vjp",
    "vjp_aux",
    "without_vmap_warnings",
]

Function = Callable[..., Any]

_FORWARD_MODE = threading.RLock()


def forward_mode_lock() -> AbstractContextManager[Any]:
    """Return the lock around forward mode, whose dual levels torch shares among threads."""
    return nullcontext() if torch.compiler.is_compiling() else _FORWARD_MODE


@contextmanager
def without_vmap_warnings() -> Iterator[None]:
    """Keep vmap's advice on speed from a user who did not ask for vmap."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


@cache
def prepare_forward_mode() -> None:
    """Load torch's forward rules, which torch does at the first jvp with a warning of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def jvp(f: Function, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return `f(*primals)` and its derivative along `tangents`."""
    if not torch.compiler.is_compiling():
        prepare_forward_mode()
    output, tangent = torch.func.jvp(f, primals, tangents)  # type: ignore[misc]
    return output, tangent


def jvp_aux(
    f: Function, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any, Any]:
    """Return the output, its derivative and the auxiliary output of `f(*primals) -> (output, aux)`."""
    if not torch.compiler.is_compiling():
        prepare_forward_mode()
    output, tangent, aux = torch.func.jvp(f, primals, tangents, has_aux=True)  # type: ignore[misc]
    return output, tangent, aux


def vjp(f: Function, *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return `f(*primals)` and its pullback, cotangent -> tuple of cotangents of the primals."""
    output, pullback = torch.func.vjp(f, *primals)  # type: ignore[misc]
    return output, pullback


def vjp_aux(f: Function, *primals: Any) -> tuple[Any, Callable[[Any], Any], Any]:
    """Return the output, the pullback and the auxiliary output of `f(*primals) -> (output, aux)`."""
    output, pullback, aux = torch.func.vjp(f, *primals, has_aux=True)  # type: ignore[misc]
    return output, pullback, aux
