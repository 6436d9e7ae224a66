"""The diagonal of the Gauss-Newton matrix, with the signature of `torch_secorder.approximations.gauss_newton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, MSELoss

from secorder_func.checks import check_callable
from secorder_func.compat._fisher import free_parameters
from secorder_func.compat._gradient import traceable
from secorder_func.compat._jacobian import ClosureJacobian
from secorder_func.errors import ArgumentError, message
from secorder_func.rules.inference import without_inference_tensors

__all__ = ["gauss_newton_matrix_approximation"]


def gauss_newton_matrix_approximation(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    create_graph: bool = False,
) -> list[Tensor]:
    r"""Return the diagonal of `J^T J`, `J` the Jacobian of all residuals `model(inputs) - targets` in the parameters.

    Parameters
    ----------
    model
        Any module that returns one tensor.
    loss_fn
        A squared error: `nn.MSELoss()`, `F.mse_loss`, or a function named after it. It is not evaluated.
    inputs, targets
        Input and target; the residuals have the shape to which output and target broadcast.
    create_graph
        Whether the diagonal can be differentiated again.

    Returns
    -------
    list of Tensor
        One tensor for each parameter that requires a gradient, in the order of `model.parameters()`; frozen ones are
        left out, unused ones get zeros. Half the Hessian of a sum of squared residuals: neither the factor 2 nor the
        mean of `MSELoss` is in it.

    Raises
    ------
    ArgumentError
        `loss_fn` is no squared error, or as for `model_jvp`; both a `ValueError` and a `RuntimeError`.

    Notes
    -----
    One backward pass for each residual, vectorised in chunks; the model is evaluated once; `.grad` is left
    as it is. For other losses, products with the whole matrix are `gauss_newton_product`.

    References
    ----------
    J. Nocedal, S. J. Wright, Numerical Optimization, 2006, section 10.3. https://doi.org/10.1007/978-0-387-40065-5

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.approximations.gauss_newton import gauss_newton_matrix_approximation
    >>> model, x, y = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 1)
    >>> gauss_newton_matrix_approximation(model, torch.nn.MSELoss(), x, y)
    [tensor([[1., 5.]]), tensor([2.])]
    """
    where = "gauss_newton_matrix_approximation"
    _, free = free_parameters(model, where)
    _check_squared_error(loss_fn, where)
    inputs, targets = without_inference_tensors((inputs, targets))
    jacobian = ClosureJacobian(
        lambda: model(inputs) - targets, free, create_graph=create_graph, where=where
    )
    jacobian.require_real_output()
    diagonal = [torch.zeros_like(p) for p in free]
    with jacobian.recording():
        for blocks in jacobian.rows():
            for index, block in enumerate(blocks):
                squares = block.square() if create_graph else block.square_()
                diagonal[index] = diagonal[index] + squares.sum(0)
    if create_graph:
        return [traceable(d, p) for d, p in zip(diagonal, free, strict=True)]
    return diagonal


def _check_squared_error(loss_fn: Any, where: str) -> None:
    check_callable(loss_fn, where, name="loss_fn")
    if isinstance(loss_fn, MSELoss):
        return
    if "mse_loss" in str(loss_fn) or "MSELoss" in str(type(loss_fn)):
        return
    raise ArgumentError(
        message(
            where,
            # In the words of the original, which programs match.
            "Gauss-Newton Matrix approximation is typically used with MSE-based loss functions, "
            f"got {loss_fn}",
            "Pass nn.MSELoss() or F.mse_loss; for another loss use gauss_newton_product",
        )
    )
