"""Exact Hessian diagonals with the signatures of `torch_secorder.core.hessian_diagonal`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from secorder_func.compat._arguments import (
    Leaves,
    check_func,
    checked_params,
    checked_vector,
    model_parameters,
    with_frozen,
)
from secorder_func.compat._closure import hessian_diagonal_of
from secorder_func.errors import ArgumentError, message
from secorder_func.transforms.plain_autograd import recording

__all__ = ["hessian_diagonal", "model_hessian_diagonal"]


def hessian_diagonal(
    func: Callable[[], Tensor],
    params: list[Tensor],
    v: list[Tensor] | None = None,
    create_graph: bool = False,
    strict: bool = False,
) -> list[Tensor]:
    r"""Return the exact diagonal of the Hessian of `func()`, one tensor for each parameter.

    Parameters
    ----------
    func
        A closure that returns the loss, one element.
    params
        Distinct tensors. One that is frozen (`requires_grad=False`) or that the closure does not use gets zeros; a
        closure that uses none of those that are not frozen is refused.
    v
        Factors: with them entry `i` of the result is `v_i * H_ii`.
    create_graph
        Whether the diagonal can be differentiated again.
    strict
        Whether a frozen or unused parameter is an error instead.

    Returns
    -------
    list of Tensor
        Shaped like `params`.

    Raises
    ------
    ArgumentError, NoExactRouteError
        As for `exact_hvp`.

    Notes
    -----
    Costs one product for every entry of `params`, with the block of its parameter alone, in vectorised chunks; the
    closure is evaluated once.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hessian_diagonal import hessian_diagonal
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_diagonal(lambda: (w**3).sum(), [w])
    [tensor([ 6., 12.])]
    """
    return diagonal(func, params, v, create_graph, strict, "hessian_diagonal")


def model_hessian_diagonal(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    create_graph: bool = False,
    strict: bool = False,
) -> list[Tensor]:
    """Return the exact diagonal of the Hessian of `loss_fn(model(inputs), targets)`.

    Everything else is as for `hessian_diagonal`, with `list(model.parameters())`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hessian_diagonal import model_hessian_diagonal
    >>> model, x, y = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> model_hessian_diagonal(model, torch.nn.MSELoss(), x, y)
    [tensor([[2., 8.]]), tensor([2.])]
    """
    params = list(model_parameters(model, "model_hessian_diagonal"))
    return diagonal(
        lambda: loss_fn(model(inputs), targets),
        params,
        None,
        create_graph,
        strict,
        "model_hessian_diagonal",
    )


def diagonal(
    func: Callable[[], Tensor],
    params: list[Tensor],
    v: list[Tensor] | None,
    create_graph: bool,
    strict: bool,
    where: str,
) -> list[Tensor]:
    """Return the diagonal for the public function `where`."""
    check_func(func, where)
    leaves = checked_params(params, where)
    factors = None if v is None else checked_vector(v, leaves, where).leaves
    free = tuple(leaf for leaf in leaves if leaf.requires_grad)
    if strict:
        _require_all_free(leaves, where)
    with recording(create_graph):
        found: Leaves = ()
        if free:
            found = hessian_diagonal_of(
                func, free, create_graph=create_graph, strict=strict, where=where
            )
        result = list(with_frozen(found, leaves))
        if factors is None:
            return result
        return [factor * entry for factor, entry in zip(factors, result, strict=True)]


def _require_all_free(params: Leaves, where: str) -> None:
    for index, leaf in enumerate(params):
        if not leaf.requires_grad:
            raise ArgumentError(
                message(
                    where,
                    # First in the words of torch, which programs match.
                    "One of the differentiated Tensors does not require grad: strict=True, and "
                    f"params[{index}] does not require grad",
                    "Leave it out of params, or pass strict=False",
                )
            )
