"""Squared gradients, with the signatures of `torch_secorder.approximations.fisher_diagonal`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from secorder_func.compat._fisher import likelihood_gradient, loss_gradient
from secorder_func.transforms.plain_autograd import recording

__all__ = ["empirical_fisher_diagonal", "generalized_fisher_diagonal"]


def empirical_fisher_diagonal(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> list[Tensor]:
    r"""Return the squared gradient of `loss_fn(model(inputs), targets)`, one tensor for each parameter.

    Parameters
    ----------
    model
        Any module with real parameters.
    loss_fn
        `loss_fn(output, targets) -> loss` with one element.
    inputs, targets
        Input and target.

    Returns
    -------
    list of Tensor
        Shaped like `model.parameters()`, in their order; zeros for frozen and unused ones. They carry a graph. Where
        a second derivative does not exist, taking it raises `NoExactRouteError`.

    Raises
    ------
    ArgumentError
        A bad argument, a loss that is not one real number or depends on no parameter, a complex parameter.

    Notes
    -----
    For a mean loss this is :math:`(\frac{1}{N} \sum_n g_n)^2`, the square of the mean gradient. The empirical Fisher
    of the literature is the mean over samples of the squares, :math:`\frac{1}{N} \sum_n g_n^2`: get the gradients of
    the samples from `torch.func.vmap(torch.func.grad(f), in_dims=(None, 0, 0))`, square them and take the mean.
    Costs one gradient. Buffers are left as they are.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    https://doi.org/10.48550/arXiv.1905.12558

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.approximations.fisher_diagonal import empirical_fisher_diagonal
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> empirical_fisher_diagonal(model, torch.nn.MSELoss(), x, y)[0].detach()
    tensor([[ 36., 144.]])
    """
    where = "empirical_fisher_diagonal"
    gradient = loss_gradient(model, loss_fn, inputs, targets, where, graph=True)
    with recording():
        return [g.square() for g in gradient]


def generalized_fisher_diagonal(
    model: Module,
    outputs: Tensor,
    targets: Tensor,
    loss_type: str = "nll",
    create_graph: bool = False,
) -> list[Tensor]:
    r"""Return the squared gradient of the summed log-likelihood of class labels, one tensor for each parameter.

    Parameters
    ----------
    model
        The module whose parameters are differentiated.
    outputs
        Its logits, `(N, C)`, with their graph, which is kept.
    targets
        Class labels, `(N,)`.
    loss_type
        `"nll"`, in any case of letters.
    create_graph
        Whether the result can be differentiated again.

    Returns
    -------
    list of Tensor
        Shaped like `model.parameters()`, in their order; zeros for frozen and unused ones.

    Raises
    ------
    NotImplementedError
        Another `loss_type`, or other shapes.
    ArgumentError
        `outputs` carry no graph, or one that reaches no parameter of the model; a complex parameter.
    NoExactRouteError
        `create_graph=True`, and torch has no derivative of the gradient.

    Notes
    -----
    It is the square of a sum over samples, at the labels given: neither the per-sample empirical Fisher nor the
    expectation over the model's own labels. `outputs` were computed outside, so what this library repairs in torch's
    third derivatives is not repaired in them. Costs the backward pass.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.approximations.fisher_diagonal import generalized_fisher_diagonal
    >>> model, x = torch.nn.Linear(2, 2), torch.tensor([[2.0, 4.0]])
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> generalized_fisher_diagonal(model, model(x), torch.tensor([0]))
    [tensor([[1., 4.],
            [1., 4.]]), tensor([0.2500, 0.2500])]
    """
    gradient = likelihood_gradient(
        model,
        outputs,
        targets,
        loss_type,
        "generalized_fisher_diagonal",
        create_graph=create_graph,
    )
    with recording():
        return [g.square() for g in gradient]
