"""Functions that torch does not differentiate twice, or not in forward mode, written out: same values, right curvature.

The answer comes from differences of torch's own gradient of the original function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import CurvatureFallbackWarning, hvp
from tests import oracles

MODES: list[Any] = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


P, V, X = _rand(5, 4), _rand(10, 4)[5:], _rand(16, 4)[10:]
CLASSES, SIGNS = torch.tensor([0, 3, 1, 2, 2]), torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double()
LABELS = torch.tensor([[0, 2, -1, 1], [1, -1, 0, 2], [3, 2, 1, 0], [-1, 0, 1, 2], [2, 2, -1, 0]])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
TOKENS, FLAT = torch.tensor([[0, 1, 1], [4, 0, 2]]), torch.tensor([0, 1, 1, 4, 3, 2])
OFFSETS = torch.tensor([0, 3, 3])


def _bent(p: Tensor) -> Tensor:
    return torch.sin(p) + 0.3 * p**2


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "huber_loss": lambda p: F.huber_loss(_bent(p), p.roll(1, 0), delta=0.7),
    "huber_loss, sum": lambda p: F.huber_loss(_bent(p), X[:5], reduction="sum"),
    "huber_loss, weights": lambda p: F.huber_loss(_bent(p), X[:5], weight=P.abs()),
    "soft_margin_loss": lambda p: F.soft_margin_loss(_bent(p), SIGNS.expand(5, 4)),
    "soft_margin_loss, none": lambda p: F.soft_margin_loss(
        30 * _bent(p), SIGNS.expand(5, 4), reduction="none"
    ),
    "hardsigmoid": lambda p: F.hardsigmoid(2 * _bent(p)) ** 2,
    "hardswish": lambda p: F.hardswish(2 * _bent(p)),
    "cross_entropy": lambda p: F.cross_entropy(3 * _bent(p), CLASSES),
    "cross_entropy, weights, one ignored": lambda p: F.cross_entropy(
        _bent(p), CLASSES, WEIGHT, ignore_index=3, reduction="sum"
    ),
    "cross_entropy, none, two axes": lambda p: F.cross_entropy(
        _bent(p)[:4].reshape(2, 4, 2), CLASSES[:4].reshape(2, 2), reduction="none"
    ),
    "cross_entropy, one sample": lambda p: F.cross_entropy(_bent(p)[0], CLASSES[0]),
    "cross_entropy, smoothed": lambda p: F.cross_entropy(_bent(p), CLASSES, label_smoothing=0.1),
    "cross_entropy, probabilities": lambda p: F.cross_entropy(_bent(p), X[:5].softmax(1)),
    "cross_entropy, large logits": lambda p: F.cross_entropy(1000 + _bent(p), CLASSES),
    "cross_entropy, a class ruled out": lambda p: F.cross_entropy(
        _bent(p).masked_fill(torch.arange(4) == 1, -torch.inf), torch.tensor([0, 3, 0, 2, 2])
    ),
    "log_softmax": lambda p: F.log_softmax(_bent(p), dim=0),
    "log_softmax, last axis": lambda p: F.log_softmax(_bent(p), -1),
    "multi_margin_loss": lambda p: F.multi_margin_loss(_bent(p), CLASSES),
    "multi_margin_loss, squares": lambda p: F.multi_margin_loss(
        _bent(p), CLASSES, p=2, margin=0.6, weight=WEIGHT, reduction="sum"
    ),
    "multi_margin_loss, one sample": lambda p: F.multi_margin_loss(_bent(p)[0], CLASSES[0], p=2),
    "multilabel_margin_loss": lambda p: F.multilabel_margin_loss(_bent(p), LABELS),
    "multilabel_margin_loss, none": lambda p: F.multilabel_margin_loss(
        _bent(p), LABELS, reduction="none"
    ),
    "multilabel_margin_loss, one sample": lambda p: F.multilabel_margin_loss(
        _bent(p)[0], LABELS[0]
    ),
    "cdist": lambda p: torch.cdist(_bent(p), X),
    "cdist to itself": lambda p: torch.cdist(p, p),
    "cdist, cubes": lambda p: torch.cdist(_bent(p), X, p=3.0),
    "cdist, sums": lambda p: torch.cdist(_bent(p), X, p=1.0),
    "pdist": lambda p: F.pdist(_bent(p)),
    "embedding_bag": lambda p: F.embedding_bag(TOKENS, p),
    "embedding_bag, sums": lambda p: F.embedding_bag(TOKENS, p, mode="sum"),
    "embedding_bag, weights": lambda p: F.embedding_bag(
        TOKENS, p, mode="sum", per_sample_weights=p[:2, :3].tanh()
    ),
    "embedding_bag, offsets": lambda p: F.embedding_bag(FLAT, p, OFFSETS),
    "embedding_bag, last offset": lambda p: F.embedding_bag(
        FLAT, p, torch.tensor([0, 2, 6]), include_last_offset=True
    ),
    "embedding_bag, padding": lambda p: F.embedding_bag(TOKENS, p, padding_idx=1),
}


def _loss(name: str) -> Callable[[Tensor], Tensor]:
    outer = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)

    def f(p: Tensor) -> Tensor:
        values = CASES[name](p).reshape(-1)
        return (outer[: len(values)] * (values.sin() + values**2)).sum()

    return f


def _difference(f: Callable[[Tensor], Tensor], p: Tensor, v: Tensor, step: float = 1e-4) -> Tensor:
    """Return the derivative of torch's gradient along v, by central differences of fourth order."""

    def gradient(shift: float) -> Tensor:
        at = (p + shift * step * v).requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    return (8 * (gradient(1) - gradient(-1)) - (gradient(2) - gradient(-2))) / (12 * step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_the_product_is_the_derivative_of_torchs_gradient(name: str, mode: Any) -> None:
    f = _loss(name)
    if name == "huber_loss, weights" and mode != "reverse_over_reverse":
        pytest.skip("weights leave the common case to torch, which has no forward rule for it")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureFallbackWarning)
        found = hvp(f, mode=mode)(P, V)
    oracles.assert_same(found, _difference(f, P, V), 1e-7)


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_torchs(name: str) -> None:
    f = _loss(name)
    _, value = hvp(lambda p: (f(p), f(p)), has_aux=True, mode="reverse_over_reverse")(P, V)
    torch.testing.assert_close(value, f(P), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mistaken",
    [
        lambda p: F.soft_margin_loss(p, SIGNS[:, :3]),
        lambda p: F.multi_margin_loss(p, CLASSES[:3]),
        lambda p: F.multilabel_margin_loss(p, LABELS[:3]),
        lambda p: F.huber_loss(p, X[:3]),
        lambda p: F.cross_entropy(p, CLASSES[:3]),
        lambda p: F.embedding_bag(TOKENS.float(), p).sum(),
    ],
)
def test_a_mistake_is_refused_as_by_torch(mistaken: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, ValueError)) as by_torch:
            mistaken(P)
        with pytest.raises(type(by_torch.value)):
            hvp(mistaken)(P, V)
