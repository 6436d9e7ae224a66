"""A user's own problem, `--problem package.module:function`, as the subject of a report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secorder_func import functional_model, tree
from secorder_func.checks import check_params
from secorder_func.report.subject import Subject
from secorder_func.rules import evaluated
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.verify._causes import no_dependence, not_finite
from secorder_func.verify._evidence import Evidence, evidence
from secorder_func.verify._lenses import Watch
from secorder_func.verify._raised import named, of_the_loss, takes
from secorder_func.verify._reach import training_effects
from secorder_func.verify._result import Cause
from secorder_func.verify._value import shapes
from secorder_func.verify.returned import Returned, first_batch, read
from secorder_func.verify.target import (
    BATCHES,
    TargetError,
    call_target,
    current_folder_importable,
    quoted,
)

__all__ = ["TargetError", "load", "subject_of"]


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
    given = read(returned)
    try:
        subject = _subject(given, title)
    except (TypeError, ValueError) as error:
        raise TargetError(_one_line(str(error))) from error
    _require_loss(subject, first_batch(given, lambda: subject.first_batch))
    return subject


def _subject(given: Returned, title: str) -> Subject:
    data = given.batch, given.batches
    if given.model is None:
        check_params(given.params, "report")
        return Subject(title, given.f, tree.map(Tensor.detach, given.params), *data)
    model_fn, _ = functional_model(given.model)
    fact = _mode(given.model)
    return Subject(title, given.f, given.params, *data, model_fn, given.loss_fn, facts=(fact,))


def _mode(model: nn.Module) -> str:
    effects = training_effects([model])
    if effects:
        return f"training mode ({', '.join(effects)})"
    return "training mode" if model.training else "evaluation mode"


def _require_loss(subject: Subject, batch: tuple[Any, ...]) -> None:
    """Evaluate the loss of the first batch once: without it there is nothing to report."""
    watch = Watch()
    batch = without_inference_tensors(batch)
    params = tree.map(lambda p: p.detach().requires_grad_(), subject.params)
    leaves = tuple(tree.flatten(params)[0])

    def evaluate(rules: Any) -> Any:
        with watch:
            return subject.f(params, *batch)

    try:
        # Under the rules buffers stay as they are; random numbers are drawn again when it is measured.
        with torch.enable_grad(), warnings.catch_warnings(), RandomState.now(leaves).replayed():
            warnings.filterwarnings("ignore", message="Using a target size")  # refused below
            loss: Any = evaluated(evaluate, forward=False, higher=False, protect=leaves)
    except Exception as error:  # whatever the user's loss does
        quote = _one_line(quoted(error)).rstrip(".")
        hint = _hint(subject, batch, error)
        raise TargetError(f"the loss of the first batch raises {quote}{hint}") from error
    _require_number(loss, subject, batch)
    _require_derivatives(evidence(loss, leaves, watch))


def _require_number(loss: Any, subject: Subject, batch: tuple[Any, ...]) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TargetError(f"the loss must be a tensor of one number, got {shape}")
    if not loss.is_floating_point():
        problem = f"the loss must be real and floating, got {loss.dtype}"
        raise TargetError(problem + _hint(subject, batch, ValueError(problem)))
    if not bool(torch.isfinite(loss)):
        data = named(subject.f, batch)
        places = [name for name, t in data if not bool(torch.isfinite(t).all())]
        problem = f"the loss of the first batch is {loss.item()}"
        raise TargetError(problem + _said(not_finite(places)))


def _require_derivatives(found: Evidence) -> None:
    """Refuse a loss without derivatives, and one that compares each output with all targets."""
    check = shapes(found)
    if check is not None and check.passed is False:
        raise TargetError(f"{check.finding}{_said(check.causes)}")
    if not any(found.reached):
        problem = "the loss does not depend on any parameter"
        raise TargetError(f"{problem}{_said(no_dependence(found))}")


def _hint(subject: Subject, batch: tuple[Any, ...], error: Exception) -> str:
    one = subject.batches is not None and len(batch) == 1 and isinstance(batch[0], Tensor)
    if one and not takes(subject.f, subject.params, batch):
        return f". The first batch is one tensor; pass {BATCHES}"
    return _said(of_the_loss(error, subject.f, subject.params, batch))


def _said(causes: tuple[Cause, ...]) -> str:
    return "".join(f". Likely cause: {cause.what}. {cause.mend}" for cause in causes[:1])


def _one_line(text: str) -> str:
    return " ".join(text.split())
