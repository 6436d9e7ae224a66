"""What is of the wrong type altogether is refused by name, at the call, with both natures of error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    exact_diagonal,
    exact_trace,
    finite_difference_hvp,
    functional_loss,
    ggnvp,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    hvp,
    hvp_and_grad,
    probes,
)
from secorder_func.compat.core.hessian_diagonal import hessian_diagonal, model_hessian_diagonal
from secorder_func.compat.core.hvp import approximate_hvp, exact_hvp, hessian_trace, model_hvp

P = torch.ones(3)
W = torch.ones(3, requires_grad=True)


def _loss(p: Tensor) -> Tensor:
    return (p**3).sum()


OP = hessian_operator(_loss, P)

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "hvp of a number": (lambda: hvp(3), "hvp: f must be a function, got int"),
    "hvp_and_grad of None": (lambda: hvp_and_grad(None), "hvp_and_grad: f must be a function"),
    "ggnvp of a tensor": (
        lambda: ggnvp(P, _loss)(P, P, P, P),
        "ggnvp: model_fn must be a function, got Tensor",
    ),
    "differences of None": (lambda: finite_difference_hvp(None), "f must be a function"),
    "differences, half a step": (
        lambda: finite_difference_hvp(_loss, num_steps=2.5),
        "finite_difference_hvp: num_steps must be a whole number, got 2.5",
    ),
    "differences, damping": (
        lambda: finite_difference_hvp(_loss, damping="a"),
        "damping must be a real number",
    ),
    "operator of None": (lambda: hessian_operator(None, P), "hessian_operator: f must be a func"),
    "operator without product": (
        lambda: LinearOperator(3, like=P),
        "LinearOperator: matvec must be a function, got int",
    ),
    "operator damped by a vector": (
        lambda: OP.damped(P),
        r"LinearOperator.damped: damping must be a real number or a 0-dim tensor, got \(3,\)",
    ),
    "trace of a function": (
        lambda: hutchinson_trace(_loss, 10),
        "hutchinson_trace: the first argument must be a LinearOperator, got function",
    ),
    "exact trace of a tensor": (
        lambda: exact_trace(P),
        "exact_trace: .*LinearOperator, got Tensor",
    ),
    "diagonal of a tensor": (
        lambda: hutchinson_diagonal(P, 3),
        "hutchinson_diagonal: .*got Tensor",
    ),
    "exact diagonal of a tensor": (lambda: exact_diagonal(P), "exact_diagonal: .*got Tensor"),
    "half a probe": (
        lambda: hutchinson_trace(OP, 2.5),
        "hutchinson_trace: num_matvecs must be a whole number, got 2.5",
    ),
    "a chunk of a word": (
        lambda: exact_trace(OP, chunk_size="a"),
        "exact_trace: chunk_size must be a number, 'auto' or None, got 'a'",
    ),
    "a seed for a generator": (
        lambda: hutchinson_trace(OP, 2, generator=0),
        "expected a torch.Generator, got 0",
    ),
    "a name for a distribution": (
        lambda: hutchinson_trace(OP, 2, distribution="rademacher"),
        "hutchinson_trace: distribution must be a function, got str.*rademacher",
    ),
    "a distribution not made": (
        lambda: hutchinson_trace(OP, 2, distribution=probes.sparse_rademacher),
        "must be called with its density first",
    ),
    "a word for a density": (
        lambda: probes.sparse_rademacher("a"),
        "density must be a real number",
    ),
    "no loss": (lambda: functional_loss(nn.Linear(1, 1), None), "loss_fn must be a function"),
    "a value for a closure": (
        lambda: exact_hvp(_loss(W), [W], P),
        "exact_hvp: func must be a function, got Tensor. Pass the closure",
    ),
    "a number for a closure": (
        lambda: approximate_hvp(3, [W], P),
        "approximate_hvp: func must be a function, got int",
    ),
    "half a sample": (
        lambda: hessian_trace(lambda: _loss(W), [W], num_samples=2.5),
        "hessian_trace: num_samples must be a whole number",
    ),
    "None for a closure": (lambda: hessian_diagonal(None, [W]), "hessian_diagonal: func must be"),
    "a number for a model": (
        lambda: model_hvp(3, _loss, P, P, P),
        "model_hvp: model must be a torch.nn.Module, got int",
    ),
    "None for a model": (
        lambda: model_hessian_diagonal(None, _loss, P, P),
        "model_hessian_diagonal: model must be a torch.nn.Module, got NoneType",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_type_is_named(case: str) -> None:
    call, pattern = CASES[case]
    for error in (TypeError, ValueError, RuntimeError):
        with pytest.raises(error, match=pattern):
            call()


def test_a_lazy_module_is_refused_with_the_mend() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that lazy modules are experimental
        model = nn.LazyLinear(3)
    with pytest.raises(
        ValueError, match=r"'weight' has no shape yet. Evaluate the model once before"
    ):
        functional_loss(model, nn.functional.mse_loss)


def test_a_product_of_another_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the product must match.*expected shape \(3,\), got \(4,\)"
    ):
        LinearOperator(lambda v: torch.ones(4), like=P) @ P
