"""Connectionist temporal classification, written out.

The forward recursion over the states of the extended labels (a blank between any two) in logarithms, which is
differentiable any number of times. torch's own backward has no derivative. Its gradient in `log_probs` leaves out
what a `log_softmax` before would cancel; through one, both gradients are the same.

A. Graves, S. Fernandez, F. Gomez, J. Schmidhuber, Connectionist temporal classification, ICML 2006.
https://doi.org/10.1145/1143844.1143891
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.levels import unwrapped
from secorder_func.rules.losses import REDUCTIONS
from secorder_func.rules.registry import Rules, repairs

__all__: list[str] = []

_IMPOSSIBLE = -1e30
"""The logarithm of no probability, finite so that it has derivatives."""


@repairs(F.ctc_loss, because="its backward has no derivative in torch")
def _ctc_loss(
    rules: Rules,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    if reduction not in REDUCTIONS or torch.compiler.is_compiling():
        return F.ctc_loss(
            log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
        )
    device = log_probs.device
    durations = unwrapped(torch.as_tensor(input_lengths, device=device)).reshape(-1)
    sizes = unwrapped(torch.as_tensor(target_lengths, device=device)).reshape(-1)
    single = log_probs.ndim == 2
    if single:
        log_probs = log_probs.unsqueeze(1)
    labels = _padded(targets, sizes)
    losses = -_log_likelihood(log_probs, labels, durations, sizes, blank)
    losses = torch.where(losses > -_IMPOSSIBLE / 10, torch.inf, losses)
    if zero_infinity:
        losses = torch.where(losses.isinf(), 0.0, losses)
    if reduction == "none":
        return losses[0] if single else losses
    if reduction == "sum":
        return losses.sum()
    return (losses / sizes.clamp(min=1)).mean()


def _padded(targets: Tensor, sizes: Tensor) -> Tensor:
    """Return labels of shape (samples, longest); what stands behind a sample's size does not matter."""
    if targets.ndim == 2:
        return targets
    longest = int(sizes.max()) if len(sizes) else 0
    places = (sizes.cumsum(0) - sizes).unsqueeze(1) + torch.arange(longest, device=sizes.device)
    return targets[places.clamp(max=max(0, len(targets) - 1))]


def _log_likelihood(
    log_probs: Tensor, labels: Tensor, durations: Tensor, sizes: Tensor, blank: int
) -> Tensor:
    """Return the logarithm of the probability of each sample's labels, shape (samples,)."""
    samples, longest = labels.shape
    extended = labels.new_full((samples, 2 * longest + 1), blank)
    extended[:, 1::2] = labels
    skips = torch.zeros_like(extended, dtype=torch.bool)  # from a label to the next, another one
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    emitted = log_probs.gather(2, extended.expand(len(log_probs), -1, -1))  # (time, samples, state)

    states = torch.arange(2 * longest + 1, device=labels.device)
    begin = torch.where(states < 2, 0.0, _IMPOSSIBLE).to(log_probs.dtype)
    alpha = emitted[0] + begin
    for time in range(1, len(log_probs)):
        step = F.pad(alpha, (1, 0), value=_IMPOSSIBLE)[:, :-1]
        jump = F.pad(alpha, (2, 0), value=_IMPOSSIBLE)[:, :-2]
        jump = torch.where(skips, jump, _IMPOSSIBLE)
        moved = torch.logsumexp(torch.stack([alpha, step, jump]), 0) + emitted[time]
        alpha = torch.where((time < durations).unsqueeze(1), moved, alpha)

    last = alpha.gather(1, (2 * sizes).unsqueeze(1))
    before = alpha.gather(1, (2 * sizes - 1).clamp(min=0).unsqueeze(1))
    before = torch.where((sizes > 0).unsqueeze(1), before, _IMPOSSIBLE)
    total: Tensor = torch.logsumexp(torch.cat([last, before], 1), 1)
    return total
