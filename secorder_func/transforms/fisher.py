"""Fisher matrices as Gauss-Newton matrices of another model and another loss.

The Fisher matrix of a likelihood is `J^T F J`, `F` the Fisher information in the outputs: the Gauss-Newton matrix of a
loss with the Hessian `F`. A sum of outer products of gradients is the Gauss-Newton matrix of half the sum of squares of
what the gradients are of. So whatever multiplies with Gauss-Newton matrices multiplies with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, distributions
from torch.distributions import Distribution

from secorder_func import tree
from secorder_func.checks import check_callable
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.levels import mapping
from secorder_func.transforms import likelihoods
from secorder_func.transforms.forms import checked_value
from secorder_func.transforms.likelihoods import Likelihood
from secorder_func.typing import LossFn, ModelFn

__all__ = [
    "Reduction",
    "check_likelihood",
    "check_reduction",
    "detached",
    "distribution_at",
    "empirical_fisher",
    "exact_fisher",
    "information",
    "sampled_fisher",
]

Reduction: TypeAlias = Literal["mean", "sum"]


def exact_fisher(
    model_fn: ModelFn, likelihood: Likelihood, reduction: Reduction, where: str
) -> tuple[ModelFn, LossFn]:
    """Return the model and the loss whose Gauss-Newton matrix is the Fisher matrix.

    The loss takes in the place of targets the outputs that it is not to be differentiated in, if someone outside
    differentiates the matrix in them; else None.
    """

    def loss(outputs: Any, fixed: Any) -> Tensor:
        at = distribution_at(likelihood, outputs, where)
        same = distribution_at(
            likelihood, detached(outputs) if fixed is None else fixed, where, validate=True
        )
        found = information(at, same, where)
        return found / at.batch_shape.numel() if reduction == "mean" else found

    return model_fn, loss


def sampled_fisher(
    model_fn: ModelFn, likelihood: Likelihood, reduction: Reduction, where: str
) -> tuple[ModelFn, LossFn]:
    """Return the model and the loss whose Gauss-Newton matrix is the mean over draws of outer products of scores.

    The model takes `(inputs, draws)`, draws of shape `(N, M, ...)`, and returns their log-probabilities `(N, M, ...)`.
    """

    def log_probabilities(params: Any, inputs_and_draws: Any) -> Tensor:
        inputs, draws = inputs_and_draws
        outputs = model_fn(params, inputs)
        with _unvalidated():
            values = distribution_at(likelihood, outputs, where).log_prob(draws.movedim(1, 0))
        return values.movedim(0, 1)

    return log_probabilities, _half_squares(reduction)


def empirical_fisher(
    model_fn: ModelFn, loss_fn: LossFn, reduction: Reduction, where: str
) -> tuple[ModelFn, LossFn]:
    """Return the model and the loss whose Gauss-Newton matrix is the sum of outer products of samples' gradients.

    The model takes `(inputs, targets)` and returns the losses of the samples, `(N,)`.
    """

    def losses(params: Any, inputs_and_targets: Any) -> Tensor:
        inputs, targets = inputs_and_targets
        return _one_a_sample(loss_fn(model_fn(params, inputs), targets), where)

    return losses, _half_squares(reduction)


def _half_squares(reduction: Reduction) -> LossFn:
    """Return the loss of values `(N,)` or `(N, draws, ...)`, summed or averaged over all but the mean over draws."""

    def loss(values: Tensor, _: Any) -> Tensor:
        squares = values.square()
        if reduction == "mean":
            return squares.mean() / 2
        return squares.sum() / (2 * values.shape[1] if values.ndim > 1 else 2)

    return loss


# ------------------------------------------------------------------------------ in the outputs


def information(at: Distribution, same: Distribution, where: str = "information") -> Tensor:
    r"""Return a number whose Hessian in what `at` is made of is its Fisher information.

    It is the cross-entropy `-E[log at]`, the expectation over `same`, summed over all entries, or differs from it by a
    constant.

    Parameters
    ----------
    at
        The distribution at the outputs in which the number is differentiated.
    same
        The distribution at the same outputs, detached.

    Raises
    ------
    ArgumentTypeError
        No formula is known to be right for this class. It is known only where the cross-entropy is smooth in closed
        form: that of the Laplace distribution, for one, is not.

    Examples
    --------
    >>> import torch
    >>> from torch.distributions import Poisson
    >>> rate = torch.tensor(4.0)
    >>> torch.func.hessian(lambda r: information(Poisson(r), Poisson(rate)))(rate)
    tensor(0.2500)
    """
    if type(at) in _OF_THE_BASE:
        return information(at.base_dist, same.base_dist, where)  # type: ignore[attr-defined]
    formula = _CROSS_ENTROPIES.get(type(at))
    if formula is None:
        problem = f"the Fisher information of {type(at).__name__} is not known in closed form"
        mend = "Pass num_samples=, for a mean over draws from the distribution"
        raise ArgumentTypeError(message(where, problem, mend))
    return formula(at, same)


def _categorical(at: Any, same: Any) -> Tensor:
    return -torch.sum(same.probs * at.logits)


def _multinomial(at: Any, same: Any) -> Tensor:
    return torch.mul(_categorical(at, same), same.total_count)


def _bernoulli(at: Any, same: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(at.logits, same.probs, reduction="sum")


def _binomial(at: Any, same: Any) -> Tensor:
    each = F.binary_cross_entropy_with_logits(at.logits, same.probs, reduction="none")
    return torch.sum(same.total_count * each)


def _normal(at: Any, same: Any) -> Tensor:
    squares = (same.scale / at.scale).square() + ((at.loc - same.loc) / at.scale).square()
    return torch.sum(squares / 2 + at.scale.log())


def _divergence(at: Distribution, same: Distribution) -> Tensor:
    return torch.sum(distributions.kl_divergence(same, at))


_CROSS_ENTROPIES: dict[type, Callable[[Any, Any], Tensor]] = {
    distributions.Categorical: _categorical,
    distributions.OneHotCategorical: _categorical,
    distributions.OneHotCategoricalStraightThrough: _categorical,
    distributions.Multinomial: _multinomial,
    distributions.Bernoulli: _bernoulli,
    distributions.Binomial: _binomial,
    distributions.Normal: _normal,
    # Those whose divergence in torch is smooth and has the right Hessian; the tests say so of each.
    distributions.Beta: _divergence,
    distributions.Cauchy: _divergence,
    distributions.Dirichlet: _divergence,
    distributions.Exponential: _divergence,
    distributions.Gamma: _divergence,
    distributions.Geometric: _divergence,
    distributions.Gumbel: _divergence,
    distributions.LowRankMultivariateNormal: _divergence,
    distributions.MultivariateNormal: _divergence,
    distributions.Poisson: _divergence,
}
"""By the very class: a class derived from one of these may have other probabilities."""

_OF_THE_BASE = (
    distributions.HalfCauchy,
    distributions.HalfNormal,
    distributions.Independent,
    distributions.InverseGamma,
    distributions.LogNormal,
)
"""Entries together, or the image under a map that no output moves: the information is that of the base."""


# --------------------------------------------------------------------- what the user's functions return


_PRESETS = ("bernoulli", "categorical", "gaussian")


def check_likelihood(likelihood: Any, where: str) -> None:
    """Refuse what is no function of the outputs, and a function that is to be called first."""
    mend = (
        "Pass secorder_func.likelihoods.categorical(), bernoulli() or gaussian(), "
        "or a function such as lambda outputs: Categorical(logits=outputs)"
    )
    if any(likelihood is getattr(likelihoods, name) for name in _PRESETS):
        name = likelihood.__name__
        problem = f"likelihood must be a function of the outputs, got likelihoods.{name} itself"
        raise ArgumentTypeError(message(where, problem, f"Call it: likelihoods.{name}()"))
    if isinstance(likelihood, type) and issubclass(likelihood, Distribution):
        problem = (
            f"likelihood must be a function of the outputs, got the class {likelihood.__name__}, "
            "which may take them for something else, logits for probabilities say"
        )
        raise ArgumentTypeError(message(where, problem, mend))
    check_callable(likelihood, where, name="likelihood", mend=mend)


def check_reduction(reduction: Any, where: str) -> None:
    """Refuse an unknown reduction."""
    if reduction not in ("mean", "sum"):
        problem = f"reduction must be 'mean' or 'sum', got {reduction!r}"
        raise ArgumentError(message(where, problem))


def distribution_at(
    likelihood: Likelihood, outputs: Any, where: str, *, validate: bool = False
) -> Distribution:
    """Return what the likelihood says of the outputs.

    Arguments of the distribution are validated if asked, and if nothing maps: then there is no saying.
    """
    with nullcontext() if validate and not mapping() else _unvalidated():
        found: Any = likelihood(outputs)
    if not isinstance(found, Distribution):
        problem = (
            f"likelihood must return a torch.distributions.Distribution, got {type(found).__name__}"
        )
        mend = "Write it like lambda outputs: Categorical(logits=outputs)"
        raise ArgumentTypeError(message(where, problem, mend))
    return found


def detached(outputs: Any) -> Any:
    """Return the outputs without their history."""
    tensors, restore = tree.tensors_and_rest(outputs)
    return restore([tensor.detach() for tensor in tensors])


_VALIDATION = RLock()


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Make distributions inside without looking at values, which vmap does not show. The switch is global."""
    with _VALIDATION:
        before = Distribution._validate_args
        Distribution.set_default_validate_args(False)
        try:
            yield
        finally:
            Distribution.set_default_validate_args(before)


def _one_a_sample(losses: Any, where: str) -> Tensor:
    """Return the losses of the samples; refuse any other shape."""
    value = checked_value(losses, where)
    if value.ndim == 1:
        return value
    problem = f"loss_fn must return one loss per sample, shape (N,), got shape {tuple(value.shape)}"
    mend = "Sum the losses of each sample: losses.flatten(1).sum(1)"
    if value.ndim == 0:
        problem += ". In the gradient of a sum or a mean those of the samples cannot be told apart"
        mend = "Take reduction='none' in the loss"
    raise ArgumentError(message(where, problem, mend))
