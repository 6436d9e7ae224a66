"""Sums of squared gradients, with the signatures of `torch_secorder.approximations.fisher_trace`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from secorder_func.checks import check_count
from secorder_func.compat._fisher import likelihood_gradient, loss_gradient, total
from secorder_func.transforms.plain_autograd import recording

__all__ = ["empirical_fisher_trace", "generalized_fisher_trace"]


def empirical_fisher_trace(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    num_samples: int = 1,
) -> Tensor:
    r"""Return the squared norm of the gradient of `loss_fn(model(inputs), targets)`.

    Parameters
    ----------
    model, loss_fn, inputs, targets
        As for `empirical_fisher_diagonal`.
    num_samples
        At least 1, and without effect, here as in the original: the number is exact.

    Returns
    -------
    Tensor
        0-dim, without a graph; of the parameters' dtype, float32 if that is narrower.

    Raises
    ------
    ArgumentError
        As for `empirical_fisher_diagonal`; also `num_samples` below one.

    Notes
    -----
    The sum of `empirical_fisher_diagonal`, with what is said there on samples. Costs one gradient.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.approximations.fisher_trace import empirical_fisher_trace
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> empirical_fisher_trace(model, torch.nn.MSELoss(), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
    tensor(180.)
    """
    where = "empirical_fisher_trace"
    check_count(num_samples, where, name="num_samples")
    return total(loss_gradient(model, loss_fn, inputs, targets, where, graph=False))


def generalized_fisher_trace(
    model: Module,
    outputs: Tensor,
    targets: Tensor,
    loss_type: str = "nll",
    num_samples: int = 1,
    create_graph: bool = False,
) -> Tensor:
    r"""Return the squared norm of the gradient of the summed log-likelihood of class labels.

    Parameters
    ----------
    model, outputs, targets, loss_type, create_graph
        As for `generalized_fisher_diagonal`.
    num_samples
        At least 1, and without effect, here as in the original: the number is exact.

    Returns
    -------
    Tensor
        0-dim; of the parameters' dtype, float32 if that is narrower.

    Raises
    ------
    NotImplementedError, ArgumentError, NoExactRouteError
        As for `generalized_fisher_diagonal`; `ArgumentError` also for `num_samples` below one.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.approximations.fisher_trace import generalized_fisher_trace
    >>> model, x = torch.nn.Linear(2, 2), torch.tensor([[2.0, 4.0]])
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> generalized_fisher_trace(model, model(x), torch.tensor([0]))
    tensor(10.5000)
    """
    where = "generalized_fisher_trace"
    check_count(num_samples, where, name="num_samples")
    gradient = likelihood_gradient(
        model, outputs, targets, loss_type, where, create_graph=create_graph
    )
    with recording():
        return total(gradient)
