"""A user's own problem, `--problem package.module:function`, as the subject of a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secorder_func import functional_loss, functional_model, tree
from secorder_func.checks import check_params
from secorder_func.report.subject import Subject
from secorder_func.verify.target import (
    BATCHES,
    TargetError,
    call_target,
    current_folder_importable,
    data_of,
    quoted,
)

__all__ = ["TargetError", "load", "subject_of"]

_RETURNS = "(f, params, batches) or (model, loss_fn, batches)"


@contextmanager
def load(target: str, *, seed: int) -> Iterator[Subject]:
    """Call `package.module:function` and yield what it returns; modules of the current folder can be imported inside.

    Raises
    ------
    TargetError
        There is no such module or function, it raises, or what it returns is no loss with parameters and data.
    """
    with current_folder_importable():
        torch.manual_seed(seed)
        yield subject_of(call_target(target), target)


def subject_of(returned: Any, title: str) -> Subject:
    """Read what a user's function returns: `(f, params, batches)` or `(model, loss_fn, batches)`.

    One batch may also be spread: `(f, params, *batch)`, `(model, loss_fn, inputs, targets)`.
    """
    if not isinstance(returned, (tuple, list)):
        raise TargetError(f"expected {_RETURNS}, got {type(returned).__name__}")
    given = f"({', '.join(type(item).__name__ for item in returned)})"
    if len(returned) < 2 or not callable(returned[0]):
        raise TargetError(f"expected {_RETURNS}, got {given}")
    first, second, *rest = returned
    if isinstance(first, nn.Module) and not rest:
        raise TargetError(f"expected {_RETURNS}, got {given}, a module without data")
    try:
        batch, batches = data_of(rest)
        if isinstance(first, nn.Module):
            f, params = functional_loss(first, second)
            model_fn, _ = functional_model(first)
            mode = "training mode" if first.training else "evaluation mode"
            subject = Subject(title, f, params, batch, batches, model_fn, second, facts=(mode,))
        else:
            check_params(second, "report")
            params = tree.map(Tensor.detach, second)
            subject = Subject(title, first, params, batch, batches)
    except (TypeError, ValueError) as error:
        raise TargetError(_one_line(str(error))) from error
    _require_loss(subject)
    return subject


def _require_loss(subject: Subject) -> None:
    """Evaluate the loss of the first batch once: without it there is nothing to report."""
    try:
        batch = subject.first_batch
    except StopIteration:
        raise TargetError("there are no batches") from None
    except Exception as error:  # whatever the user's data do
        raise TargetError(f"reading the data raises {_one_line(quoted(error))}") from error
    try:
        with torch.no_grad():
            loss: Any = subject.f(subject.params, *batch)
    except Exception as error:  # whatever the user's loss does
        hint = ""
        if subject.batches is not None and len(batch) == 1 and isinstance(batch[0], Tensor):
            hint = f". The first batch is one tensor; pass {BATCHES}"
        problem = f"the loss of the first batch raises {_one_line(quoted(error))}"
        raise TargetError(problem + hint) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TargetError(f"the loss must be a tensor of one number, got {shape}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
