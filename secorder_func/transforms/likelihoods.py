"""Likelihoods: what turns the outputs of a model into the distribution of a target.

A likelihood is a function `outputs -> torch.distributions.Distribution`, nothing more. These are the usual ones; for
another one write it down: `lambda outputs: Normal(outputs[..., 0], outputs[..., 1].exp())`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from secorder_func.checks import check_number
from secorder_func.errors import ArgumentError, ArgumentTypeError, message

__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian"]

Likelihood: TypeAlias = Callable[[Any], Distribution]
"""The outputs of a model -> the distribution of the targets given these outputs."""


def categorical(axis: int = -1) -> Likelihood:
    """Return the likelihood of class labels whose logits lie along an axis of the outputs.

    Its negative logarithm is `F.cross_entropy`, which wants the classes along `axis=1` of outputs `(N, C, d1, ...)`.

    >>> import torch
    >>> categorical()(torch.zeros(8, 3)).batch_shape
    torch.Size([8])
    >>> categorical(axis=1)(torch.zeros(8, 3, 5)).batch_shape
    torch.Size([8, 5])
    """
    if isinstance(axis, bool) or not isinstance(axis, int):
        problem = f"axis must be a whole number, got {type(axis).__name__}"
        raise ArgumentTypeError(message("likelihoods.categorical", problem))

    def labels(outputs: Any) -> Distribution:
        logits = _tensor(outputs, "categorical", "Categorical(logits=outputs['logits'])")
        return Categorical(logits=logits.movedim(axis, -1), validate_args=False)

    return labels


def bernoulli() -> Likelihood:
    """Return the likelihood of independent labels 0 or 1, one logit each.

    Its negative logarithm is `F.binary_cross_entropy_with_logits`.

    >>> import torch
    >>> bernoulli()(torch.zeros(8, 3)).batch_shape
    torch.Size([8, 3])
    """

    def labels(outputs: Any) -> Distribution:
        logits = _tensor(outputs, "bernoulli", "Bernoulli(logits=outputs['logits'])")
        return Bernoulli(logits=logits, validate_args=False)

    return labels


def gaussian(variance: float | Tensor = 1.0) -> Likelihood:
    """Return the likelihood of independent real targets around the outputs, with one variance for all.

    Its negative logarithm is half the squared error over the variance, up to a constant: `F.mse_loss` for a variance
    of 0.5.

    >>> import torch
    >>> gaussian(0.25)(torch.zeros(8, 3)).stddev.unique()
    tensor([0.5000])
    """
    check_number(variance, "likelihoods.gaussian", name="variance")
    if not variance > 0:
        problem = f"variance must be positive, got {float(variance)}"
        raise ArgumentError(message("likelihoods.gaussian", problem))

    def around(outputs: Any) -> Distribution:
        loc = _tensor(outputs, "gaussian", "Normal(outputs['mean'], 1.0)")
        return Normal(loc, variance**0.5, validate_args=False)

    return around


def _tensor(outputs: Any, name: str, example: str) -> Tensor:
    if not isinstance(outputs, Tensor):
        problem = f"the outputs must be one tensor, got {type(outputs).__name__}"
        mend = f"Write a likelihood of your own, such as lambda outputs: {example}"
        raise ArgumentTypeError(message(f"likelihoods.{name}", problem, mend))
    return outputs
