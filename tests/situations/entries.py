"""One product through every entry point of the library, and the answer of plain autograd to compare with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    functional_loss,
    functional_model,
    ggn_operator,
    ggnvp,
    hessian_operator,
    hvp,
)
from secorder_func.compat.core.hvp import exact_hvp, gauss_newton_product, model_hvp
from tests import oracles

Leaves = list[Tensor]


@dataclass(frozen=True)
class Case:
    """A module, its loss and its data; `truth` is the module to ask for the answer, if it is another one."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    x: Any
    y: Any = None
    truth: nn.Module | None = None

    @property
    def params(self) -> Leaves:
        return list(self.model.parameters())

    def vector(self, seed: int = 1) -> Leaves:
        return oracles.random_like(self.params, seed)

    def closure(self) -> Tensor:
        return self.loss_fn(self.model(self.x), self.y)


def mlp(seed: int = 0) -> nn.Sequential:
    """Return a small smooth network in float64 from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def classification(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs and labels for `mlp`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


# ------------------------------------------------------------------------------------- entry points


def _transform(case: Case, v: Leaves, **options: Any) -> Leaves:
    f, params = functional_loss(case.model, case.loss_fn)
    return list(hvp(f, **options)(params, _named(params, v), case.x, case.y).values())


def _operator(case: Case, v: Leaves, **options: Any) -> Leaves:
    f, params = functional_loss(case.model, case.loss_fn)
    op = hessian_operator(f, params, case.x, case.y, **options)
    return list((op @ _named(params, v)).values())


def _operator_mm(case: Case, v: Leaves) -> Leaves:
    f, params = functional_loss(case.model, case.loss_fn)
    rows = [torch.stack([t, -2 * t]) for t in v]
    products = hessian_operator(f, params, case.x, case.y).mm(_named(params, rows))
    return [rows[1] / -2 for rows in products.values()]


def _named(params: Any, v: Leaves) -> dict[str, Tensor]:
    return dict(zip(params, v, strict=True))


def _exact(case: Case, v: Leaves) -> Leaves:
    return exact_hvp(case.closure, case.params, v)


def _exact_with_graph(case: Case, v: Leaves) -> Leaves:
    return [h.detach() for h in exact_hvp(case.closure, case.params, v, create_graph=True)]


def _model_hvp(case: Case, v: Leaves) -> Leaves:
    return model_hvp(case.model, case.loss_fn, case.x, case.y, v)


FUNCTIONAL: dict[str, Callable[[Case, Leaves], Leaves]] = {
    "hvp": _transform,
    "hvp in reverse": lambda case, v: _transform(case, v, mode="reverse_over_reverse"),
    "operator": _operator,
    "operator in forward": lambda case, v: _operator(case, v, mode="forward_over_reverse"),
    "operator.mm": _operator_mm,
}
CLOSURES: dict[str, Callable[[Case, Leaves], Leaves]] = {
    "exact_hvp": _exact,
    "exact_hvp with a graph": _exact_with_graph,
    "model_hvp": _model_hvp,
}
ENTRIES = {**FUNCTIONAL, **CLOSURES}


def _ggnvp(case: Case, v: Leaves) -> Leaves:
    model_fn, params = functional_model(case.model)
    product = ggnvp(model_fn, case.loss_fn)
    return list(product(params, _named(params, v), case.x, case.y).values())


def _ggn_operator(case: Case, v: Leaves) -> Leaves:
    model_fn, params = functional_model(case.model)
    op = ggn_operator(model_fn, case.loss_fn, params, case.x, case.y)
    return list((op @ _named(params, v)).values())


GAUSS_NEWTON: dict[str, Callable[[Case, Leaves], Leaves]] = {
    "ggnvp": _ggnvp,
    "ggn_operator": _ggn_operator,
    "gauss_newton_product": lambda case, v: gauss_newton_product(
        case.model, case.loss_fn, case.x, case.y, v
    ),
}

every_entry = pytest.mark.parametrize("entry", ENTRIES)
every_closure = pytest.mark.parametrize("entry", CLOSURES)


# ------------------------------------------------------------------------------------------ answers


def double_backward(
    case: Case, v: Leaves, around: AbstractContextManager[Any] | None = None
) -> Leaves:
    """Return `H v` by plain autograd on the parameters themselves; `around` is entered for the loss alone."""
    model = case.truth or case.model
    params = list(model.parameters())
    with oracles.untouched(model), torch.enable_grad():
        with around or nullcontext():
            loss = case.loss_fn(model(case.x), case.y)
        first = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(first, v, strict=True) if g is not None and g.requires_grad]
        second = torch.autograd.grad(
            [g for g, _ in pairs], params, [t for _, t in pairs], allow_unused=True
        )
    return [torch.zeros_like(p) if h is None else h for h, p in zip(second, params, strict=True)]


def gauss_newton(case: Case, v: Leaves, output: Callable[[Any], Tensor] = lambda z: z) -> Leaves:
    """Return `J^T H_L J v` by plain autograd; `output` takes the tensor of the outputs that the loss depends on."""
    model = case.truth or case.model
    params = list(model.parameters())

    def grad(z: Any, inputs: Any, cotangents: Any = None) -> Leaves:
        found = torch.autograd.grad(z, inputs, cotangents, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]

    with oracles.untouched(model), torch.enable_grad():
        outputs = model(case.x)
        z = output(outputs)
        dummy = torch.zeros_like(z, requires_grad=True)
        (tangent,) = grad(
            [g for g in grad(z, params, dummy) if g.requires_grad],
            [dummy],
            [t for g, t in zip(grad(z, params, dummy), v, strict=True) if g.requires_grad],
        )
        (slope,) = grad(case.loss_fn(outputs, case.y), [z])
        (bent,) = grad(slope, [z], tangent)
        return [h.detach() for h in grad(z, params, bent.detach())]


def assert_product(entry: str, case: Case, rtol: float = 1e-10, seed: int | None = None) -> None:
    """Assert that an entry point gives the answer of double backward, with the random numbers of one seed."""
    v = case.vector()
    if seed is not None:
        torch.manual_seed(seed)
    expected = double_backward(case, v)
    if seed is not None:
        torch.manual_seed(seed)
    oracles.assert_same(ENTRIES[entry](case, v), expected, rtol)
