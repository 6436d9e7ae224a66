"""Fisher matrices of a likelihood, and the empirical Fisher matrix of a loss, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from secorder_func import tree
from secorder_func.checks import check_callable, check_count, check_params
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.curvature import ggn_operator
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.rules import evaluated
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.seeds import draw_seed
from secorder_func.transforms.fisher import (
    Reduction,
    check_likelihood,
    check_reduction,
    detached,
    distribution_at,
    empirical_fisher,
    exact_fisher,
    sampled_fisher,
)
from secorder_func.transforms.likelihoods import Likelihood
from secorder_func.transforms.policy import check_mode, differentiated_outside
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = [
    "empirical_fisher_model",
    "empirical_fisher_operator",
    "fisher_model",
    "fisher_operator",
    "number_of_entries",
    "number_of_losses",
]

FisherModel = tuple[ModelFn, LossFn, Any, Any]
"""What a Gauss-Newton operator takes beside the parameters: `(model_fn, loss_fn, inputs, targets)`."""


def fisher_operator(
    model_fn: ModelFn,
    likelihood: Likelihood,
    params: Tree,
    inputs: Any,
    *,
    num_samples: int | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    mode: Mode = "auto",
    check_finite: bool = False,
) -> LinearOperator:
    r"""Return the Fisher matrix `J^T F J` of a likelihood at these parameters.

    `J` is the Jacobian of `model_fn` in `params`; `F = E[s s^T]`, `s` the gradient of the log-probability of a target
    in the outputs, is the Fisher information, the expectation over targets drawn from the model's own distribution.
    No targets are needed.

    Parameters
    ----------
    model_fn, params, inputs
        As for `ggn_operator`.
    likelihood
        `likelihood(outputs) -> torch.distributions.Distribution`: one of `secorder_func.likelihoods`, or a function
        of yours. The distribution's batch shape begins with the samples, `(N, ...)`; its entries are independent. What
        of it is learned, a scale say, is among the outputs.
    num_samples
        None for the exact matrix, of the usual distributions. Else the expectation is a mean over so many draws a
        sample, for every distribution that can be sampled.
    reduction
        `"sum"` over the entries of the batch shape, samples and tokens say, or their `"mean"`: the unit of a loss that
        is the negative log-probability with the same reduction.
    generator
        Decides the draws: each depends on the generator's next value and its number only, so that three draws begin
        with the two. torch's global one by default.
    mode, check_finite
        As for `ggn_operator`.

    Returns
    -------
    LinearOperator
        Symmetric and positive semidefinite, on trees like `params`.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `ggn_operator`; also where `likelihood` returns no distribution, and where the exact information of its
        distribution is not known.

    Notes
    -----
    Costs as `ggn_operator`. Draws cost one evaluation of the model more, with the same random numbers (dropout), and
    outputs and log-probabilities for each draw.
    The exact matrix equals the Gauss-Newton matrix of the negative log-probability where the outputs are the natural
    parameters: `F.cross_entropy` with `likelihoods.categorical()`, `F.binary_cross_entropy_with_logits` with
    `bernoulli()`, `F.mse_loss` with `gaussian(0.5)`.
    Who differentiates the operator in the parameters sees draws as constants. There is no drawing under `vmap`.

    References
    ----------
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21(146), 2020.
    https://jmlr.org/papers/v21/17-678.html

    Examples
    --------
    >>> import torch
    >>> from secorder_func import fisher_operator, likelihoods
    >>> model = lambda params, x: x @ params
    >>> logits = torch.zeros(1, 2)
    >>> fisher_operator(model, likelihoods.categorical(), logits, torch.ones(4, 1)).dense()
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    where = "fisher_operator"
    check_mode(mode, where)
    model, loss, inputs, targets = fisher_model(
        model_fn,
        likelihood,
        params,
        inputs,
        num_samples=num_samples,
        generator=generator,
        reduction=reduction,
        where=where,
    )
    return ggn_operator(model, loss, params, inputs, targets, mode=mode, check_finite=check_finite)


