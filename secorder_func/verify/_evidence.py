"""What one evaluation of the loss shows of its making."""

from __future__ import annotations

import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secorder_func.errors import NoExactRouteError
from secorder_func.rules.cut_graphs import history
from secorder_func.transforms.loss import Leaves
from secorder_func.verify._lenses import Shape, Watch

__all__ = ["Evidence", "evidence", "first_line", "quoted"]

_KINKS = (
    "Abs",
    "AdaptiveMaxPool",
    "Amax",
    "Amin",
    "Clamp",
    "Cummax",
    "Cummin",
    "FractionalMaxPool",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyRelu",
    "LinalgVectorNorm",
    "Max",
    "Maximum",
    "Median",
    "Min",
    "Minimum",
    "Norm",
    "Prelu",
    "Relu",
    "Rrelu",
    "Softshrink",
    "Sort",
    "Threshold",
    "Topk",
    "Where",
)
_STEPS = (
    "Ceil",
    "Floor",
    "Fmod",
    "Frac",
    "Heaviside",
    "Remainder",
    "Round",
    "Sgn",
    "Sign",
    "Trunc",
)


@dataclass(frozen=True)
class Evidence:
    """What shows in an evaluation and its autograd history.

    Attributes
    ----------
    customs
        The custom `autograd.Function`s on the way from the parameters to the loss.
    kinks, steps
        Functions of torch with kinks and with jumps on that way.
    holds, numbers
        What holds constant, see `Watch`.
    cuts
        Functions that return whole numbers or truth values, where the loss has no history.
    broadcast
        The shapes of outputs and targets that are compared although they differ.
    reached
        Which leaves the history ends in.
    eps
        The coarsest unit roundoff in use.
    """

    customs: tuple[str, ...]
    kinks: tuple[str, ...]
    steps: tuple[str, ...]
    holds: tuple[str, ...]
    numbers: tuple[str, ...]
    cuts: tuple[str, ...]
    broadcast: tuple[tuple[Shape, Shape], ...]
    reached: tuple[bool, ...]
    eps: float


def evidence(value: Tensor, leaves: Leaves, watch: Watch) -> Evidence:
    """Collect the evidence of an evaluation that recorded its history."""
    customs, names, ends = set(), set(), set()
    for node in history([value.grad_fn] if value.grad_fn is not None else []):
        function = getattr(node, "_forward_cls", None)
        if function is not None:
            customs.add(function.__name__)
        else:
            names.add(node.name().split("::")[-1].split("Backward")[0])
        ends.add(id(getattr(node, "variable", None)))
    return Evidence(
        customs=tuple(sorted(customs)),
        kinks=_among(names, _KINKS),
        steps=_among(names, _STEPS),
        holds=tuple(sorted(watch.holds)),
        numbers=tuple(sorted(watch.numbers)),
        cuts=tuple(sorted(watch.cuts)) if value.grad_fn is None else (),
        broadcast=tuple(watch.broadcast),
        reached=tuple(id(leaf) in ends for leaf in leaves),
        eps=max(watch.eps, *(torch.finfo(t.dtype).eps for t in (value, *leaves))),
    )


def _among(names: set[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that are a known word, or begin with one and go on with another."""
    return tuple(
        sorted(
            _plain(name)
            for name in names
            if any(name.startswith(word) and not name[len(word) :][:1].islower() for word in known)
        )
    )


def _plain(name: str) -> str:
    """Return `max_pool2d` for `MaxPool2DWithIndices`, as a reader would write it."""
    name = name.removesuffix("WithIndices").replace("2D", "2d").replace("3D", "3d")
    spaced = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
    return spaced.lstrip("_")


def quoted(error: BaseException) -> str:
    """Return an error as a reader needs it: its type, its first lines, and the place in the user's own code."""
    text = "\n".join(str(error).strip().splitlines()[:4])
    place = _place(error)
    return f"{type(error).__name__}: {text}" + (f"\n{place}" if place else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what is behind an error."""
    if isinstance(error, NoExactRouteError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


_OURS = Path(__file__).resolve().parent.parent
_TORCH = Path(torch.__file__).resolve().parent


def _place(error: BaseException) -> str:
    """Return where in the user's code an error was raised, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file: Any = Path(frame.filename)
        if _OURS not in file.parents and _TORCH not in file.parents and file.suffix == ".py":
            return f"in {frame.name}, {file.name} line {frame.lineno}: {textwrap.shorten(frame.line or '', 90)}"
    return ""
