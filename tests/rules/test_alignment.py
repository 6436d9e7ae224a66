"""CTC against the sum over all alignments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import hessian_operator, hvp
from tests import oracles

TIME, CLASSES = 5, 3
LABELS = [(1, 2), (1, 1), (2,), ()]
LENGTHS = [5, 4, 3, 2]


def _logits() -> Tensor:
    shape = (TIME, len(LABELS), CLASSES)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _targets() -> Tensor:
    return torch.tensor([[1, 2], [1, 1], [2, 0], [0, 0]])


SIZES = torch.tensor([len(labels) for labels in LABELS])


def _ctc(logits: Tensor, targets: Any = None, **options: Any) -> Tensor:
    targets = _targets() if targets is None else targets
    log_probs = logits.log_softmax(-1)
    return F.ctc_loss(log_probs, targets, torch.tensor(LENGTHS), SIZES, **options)


def _collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def _by_enumeration(logits: Tensor) -> Tensor:
    """Return each sample's loss as minus the logarithm of the sum over all paths that spell its labels."""
    log_probs = logits.log_softmax(-1)
    losses = []
    for sample, (labels, length) in enumerate(zip(LABELS, LENGTHS, strict=True)):
        paths = itertools.product(range(CLASSES), repeat=length)
        spelling = [path for path in paths if _collapsed(path) == labels]
        scores = [sum(log_probs[t, sample, c] for t, c in enumerate(path)) for path in spelling]
        losses.append(-torch.logsumexp(torch.stack(scores), 0))
    return torch.stack(losses)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_its_product_is_that_of_the_sum_over_alignments(reduction: str, mode: Any) -> None:
    def enumerated(logits: Tensor) -> Tensor:
        losses = _by_enumeration(logits)
        if reduction == "mean":
            return (losses / SIZES.clamp(min=1)).mean()
        return losses.sum() if reduction == "sum" else losses.square().sum()

    def written_out(logits: Tensor) -> Tensor:
        loss = _ctc(logits, reduction=reduction)
        return loss.square().sum() if reduction == "none" else loss

    p, v = _logits(), oracles.random_like(_logits(), 1)
    oracles.assert_same(hvp(written_out, mode=mode)(p, v), oracles.hvp(enumerated, p, v))


def test_concatenated_targets_are_the_same_loss() -> None:
    joined = torch.tensor([label for labels in LABELS for label in labels])
    p, v = _logits(), oracles.random_like(_logits(), 1)
    expected = oracles.hvp(lambda q: (_by_enumeration(q) / SIZES.clamp(min=1)).mean(), p, v)
    oracles.assert_same(hvp(lambda q: _ctc(q, joined))(p, v), expected)


def test_a_single_unbatched_sample_works_and_so_do_many_vectors() -> None:
    def f(logits: Tensor) -> Tensor:
        return F.ctc_loss(logits.log_softmax(-1), torch.tensor([1, 2]), [5], [2], reduction="sum")

    p = _logits()[:, 0]
    enumerated = lambda q: _by_enumeration(q[:, None].expand(-1, 4, -1))[0]  # noqa: E731
    oracles.assert_same(hessian_operator(f, p).dense(), oracles.hessian(enumerated, p))


def test_an_impossible_sample_is_infinite_or_zero_as_in_torch() -> None:
    f = lambda q, zero: F.ctc_loss(  # noqa: E731
        q.log_softmax(-1), torch.tensor([[1, 1, 1]]), [3], [3], reduction="sum", zero_infinity=zero
    )
    p = _logits()[:3, :1]
    seen: list[Tensor] = []
    hvp(lambda q: seen.append(f(q, False).detach()) or q.sum() ** 2)(p, torch.ones_like(p))
    assert all(bool(loss.isinf()) for loss in seen)
    oracles.assert_same(hvp(lambda q: f(q, True) + q.pow(3).sum())(p, torch.ones_like(p)), 6 * p)