def empirical_fisher_operator(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    reduction: Reduction = "mean",
    mode: Mode = "auto",
    check_finite: bool = False,
) -> LinearOperator:
    r"""Return the empirical Fisher matrix `sum_i g_i g_i^T`, or its mean, at these parameters.

    `g_i` is the gradient of the loss of sample `i` in `params`.

    Parameters
    ----------
    model_fn, params, inputs, targets
        As for `ggn_operator`.
    loss_fn
        `loss_fn(outputs, targets) -> losses` of shape `(N,)`, one loss per sample: take `reduction="none"`, and sum
        what belongs to one sample, the tokens of a sequence say.
    reduction
        `"sum"` over samples, or the `"mean"`, the sum over `N`.
    mode, check_finite
        As for `ggn_operator`.

    Returns
    -------
    LinearOperator
        Symmetric and positive semidefinite, on trees like `params`.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `ggn_operator`; also where the losses are not of shape `(N,)`.

    Notes
    -----
    Costs as `ggn_operator`: the gradients of the samples are never formed.
    It is not the Fisher matrix, whose targets are the model's own, and need not be close to it, nor to the Hessian; see
    the reference. Samples may depend on each other, through batch normalisation say.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent,
    NeurIPS 2019. https://arxiv.org/abs/1905.12558

    Examples
    --------
    >>> import torch
    >>> from secorder_func import empirical_fisher_operator
    >>> model = lambda w, x: x @ w
    >>> half_squares = lambda outputs, y: 0.5 * (outputs - y) ** 2
    >>> x, y = torch.eye(2), torch.tensor([1.0, 2.0])
    >>> empirical_fisher_operator(model, half_squares, torch.zeros(2), x, y, reduction="sum").dense()
    tensor([[1., 0.],
            [0., 4.]])
    """
    where = "empirical_fisher_operator"
    check_mode(mode, where)
    model, loss, both, none = empirical_fisher_model(
        model_fn, loss_fn, params, inputs, targets, reduction=reduction, where=where
    )
    return ggn_operator(model, loss, params, both, none, mode=mode, check_finite=check_finite)


# ------------------------------------------------------------------------ what an operator is made of


def fisher_model(
    model_fn: ModelFn,
    likelihood: Likelihood,
    params: Tree,
    inputs: Any,
    *,
    num_samples: int | None,
    generator: torch.Generator | None,
    reduction: Reduction,
    where: str,
) -> FisherModel:
    """Return the model, loss, inputs and targets whose Gauss-Newton matrix is the Fisher matrix.

    Leading axes of inputs and targets are samples, if those of `inputs` and of the outputs are.
    """
    check_callable(model_fn, where, name="model_fn")
    check_likelihood(likelihood, where)
    check_params(params, where)
    check_reduction(reduction, where)
    if num_samples is None:
        model, loss = exact_fisher(model_fn, likelihood, reduction, where)
        outside = differentiated_outside(params, inputs)
        fixed = _outputs(model_fn, params, inputs, differentiable=True) if outside else None
        return model, loss, inputs, fixed
    check_count(num_samples, where, name="num_samples")
    model, loss = sampled_fisher(model_fn, likelihood, reduction, where)
    seed = draw_seed(generator)
    outputs = detached(_outputs(model_fn, params, inputs, differentiable=False))
    distribution = distribution_at(likelihood, outputs, where, validate=True)
    draws = _draws(distribution, num_samples, seed, tree.tensors_in(outputs), where)
    return model, loss, (inputs, draws), None


def empirical_fisher_model(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    reduction: Reduction,
    where: str,
) -> FisherModel:
    """Return the same as `fisher_model` for the empirical Fisher matrix."""
    check_callable(model_fn, where, name="model_fn")
    check_callable(loss_fn, where, name="loss_fn")
    check_params(params, where)
    check_reduction(reduction, where)
    model, loss = empirical_fisher(model_fn, loss_fn, reduction, where)
    return model, loss, (inputs, targets), None


def number_of_entries(
    model_fn: ModelFn, likelihood: Likelihood, params: Tree, inputs: Any, where: str
) -> int:
    """Return how many entries the likelihood has of some inputs: samples, or tokens."""
    outputs = detached(_outputs(model_fn, params, inputs, differentiable=False))
    return distribution_at(likelihood, outputs, where).batch_shape.numel()


def number_of_losses(model: FisherModel, params: Tree) -> int:
    """Return how many losses there are, of what `empirical_fisher_model` returned."""
    losses, _, both, _ = model
    return int(_outputs(losses, params, both, differentiable=False).shape[0])


def _outputs(model_fn: ModelFn, params: Tree, inputs: Any, *, differentiable: bool) -> Any:
    """Return the model's outputs; leave no trace of the evaluation, so that the next one draws what it drew."""
    params, inputs = without_inference_tensors((params, inputs))
    leaves = tree.tensors_in(params)
    with (
        out_of_inference_mode(),
        torch.set_grad_enabled(differentiable and torch.is_grad_enabled()),
        RandomState.now(leaves).replayed(),
    ):
        return evaluated(
            lambda rules: model_fn(params, inputs),
            forward=False,
            higher=differentiable,
            protect=leaves,
        )


def _draws(
    distribution: Distribution, count: int, seed: int, tensors: list[Tensor], where: str
) -> Tensor:
    """Return draws of shape `(N, count, ...)`; each depends on the seed and its number only."""
    name = type(distribution).__name__
    if not distribution.batch_shape:
        raise ArgumentError(
            message(
                where,
                f"the batch shape of the likelihood's {name} must begin with the samples, got ()",
                "Give the outputs a leading axis, or Independent one axis fewer",
            )
        )
    seeds = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(count):
        with RandomState.seeded(draw_seed(seeds), tensors).replayed():
            try:
                draws.append(distribution.sample())
            except NotImplementedError as error:
                problem = f"the likelihood's {name} has no sample()"
                mend = "Pass num_samples=None, if its exact information is known, or implement it"
                raise ArgumentTypeError(message(where, problem, mend)) from error
    return torch.stack(draws, 1)
