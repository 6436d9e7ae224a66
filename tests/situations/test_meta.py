"""Tensors without data: products on the device "meta" have shapes, and nothing looks at a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    finite_difference_hvp,
    functional_loss,
    hessian_operator,
    hutchinson_trace,
    hvp,
)
from secorder_func.compat.core.hvp import approximate_hvp
from tests.situations.entries import ENTRIES, GAUSS_NEWTON, Case


class Everything(nn.Module):
    """A convolution, norms, dropout, an embedding that renormalises, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 8, max_norm=1.0)
        self.mix = nn.Linear(16, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.conv(image)), 0.3).flatten(1)
        tokens = torch.zeros(3, dtype=torch.long, device=image.device)
        return self.encoder((self.mix(h) + self.embedding(tokens)).unsqueeze(1))


def _case() -> Case:
    x, y = torch.randn(3, 2, 4, 4, device="meta"), torch.randn(3, 1, 8, device="meta")
    return Case(Everything().to("meta"), F.mse_loss, x, y)


def _vector(case: Case) -> list[Tensor]:
    return [torch.randn_like(p) for p in case.params]


@pytest.mark.parametrize("entry", {**ENTRIES, **GAUSS_NEWTON})
def test_products_have_the_shapes_of_the_parameters(entry: str) -> None:
    case = _case()
    product = {**ENTRIES, **GAUSS_NEWTON}[entry](case, _vector(case))
    assert all(h.is_meta for h in product)
    assert [h.shape for h in product] == [p.shape for p in case.params]


@pytest.mark.parametrize("entry", {**ENTRIES, **GAUSS_NEWTON})
def test_the_random_state_of_the_cpu_is_untouched(entry: str) -> None:
    case, before = _case(), torch.get_rng_state()
    {**ENTRIES, **GAUSS_NEWTON}[entry](case, _vector(case))
    assert torch.equal(torch.get_rng_state(), before)


def test_estimates_have_shapes() -> None:
    case = _case()
    f, params = functional_loss(case.model, case.loss_fn)
    v: Any = dict(zip(params, _vector(case), strict=True))
    estimate = finite_difference_hvp(f)(params, v, case.x, case.y)
    assert all(estimate[name].shape == p.shape for name, p in params.items())
    of_closure = approximate_hvp(case.closure, case.params, list(v.values()))
    assert [h.shape for h in of_closure] == [p.shape for p in case.params]
    trace = hutchinson_trace(hessian_operator(f, params, case.x, case.y), 3)
    assert (trace.value.is_meta, trace.value.shape) == (True, ())


def test_a_stack_of_products_keeps_its_leading_axis() -> None:
    p = torch.randn(4, 3, device="meta")
    op = hessian_operator(lambda p: (p**3).sum(), p)
    assert op.mm(torch.randn(7, 4, 3, device="meta")).shape == (7, 4, 3)
    assert op.dense().shape == (12, 12)


def test_a_vector_on_another_device_is_refused() -> None:
    p = torch.randn(4, 3, device="meta")
    with pytest.raises(ValueError, match="expected device meta, got cpu"):
        hvp(lambda p: (p**3).sum())(p, torch.randn(4, 3))
