"""Products with Jacobians, with the signatures of `torch_secorder.core.gvp`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from secorder_func.compat._arguments import (
    Leaves,
    check_func,
    checked_cotangent,
    checked_cotangents,
    checked_params,
    checked_stack,
    checked_vector,
    model_parameters,
    require_gradients,
    with_frozen,
)
from secorder_func.compat._jacobian import ClosureJacobian, frozen_output
from secorder_func.rules.inference import without_inference_tensors

__all__ = [
    "batch_jvp",
    "batch_vjp",
    "full_jacobian",
    "jvp",
    "model_jvp",
    "model_vjp",
    "vjp",
]

Func = Callable[[], Tensor]


def jvp(
    func: Func, params: list[Tensor], v: Tensor | list[Tensor], create_graph: bool = False
) -> Tensor | list[Tensor]:
    """Return the product `J v` with the Jacobian of `func()` in `params`.

    Parameters
    ----------
    func
        A closure that returns one tensor, of any shape.
    params
        Distinct tensors that require gradients. One that the closure does not use contributes nothing.
    v
        A list like `params`; or a tensor: shaped like the only parameter, or flat, 1-D, with as many entries as all
        parameters together, in their order.
    create_graph
        Whether the product can be differentiated again.

    Returns
    -------
    Tensor
        Shaped like the output.

    Raises
    ------
    ArgumentError
        A bad argument or an output that is not one floating tensor; both a `ValueError` and a `RuntimeError`.

    Notes
    -----
    `J^T u` is linear in `u`, and its derivative is `J v`: two backward passes, however many outputs there are. A
    function that torch differentiates only once takes one backward pass for each output, with a
    `CurvatureFallbackWarning`. Parameters, their `.grad`, buffers and module attributes are left bit-identical.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import jvp
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> jvp(lambda: torch.stack([x[0] * x[1], 3 * x[1] ** 2]), [x], torch.tensor([1.0, 0.5]))
    tensor([2.5000, 6.0000])
    """
    jacobian = _jacobian(func, params, create_graph, "jvp")
    return jacobian.push(checked_vector(v, jacobian.params, "jvp").leaves)


def vjp(
    func: Func, params: list[Tensor], v: Tensor, create_graph: bool = False
) -> Tensor | list[Tensor]:
    """Return the product `J^T v` with the Jacobian of `func()` in `params`.

    Parameters
    ----------
    func, params, create_graph
        As for `jvp`.
    v
        As many entries as the output has, in its shape or any other; converted to its dtype.

    Returns
    -------
    Tensor or list of Tensor
        One tensor for each parameter; the tensor alone where there is one parameter. Zeros for unused ones.

    Raises
    ------
    ArgumentError
        As for `jvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import vjp
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> vjp(lambda: torch.stack([x[0] * x[1], 3 * x[1] ** 2]), [x], torch.tensor([1.0, 0.5]))
    tensor([2., 7.])
    """
    jacobian = _jacobian(func, params, create_graph, "vjp")
    return _one_or_list(jacobian.pull(checked_cotangent(v, jacobian.output, "vjp")))


def model_jvp(
    model: Module, x: Tensor, v: Tensor | list[Tensor], create_graph: bool = False
) -> Tensor:
    """Return the product `J v` with the Jacobian of `model(x)` in the model's parameters.

    Parameters
    ----------
    model
        Any module that returns one tensor. Its parameters are taken in the order of `model.parameters()`.
    x
        Its input.
    v
        As for `jvp`; it covers frozen parameters too, whose part has no effect.
    create_graph
        As for `jvp`.

    Returns
    -------
    Tensor
        Shaped like `model(x)`.

    Raises
    ------
    ArgumentError
        As for `jvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import model_jvp
    >>> model = torch.nn.Linear(2, 1)
    >>> model_jvp(model, torch.tensor([[1.0, 2.0]]), [torch.ones(1, 2), torch.zeros(1)])
    tensor([[3.]])
    """
    leaves = model_parameters(model, "model_jvp")
    vector = checked_vector(v, leaves, "model_jvp").leaves
    free = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
    if not free:
        return torch.zeros_like(frozen_output(lambda: model(x), leaves, "model_jvp"))
    jacobian = _model_jacobian(model, x, leaves, create_graph, "model_jvp")
    return jacobian.push(tuple(vector[index] for index in free))


def model_vjp(
    model: Module, x: Tensor, v: Tensor, create_graph: bool = False
) -> Tensor | list[Tensor]:
    """Return the product `J^T v` with the Jacobian of `model(x)` in the model's parameters.

    Parameters
    ----------
    model, x, create_graph
        As for `model_jvp`.
    v
        As many entries as `model(x)` has.

    Returns
    -------
    Tensor or list of Tensor
        As for `vjp`; zeros for frozen parameters.

    Raises
    ------
    ArgumentError
        As for `jvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import model_vjp
    >>> model = torch.nn.Linear(2, 1)
    >>> model_vjp(model, torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
    [tensor([[1., 2.]]), tensor([1.])]
    """
    leaves = model_parameters(model, "model_vjp")
    if not any(leaf.requires_grad for leaf in leaves):
        checked_cotangent(v, frozen_output(lambda: model(x), leaves, "model_vjp"), "model_vjp")
        return _one_or_list(with_frozen((), leaves))
    jacobian = _model_jacobian(model, x, leaves, create_graph, "model_vjp")
    found = jacobian.pull(checked_cotangent(v, jacobian.output, "model_vjp"))
    return _one_or_list(with_frozen(found, leaves))


def batch_jvp(
    func: Func, params: list[Tensor], vs: Tensor | list[Tensor], create_graph: bool = False
) -> Tensor:
    """Return the products `J v` for a batch of vectors, in one sweep.

    Parameters
    ----------
    func, params, create_graph
        As for `jvp`.
    vs
        A list of tensors `(batch, *p.shape)`, one for each parameter; or a tensor: `(batch, *p.shape)` for the only
        parameter, or `(batch, n)`, flat, for `n` entries of all parameters together.

    Returns
    -------
    Tensor
        `(batch, *output.shape)`.

    Raises
    ------
    ArgumentError
        As for `jvp`.

    Notes
    -----
    The closure is evaluated once. With more vectors than outputs, one backward pass for each output and inner products;
    else one product for each vector. Both vectorised, in chunks.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import batch_jvp
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> batch_jvp(lambda: torch.stack([x[0] * x[1], 3 * x[1] ** 2]), [x], torch.eye(2))
    tensor([[ 2.,  0.],
            [ 1., 12.]])
    """
    jacobian = _jacobian(func, params, create_graph, "batch_jvp")
    return jacobian.push_several(checked_stack(vs, jacobian.params, "batch_jvp"))


def batch_vjp(
    func: Func, params: list[Tensor], vs: Tensor, create_graph: bool = False
) -> list[Tensor]:
    """Return the products `J^T v` for a batch of vectors, in one sweep.

    Parameters
    ----------
    func, params, create_graph
        As for `jvp`.
    vs
        `(batch, *output.shape)`, or any shape with a leading batch and as many entries as the output in each row.

    Returns
    -------
    list of Tensor
        `(batch, *p.shape)` for each parameter, zeros for unused ones; a list also for one parameter.

    Raises
    ------
    ArgumentError
        As for `jvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import batch_vjp
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> batch_vjp(lambda: torch.stack([x[0] * x[1], 3 * x[1] ** 2]), [x], torch.eye(2))
    [tensor([[ 2.,  1.],
            [ 0., 12.]])]
    """
    jacobian = _jacobian(func, params, create_graph, "batch_vjp")
    return list(jacobian.pull_several(checked_cotangents(vs, jacobian.output, "batch_vjp")))


def full_jacobian(func: Func, params: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Return the Jacobian of `func()` in `params`, one matrix for each parameter.

    Parameters
    ----------
    func, params, create_graph
        As for `jvp`.

    Returns
    -------
    list of Tensor
        `(output.numel(), p.numel())` for each parameter, zeros for unused ones.

    Raises
    ------
    ArgumentError
        As for `jvp`; also a complex output.

    Notes
    -----
    One backward pass for each output, or one product for each entry of the parameters, whichever are fewer; vectorised,
    in chunks.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.gvp import full_jacobian
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> full_jacobian(lambda: torch.stack([x[0] * x[1], 3 * x[1] ** 2]), [x])
    [tensor([[ 2.,  1.],
            [ 0., 12.]])]
    """
    jacobian = _jacobian(func, params, create_graph, "full_jacobian")
    jacobian.require_real_output()
    return list(jacobian.dense())


def _jacobian(func: Func, params: list[Tensor], create_graph: bool, where: str) -> ClosureJacobian:
    check_func(func, where)
    leaves = checked_params(params, where)
    require_gradients(leaves, where)
    return ClosureJacobian(func, leaves, create_graph=create_graph, where=where)


def _model_jacobian(
    model: Module, x: Tensor, leaves: Leaves, create_graph: bool, where: str
) -> ClosureJacobian:
    """Return the Jacobian in the parameters of a model that are not frozen."""
    free = tuple(leaf for leaf in leaves if leaf.requires_grad)
    x = without_inference_tensors(x)
    return ClosureJacobian(lambda: model(x), free, create_graph=create_graph, where=where)


def _one_or_list(leaves: Leaves) -> Tensor | list[Tensor]:
    return leaves[0] if len(leaves) == 1 else list(leaves)
