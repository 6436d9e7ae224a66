"""Losses: by their derivatives, or written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.taylor.products import total
from secorder_func.taylor.registry import NotCoveredError, Terms, linear, tangent, written

__all__ = ["reduced"]

_F = TypeVar("_F", bound=Callable[..., Tensor])

_OF = getattr(torch.nn._reduction, "legacy_get_string")  # noqa: B009


def _reduction(size_average: Any, reduce: Any, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return str(_OF(size_average, reduce, emit_warning=False))


def reduced(each: Tensor, reduction: Any) -> Any:
    """Reduce as a name, or one of torch's numbers for it, says."""
    if reduction in ("none", 0):
        return each
    return each.mean() if reduction in ("mean", 1) else each.sum()


def _change(t: Terms, input: Tensor, target: Tensor) -> Any:
    """Return the term of their difference."""
    first, second = t(input), t(target)
    return total(first, None if second is None else -second)


def _per_entry(name: str) -> Callable[[_F], _F]:
    """Register a loss of differences, given the derivative in the difference."""

    def register(slope: _F) -> _F:
        @tangent(getattr(F, name), kind="elementwise")
        def push(
            t: Terms,
            out: Tensor,
            input: Tensor,
            target: Tensor,
            size_average: Any = None,
            reduce: Any = None,
            reduction: str = "mean",
            *args: Any,
            **options: Any,
        ) -> Any:
            if options.pop("weight", None) is not None:
                raise NotCoveredError("a weight")
            each = _change(t, input, target) * slope(input - target, *args, **options)
            return reduced(each, _reduction(size_average, reduce, reduction))

        return slope

    return register


@_per_entry("mse_loss")
def _square(d: Tensor) -> Any:
    return 2 * d


@_per_entry("l1_loss")
def _absolute(d: Tensor) -> Any:
    return d.sign()


@_per_entry("smooth_l1_loss")
def _smooth_l1(d: Tensor, beta: float = 1.0) -> Any:
    return d.sign() if beta == 0 else torch.where(d.abs() < beta, d / beta, d.sign())


@tangent(F.huber_loss, kind="elementwise")
def _huber(
    t: Terms,
    out: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Any:
    if weight is not None:
        raise NotCoveredError("a weight")
    return reduced(_change(t, input, target) * (input - target).clamp(-delta, delta), reduction)


linear(F.nll_loss)


@written(F.cross_entropy)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    reduction = _reduction(size_average, reduce, reduction)
    dim = 0 if input.ndim == 1 else 1
    logs = F.log_softmax(input, dim)
    if target.is_floating_point():
        return _of_probabilities(logs, target, weight, reduction, label_smoothing, dim)
    loss = F.nll_loss(logs, target, weight=weight, ignore_index=ignore_index, reduction=reduction)
    if not label_smoothing:
        return loss
    spread = logs if weight is None else logs * _along(weight, dim, logs)
    smooth = -spread.sum(dim).masked_fill(target == ignore_index, 0.0)
    if reduction == "sum":
        smooth = smooth.sum()
    elif reduction == "mean":
        kept = target != ignore_index
        if weight is None:
            smooth = smooth.sum() / kept.sum()
        else:
            smooth = smooth.sum() / weight[target.masked_fill(~kept, 0)].masked_fill(~kept, 0).sum()
    share = label_smoothing / input.shape[dim]
    return (1 - label_smoothing) * loss + share * smooth


def _along(weight: Tensor, dim: int, like: Tensor) -> Any:
    return weight.reshape(-1, *[1] * (like.ndim - 1 - dim))


def _of_probabilities(
    logs: Tensor, target: Tensor, weight: Any, reduction: str, smoothing: float, dim: int
) -> Any:
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logs.shape[dim]
    each = -(logs * target)
    if weight is not None:
        each = each * _along(weight, dim, logs)
    if reduction == "none":
        return each.sum(dim)
    if reduction == "sum":
        return each.sum()
    return each.sum() / (logs.numel() // logs.shape[dim])


@written(F.binary_cross_entropy_with_logits)
def _bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Any:
    if target.size() != input.size():
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    logs = F.logsigmoid(input)
    if pos_weight is None:
        each = (1 - target) * input - logs
    else:
        each = (1 - target) * input - (1 + (pos_weight - 1) * target) * logs
    each = each if weight is None else each * weight
    return reduced(each, _reduction(size_average, reduce, reduction))


@tangent(F.binary_cross_entropy, kind="elementwise")
def _bce(
    t: Terms,
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    first, second = t(input), t(target)
    if t(weight) is not None:
        raise NotCoveredError("a weight that is differentiated")
    # What a share of zero multiplies has no derivative, also where the logarithm has a pole.
    no, yes = target == 0, target == 1
    against = torch.where(yes, 0.0, (1 - target) / torch.where(yes, 1.0, 1 - input))
    for_it = torch.where(no, 0.0, target / torch.where(no, 1.0, input))
    each: Any = None if first is None else first * (against - for_it)
    if second is not None:
        odds = (-input).log1p().clamp(min=-100) - input.log().clamp(min=-100)
        each = total(each, second * odds)
    each = each if weight is None else each * weight
    return reduced(each, _reduction(size_average, reduce, reduction))


@written(F.kl_div)
def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if log_target:
        each = target.exp() * (target - input)
    else:
        entropy = torch.xlogy(target, target)
        each = entropy - target * input
    if reduction == "batchmean":
        return each.sum() / input.shape[0] if input.ndim else each.sum()
    return reduced(each, _reduction(size_average, reduce, reduction))


@written(F.poisson_nll_loss)
def _poisson_nll(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: Any = None,
    eps: float = 1e-8,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    each = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:
        stirling = target * target.log() - target + 0.5 * (2 * math.pi * target).log()
        each = each + torch.where(target > 1, stirling, 0.0)
    return reduced(each, _reduction(size_average, reduce, reduction))


@written(F.soft_margin_loss)
def _soft_margin(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    return reduced(-F.logsigmoid(input * target), _reduction(size_average, reduce, reduction))
