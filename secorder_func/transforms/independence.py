"""Whether the samples of a batch have the curvature in it that they have alone.

Values alone do not tell: at a zero of some parameter, the influence of one sample on another may show in derivatives
only. So first and second derivatives along a random direction are compared, too, for some samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from secorder_func import tree
from secorder_func.errors import ArgumentError, message
from secorder_func.rules import evaluated
from secorder_func.rules.in_double import InDouble, widened
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import vjp, without_vmap_warnings
from secorder_func.transforms.hessian import hvp_and_grad
from secorder_func.transforms.loss import Leaves
from secorder_func.transforms.samples import Samples

__all__ = [
    "LOOKED_AT",
    "MIXED",
    "fixed_normal",
    "looking",
    "outputs_alone",
    "refuse_dependent_losses",
    "refuse_dependent_outputs",
    "same_pullbacks",
    "watched",
]

MIXED = "the samples of the batch influence each other"
LOOKED_AT = 16
"""How many samples are compared."""

LossOf = Callable[[Leaves, Any], Tensor]
"""(where, batch) -> one loss a sample, or one number."""
OutputsOf = Callable[[Leaves, Any], Leaves]


def watched(evaluate: Callable[[], Any], leaves: Leaves, where: str) -> tuple[Any, bool]:
    """Return what `evaluate` does, and whether it drew random numbers; refuse batch statistics.

    Modules are left as they are; random generators as one evaluation leaves them.
    """
    state = RandomState.now(leaves)

    def under_watch(rules: Any) -> Any:
        with _BatchStatistics(where):
            return evaluate()

    with out_of_inference_mode(), torch.no_grad():
        result = evaluated(under_watch, forward=False, higher=False, protect=leaves)
    return result, state.has_changed()


class _BatchStatistics(TorchFunctionMode):
    """Refuses to normalise over the samples of a batch."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            named = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
            if named.get("training") or named.get("running_mean") is None:
                problem = f"{MIXED}: batch normalisation uses the statistics of the batch"
                mend = "Put the module into eval mode, or replace BatchNorm (GroupNorm, LayerNorm)"
                raise ArgumentError(message(self._where, problem, mend))
        return func(*args, **kwargs)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")


def refuse_dependent_losses(
    loss_of: LossOf, leaves: Leaves, samples: Samples, state: RandomState, random: bool, where: str
) -> None:
    """Refuse a loss of a batch that does not consist of those that its samples have alone.

    One loss a sample must be that loss. A single number must be the sum, or the mean, for all samples that are looked
    at and for their halves. Where random numbers are drawn, which differ from sample to sample in a batch, it is seen
    whether other samples in its place make a difference to half of them; a single number is then not looked at.

    Of losses that were fitted, little but rounding may be left: what contradicts is looked at again in double
    precision, to the same tolerance.
    """
    error = _dependence(loss_of, leaves, samples, state, random, where)
    if error is None:
        return

    def more_precisely(at: Leaves, batch: Any) -> Tensor:
        with InDouble():
            return loss_of(at, batch)

    wide = Samples(widened(samples.tensors), samples.restore)
    eps = _eps(leaves)
    with suppress(Exception):  # there may be no such
        if _dependence(more_precisely, widened(leaves), wide, state, random, where, eps) is None:
            return
    raise error


def _eps(tensors: Sequence[Tensor]) -> float:
    """Return the largest unit roundoff of some tensors."""
    return max(torch.finfo(t.dtype).eps for t in tensors)


def _dependence(
    loss_of: LossOf,
    leaves: Leaves,
    samples: Samples,
    state: RandomState,
    random: bool,
    where: str,
    eps: float = 0.0,
) -> ArgumentError | None:
    """Return what shows that samples influence each other by more than rounding does, of at least `eps`; else None."""
    some = samples.some(LOOKED_AT)
    direction = fixed_normal(leaves)
    weights = fixed_normal((leaves[0].new_zeros(some.count),))[0].abs() + 0.5
    whole = some.restore(some.tensors)
    with looking(state):
        value = evaluated(lambda rules: loss_of(leaves, whole), forward=False, higher=False)
    each = value.shape == (some.count,)
    eps = max(eps, _eps((value, *leaves)))

    def measured(batch: Any, kept: Tensor | None) -> Tensor:
        def total(at: Leaves) -> Tensor:
            found = loss_of(at, batch)
            return found.sum() if kept is None else (found * kept.to(found)).sum()

        with looking(state):
            return _measured(total, leaves, direction)

    if random:
        half = (some.count + 1) // 2
        if not each or half == some.count:
            return None
        kept = weights * (torch.arange(some.count, device=weights.device) < half)
        other = some.with_others_replaced(half)
        pair = [measured(part.restore(part.tensors), kept) for part in (some, other)]
        if not _near(pair[0], pair[1], pair[1].abs().sum(), eps):
            return ArgumentError(message(where, f"{MIXED}: others change their losses", _OUT))
        return None
    with looking(state):
        alone = vmap(
            lambda row: _measured(lambda at: loss_of(at, some.alone(row)).sum(), leaves, direction),
            randomness="same",
        )(some.tensors)
    if each:
        expected = (weights.to(alone).unsqueeze(1) * alone).sum(0)
        scale = (weights.to(alone).unsqueeze(1) * alone).abs().sum()
        if not (
            agree(value, alone[:, 0], eps) and _near(measured(whole, weights), expected, scale, eps)
        ):
            problem = f"{MIXED}: in the batch they have other losses than alone"
            return ArgumentError(message(where, problem, _OUT))
        return None
    half = some.count // 2
    parts = [slice(0, some.count), *([slice(0, half), slice(half, some.count)] if half else [])]
    numbers = [measured(some.batch(part), None) for part in parts]
    for reduced in (torch.sum, torch.mean):
        if all(
            _near(found, reduced(alone[part], 0), reduced(alone[part].abs(), 0).sum(), eps)
            for found, part in zip(numbers, parts, strict=True)
        ):
            return None
    total, mean = float(alone[:, 0].sum()), float(alone[:, 0].mean())
    problem = (
        f"{MIXED}, or are weighted: the loss of {some.count} samples is {float(value):.6g}, neither the sum "
        f"{total:.6g} nor the mean {mean:.6g} of the losses that they have alone, or so are its derivatives, or those "
        "of half of the samples"
    )
    missing = int(alone[:, 0].isnan().sum())
    if missing and bool(value.isfinite()):
        problem = (
            f"{missing} of {some.count} samples have a loss of NaN alone, as by ignored targets"
        )
    return ArgumentError(message(where, problem, "Return one loss a sample (reduction='none')"))


