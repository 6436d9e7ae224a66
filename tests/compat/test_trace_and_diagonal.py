"""Both traces and the diagonal of the documented surface."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func.compat.core.hessian_diagonal import hessian_diagonal, model_hessian_diagonal
from secorder_func.compat.core.hessian_trace import hessian_trace as exact_trace
from secorder_func.compat.core.hessian_trace import model_hessian_trace
from secorder_func.compat.core.hvp import exact_hvp, hessian_trace, model_hvp
from tests import oracles
from tests.compat.closures import stateful


def _dense(func: Callable[[], Tensor], params: list[Tensor], model: nn.Module) -> Tensor:
    """Return the dense Hessian of a closure, entries in the order of `params`."""
    with oracles.untouched(model):
        gradient = torch.autograd.grad(func(), params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        rows = [
            torch.cat(
                [
                    (torch.zeros_like(p) if h is None else h).reshape(-1)
                    for h, p in zip(
                        torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True),
                        params,
                        strict=True,
                    )
                ]
            )
            for entry in flat
        ]
    return torch.stack(rows)


NAMES = ["mlp_tanh", "cnn_batchnorm_train", "lstm", "tied_embeddings", "encoder_eval"]


@pytest.mark.parametrize("name", NAMES)
def test_the_diagonal_is_that_of_the_dense_hessian(name: str) -> None:
    case = stateful(name)
    expected = torch.diagonal(_dense(case.func, case.params, case.model))
    for found in (
        hessian_diagonal(case.func, case.params),
        hessian_diagonal(case.func, case.params, create_graph=True),
        model_hessian_diagonal(case.model, case.loss_fn, case.x, case.y),
    ):
        assert [d.shape for d in found] == [p.shape for p in case.params]
        flat = torch.cat([d.detach().reshape(-1) for d in found])
        oracles.assert_same(flat, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_trace_is_that_of_the_dense_hessian(name: str) -> None:
    case = stateful(name)
    expected = torch.trace(_dense(case.func, case.params, case.model))
    for found in (
        exact_trace(case.func, case.params, num_samples=3),
        model_hessian_trace(case.model, case.loss_fn, case.x, case.y),
    ):
        assert found.shape == ()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_factors_scale_the_diagonal() -> None:
    case = stateful("mlp_tanh")
    v = case.vector()
    plain, scaled = (
        hessian_diagonal(case.func, case.params),
        hessian_diagonal(case.func, case.params, v),
    )
    for d, s, t in zip(plain, scaled, v, strict=True):
        torch.testing.assert_close(s, d * t)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_estimate_is_unbiased_within_its_spread(sparse: bool) -> None:
    case = stateful("mlp_tanh")
    H = _dense(case.func, case.params, case.model)
    off = (H - torch.diag(torch.diagonal(H))).square().sum()
    # Entries of v have fourth moment 1 / density: the diagonal adds (1 / density - 1) sum H_ii^2 to the variance.
    variance = 2 * off + (9.0 * torch.diagonal(H).square().sum() if sparse else 0.0)
    samples = 400
    torch.manual_seed(11)
    found = hessian_trace(case.func, case.params, num_samples=samples, sparse=sparse)
    assert isinstance(found, float)
    assert abs(found - float(torch.trace(H))) < 4 * math.sqrt(float(variance) / samples)
    assert found != pytest.approx(0.1 * float(torch.trace(H)), rel=0.5)


def test_the_estimate_takes_one_seed_from_the_global_generator() -> None:
    case = stateful("mlp_tanh")
    torch.manual_seed(1)
    first, second = (hessian_trace(case.func, case.params, 4) for _ in range(2))
    torch.manual_seed(1)
    again = hessian_trace(case.func, case.params, 4)
    assert first == again
    assert first != second


def test_all_probes_of_an_estimate_see_one_dropout_mask() -> None:
    case = stateful("dropout")
    torch.manual_seed(2)
    few = exact_trace(case.func, case.params)
    torch.manual_seed(2)
    expected = torch.trace(_dense(case.func, case.params, case.model))
    torch.testing.assert_close(few, expected, rtol=1e-10, atol=1e-12)


def test_the_estimate_with_a_graph_can_be_differentiated() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    trace = hessian_trace(lambda: (w**4).sum(), [w], create_graph=True)
    assert trace.shape == ()
    assert trace.item() == pytest.approx(12 * 5)
    torch.testing.assert_close(torch.autograd.grad(trace, w)[0], 24 * w.detach())
    diagonal = hessian_diagonal(lambda: (w**4).sum(), [w], create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(diagonal.sum(), w)[0], 24 * w.detach())


def test_strict_refuses_frozen_and_unused_parameters() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    frozen, unused = torch.ones(2, dtype=torch.float64), w.detach().clone().requires_grad_()

    def func() -> Tensor:
        return (w**3 * frozen).sum()

    assert hessian_diagonal(func, [w, frozen])[1].count_nonzero() == 0
    for params, pattern in (
        ([w, frozen], r"params\[1\] does not require grad"),
        ([w, unused], r"the loss does not use params\[1\]"),
    ):
        for error in (ValueError, RuntimeError):
            with pytest.raises(error, match=pattern):
                hessian_diagonal(func, params, strict=True)
    torch.testing.assert_close(hessian_diagonal(func, [w], strict=True)[0], 6 * w.detach())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_graph_that_was_asked_for_is_made_whatever_the_caller_switched_off(context: Any) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)

    def func() -> Tensor:
        return (w**3).sum() * b.sum()

    flat, model = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), _Cubes()
    with context():
        results = [
            exact_hvp(func, [w, b], flat, create_graph=True),
            hessian_diagonal(func, [w, b], v=[w.detach(), b.detach()], create_graph=True)[0],
            exact_trace(func, [w, b], create_graph=True),
            hessian_trace(func, [w, b], create_graph=True),
            model_hvp(model, lambda z, y: z, None, None, torch.ones_like(model.w), True),
        ]
    for result, params in zip(results, [(w,)] * 4 + [(model.w,)], strict=True):
        assert result.requires_grad
        (slope,) = torch.autograd.grad(result.sum(), params)
        assert slope.any()


class _Cubes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, _: Any) -> Tensor:
        return (self.w**3).sum()
