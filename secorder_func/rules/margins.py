"""Piecewise losses and activations that torch differentiates once, or twice by reverse mode only, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.losses import REDUCTIONS, reduced
from secorder_func.rules.registry import Rules, forward_is_differentiated, repairs

__all__: list[str] = []

_NO_SECOND = "its backward has no derivative in torch"
_NO_FORWARD = "its backward has no forward rule in torch"


@repairs(F.soft_margin_loss, because=_NO_FORWARD)
def _soft_margin_loss(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    unusual = size_average is not None or reduce is not None or input.shape != target.shape
    if unusual or reduction not in REDUCTIONS:
        return F.soft_margin_loss(input, target, size_average, reduce, reduction)
    z = -target * input
    return reduced(torch.logaddexp(torch.zeros_like(z), z), reduction)


@repairs(F.huber_loss, because=_NO_FORWARD)
def _huber_loss(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or reduction not in REDUCTIONS or input.shape != target.shape:
        extra = {} if weight is None else {"weight": weight}
        return F.huber_loss(input, target, reduction, delta, **extra)
    residual = input - target
    size = residual.abs()
    losses = torch.where(size <= delta, 0.5 * residual * residual, delta * (size - 0.5 * delta))
    return reduced(losses, reduction)


@repairs(F.hardsigmoid, because=_NO_SECOND)
def _hardsigmoid(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return F.hardsigmoid(input, inplace=True)
    return F.relu6(input + 3) / 6


@repairs(F.rrelu, torch.rrelu, because="vmap has no rule for it")
def _rrelu(
    rules: Rules,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if training or inplace:
        return F.rrelu(input, lower, upper, training, inplace)
    return F.leaky_relu(input, (lower + upper) / 2)


@repairs(F.multi_margin_loss, because=_NO_SECOND)
def _multi_margin_loss(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if input.ndim < 2 and target.numel() == 1:
        batch = _multi_margin_loss(
            rules,
            input.reshape(1, -1),
            target.reshape(1),
            p,
            margin,
            weight,
            size_average,
            reduce,
            reduction,
        )
        return batch.reshape(())
    unusual = size_average is not None or reduce is not None or input.ndim != 2
    unusual = unusual or target.shape != input.shape[:1]
    if unusual or p not in (1, 2) or reduction not in REDUCTIONS:
        return F.multi_margin_loss(
            input, target, p, margin, weight, size_average, reduce, reduction
        )
    chosen = target.unsqueeze(1)
    gaps = (margin - input.gather(1, chosen) + input).clamp(min=0)  # (samples, classes)
    if p == 2:
        gaps = gaps * gaps
    if weight is not None:
        gaps = gaps * weight[target].unsqueeze(1)
    others = torch.ones_like(input).scatter(1, chosen, 0.0)
    return reduced((gaps * others).sum(1) / input.shape[1], reduction)


@repairs(F.multilabel_margin_loss, because=_NO_SECOND)
def _multilabel_margin_loss(
    rules: Rules,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if input.ndim < 2 and target.ndim < 2:
        batch = _multilabel_margin_loss(
            rules, input.reshape(1, -1), target.reshape(1, -1), size_average, reduce, reduction
        )
        return batch.reshape(())
    unusual = size_average is not None or reduce is not None or input.ndim != 2
    if unusual or target.shape != input.shape or reduction not in REDUCTIONS:
        return F.multilabel_margin_loss(input, target, size_average, reduce, reduction)
    valid = (target >= 0).cumprod(1).to(input.dtype)  # a label of -1 ends a sample's list
    labels = target.clamp(min=0)
    is_label = torch.zeros_like(input).scatter_add(1, labels, valid).clamp(max=1)
    gaps = 1 - input.gather(1, labels).unsqueeze(2) + input.unsqueeze(1)  # (samples, label, class)
    counted = valid.unsqueeze(2) * (1 - is_label).unsqueeze(1)
    return reduced((gaps.clamp(min=0) * counted).sum((1, 2)) / input.shape[1], reduction)


@repairs(
    F.cosine_embedding_loss,
    because="its forward derivative by forward over reverse is 20 to 60 % off (2.13)",
)
def _cosine_embedding_loss(
    rules: Rules,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    unusual = size_average is not None or reduce is not None or reduction not in REDUCTIONS
    if unusual or not forward_is_differentiated(rules):
        return F.cosine_embedding_loss(
            input1, input2, target, margin, size_average, reduce, reduction
        )
    tiny = 1e-12  # torch's
    sizes = ((input1 * input1).sum(-1) + tiny) * ((input2 * input2).sum(-1) + tiny)
    cosine = (input1 * input2).sum(-1) / sizes.sqrt()
    zero = torch.zeros_like(cosine)
    apart = torch.where(target == -1, (cosine - margin).clamp(min=0), zero)
    return reduced(torch.where(target == 1, 1 - cosine, apart), reduction)