_OUT = "Take out what looks at other samples"


def refuse_dependent_outputs(
    outputs_of: OutputsOf,
    leaves: Leaves,
    samples: Samples,
    state: RandomState,
    random: bool,
    where: str,
) -> None:
    """Refuse a model that gives samples other outputs in a batch than alone, or other Jacobians."""
    some = samples.some(LOOKED_AT)
    whole = some.restore(some.tensors)
    problem = f"{MIXED}: in the batch they have other outputs than alone"
    if random:
        half = (some.count + 1) // 2
        other = some.with_others_replaced(half)

        def kept(batch: Any) -> Callable[[Leaves], Leaves]:
            return lambda at: tuple(z[:half] for z in outputs_of(at, batch))

        with looking(state):
            first = kept(whole)
            second = kept(other.restore(other.tensors))
            same = half == some.count or same_pullbacks(first, second, leaves, state)
        if not same:
            raise ArgumentError(message(where, problem, _OUT))
        return
    with looking(state):
        if not same_pullbacks(
            lambda at: outputs_of(at, whole), outputs_alone(outputs_of, some), leaves, state
        ):
            raise ArgumentError(message(where, problem, _OUT))


def outputs_alone(outputs_of: OutputsOf, samples: Samples) -> Callable[[Leaves], Leaves]:
    """Return leaves -> the outputs of all samples, each computed alone."""

    def outputs(at: Leaves) -> Leaves:
        mapped = vmap(lambda row: outputs_of(at, samples.alone(row)), randomness="same")
        return tuple(z.flatten(0, 1) for z in mapped(samples.tensors))

    return outputs


def same_pullbacks(
    first: Callable[[Leaves], Leaves],
    second: Callable[[Leaves], Leaves],
    leaves: Leaves,
    state: RandomState,
) -> bool:
    """Say whether two functions have equal values, and equal pullbacks of a random cotangent: equal Jacobians, then."""
    found = []
    for function in (first, second):
        with state.replayed():
            found.append(vjp(function, leaves))
    (values, pull), (others, pull_other) = found
    if not all(agree(a, b) for a, b in zip(values, others, strict=True)):
        return False
    cotangents = fixed_normal(values)
    (one,), (two,) = pull(cotangents), pull_other(cotangents)
    apart = sum(float((a - b).abs().square().sum()) for a, b in zip(one, two, strict=True)) ** 0.5
    size = sum(float(b.abs().square().sum()) for b in two) ** 0.5
    eps = _eps((*values, *leaves))
    return not apart > 8 * eps**0.5 * size


def agree(batch: Tensor, alone: Tensor, eps: float = 0.0) -> bool:
    """Say whether samples have equal values in two ways, each in its own size, but for rounding, of at least `eps`."""
    if batch.shape != alone.shape:
        return False
    eps = max(eps, _eps((batch, alone)))
    dtype = torch.promote_types(batch.dtype, alone.dtype)
    first, second = (t.detach().to(dtype).reshape(t.shape[0], -1) for t in (batch, alone))
    if not first.numel():
        return True
    sizes = torch.nan_to_num(second.abs(), posinf=0.0).amax(1, keepdim=True)
    allowed = eps**0.5 * sizes + 64 * eps * sizes.amax()
    same = ((first - second).abs() <= allowed) | (first == second)
    return bool((same | (first.isnan() & second.isnan())).all())


def _measured(f: Callable[[Leaves], Tensor], leaves: Leaves, direction: Leaves) -> Tensor:
    """Return value, slope and curvature of a scalar function along a direction."""

    def with_value(at: Leaves) -> Any:
        value = f(tuple(at))
        return value, value.detach()

    (product, gradient), value = hvp_and_grad(with_value, has_aux=True)(leaves, direction)
    slope, curvature = tree.dot(direction, gradient), tree.dot(direction, product)
    return torch.stack([value.reshape(()).to(slope), slope, curvature.to(slope)])


def _near(found: Tensor, expected: Tensor, scale: Tensor, eps: float) -> bool:
    """Say whether numbers are equal but for rounding; what is NaN on both sides is."""
    allowed = 8 * eps**0.5 * torch.nan_to_num(scale)
    allowed = torch.stack([allowed / 64, allowed, allowed])  # of the value, which sums less
    same = ((found - expected).abs() <= allowed) | (found.isnan() & expected.isnan())
    return bool(same.all())


def fixed_normal(likes: Sequence[Tensor]) -> Leaves:
    """Return random numbers that are always the same, whatever the caller's generators."""
    generator = torch.Generator().manual_seed(20)
    return tuple(
        torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device, t.dtype)
        for t in likes
    )


@contextmanager
def looking(state: RandomState) -> Iterator[None]:
    """Draw the random numbers of a state, out of inference mode, and without vmap's advice."""
    with state.replayed(), out_of_inference_mode(), torch.enable_grad(), without_vmap_warnings():
        yield
