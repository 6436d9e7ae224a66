"""Hessian-vector products with the signatures of `torch_secorder.core.hvp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from secorder_func.algorithms.probes import rademacher, sparse_rademacher
from secorder_func.algorithms.trace import hutchinson_trace
from secorder_func.checks import check_count, check_number
from secorder_func.compat._arguments import (
    Leaves,
    check_func,
    checked_params,
    checked_vector,
    model_parameters,
    require_gradients,
    with_frozen,
)
from secorder_func.compat._closure import (
    forms_operator_of,
    gauss_newton,
    hessian_product,
)
from secorder_func.compat._difference import closure_difference
from secorder_func.transforms.plain_autograd import recording

__all__ = ["approximate_hvp", "exact_hvp", "gauss_newton_product", "hessian_trace", "model_hvp"]


def exact_hvp(
    func: Callable[[], Tensor],
    params: list[Tensor],
    v: Tensor | list[Tensor],
    create_graph: bool = False,
) -> Tensor | list[Tensor]:
    r"""Return the exact product `H v` with the Hessian of `func()` in `params`.

    Parameters
    ----------
    func
        A closure that returns the loss, one element; sum or mean is its choice.
    params
        Distinct tensors that require gradients and that the closure uses. One that it does not use gets zeros.
    v
        A list like `params`; or a tensor: shaped like the only parameter, or flat, 1-D, with as many entries as all
        parameters together, in their order.
    create_graph
        Whether the product can be differentiated again (third derivatives).

    Returns
    -------
    Tensor or list of Tensor
        In the form of `v`.

    Raises
    ------
    ArgumentError
        A bad argument or a loss that is not one real number; both a `ValueError` and a `RuntimeError`.
    NoExactRouteError
        torch has no exact second derivative for a function of the loss.

    Notes
    -----
    2.5 to 3 gradients, by a backward pass over forward propagation; by double backward where a function of the loss has
    no rule for that, and below 4096 parameters; `vjp(grad(f))` where a part of the loss is compiled. Parameters, their
    `.grad`, buffers and module attributes are left bit-identical, also when the closure raises; the random state is
    left as one plain evaluation leaves it.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hvp import exact_hvp
    >>> model = torch.nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> v = [torch.ones(1, 2), torch.zeros(1)]
    >>> exact_hvp(lambda: (model(x) ** 2).sum(), list(model.parameters()), v)
    [tensor([[ 6., 12.]]), tensor([6.])]
    """
    check_func(func, "exact_hvp")
    leaves = checked_params(params, "exact_hvp")
    require_gradients(leaves, "exact_hvp")
    vector = checked_vector(v, leaves, "exact_hvp")
    product = hessian_product(
        func, leaves, vector.leaves, create_graph=create_graph, where="exact_hvp"
    )
    with recording(create_graph):
        return vector.restore(product)


def approximate_hvp(
    func: Callable[[], Tensor],
    params: list[Tensor],
    v: Tensor | list[Tensor],
    num_samples: int = 1,
    damping: float = 0.0,
) -> Tensor | list[Tensor]:
    r"""Return an estimate of `H v + damping * v` by central differences of the gradient.

    Parameters
    ----------
    func, params, v
        As for `exact_hvp`.
    num_samples
        How many step sizes to combine, two gradients each; more make the error smaller.
    damping
        Multiple of `v` to add.

    Returns
    -------
    Tensor or list of Tensor
        In the form of `v`.

    Raises
    ------
    ArgumentError
        As for `exact_hvp`; also `num_samples` below one.
    HiddenParameterError
        The closure reaches a parameter by a path on which it cannot be moved (a loss computed before it ran).

    Notes
    -----
    On smooth losses the relative error is about 1e-9 in float64 and 1e-4 in float32. Where the gradient jumps (ReLU) a
    difference across a kink measures the jump, which the Hessian does not contain. Random numbers are the same at all
    points. Parameters are never written to; where one hides from the exchange (in a ScriptModule, say), it holds other
    data during the evaluations, with a `CurvatureFallbackWarning`. See `secorder_func.finite_difference_hvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hvp import approximate_hvp
    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> approximate_hvp(lambda: (w**3).sum(), [w], torch.ones_like(w), damping=0.5).round(decimals=6)
    tensor([ 6.5000, 12.5000], dtype=torch.float64)
    """
    where = "approximate_hvp"
    check_func(func, where)
    leaves = checked_params(params, where)
    require_gradients(leaves, where)
    vector = checked_vector(v, leaves, where)
    check_count(num_samples, where, name="num_samples")
    check_number(damping, where, name="damping")
    estimate = closure_difference(
        func, leaves, vector.leaves, num_steps=num_samples, damping=damping, where=where
    )
    return vector.restore(estimate)


def model_hvp(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    v: Tensor | list[Tensor],
    create_graph: bool = False,
) -> Tensor | list[Tensor]:
    r"""Return the exact product `H v` for the loss `loss_fn(model(x), y)` in the model's parameters.

    Parameters
    ----------
    model
        Any module. Its parameters are taken in the order of `model.parameters()`.
    loss_fn
        `loss_fn(output, y) -> loss` with one element.
    x, y
        Input and target.
    v, create_graph
        As for `exact_hvp`; `v` covers frozen parameters too, whose block of the product is zero.

    Returns
    -------
    Tensor or list of Tensor
        In the form of `v`.

    Raises
    ------
    ArgumentError, NoExactRouteError
        As for `exact_hvp`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hvp import model_hvp
    >>> model = torch.nn.Linear(2, 1)
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> model_hvp(model, torch.nn.MSELoss(), x, y, [torch.ones(1, 2), torch.zeros(1)])
    [tensor([[ 6., 12.]]), tensor([6.])]
    """

    def product(params: Leaves, vector: Leaves) -> Leaves:
        return hessian_product(
            lambda: loss_fn(model(x), y),
            params,
            vector,
            create_graph=create_graph,
            where="model_hvp",
        )

    with recording(create_graph):
        return _over_model(model, v, product, "model_hvp")


def gauss_newton_product(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    v: Tensor | list[Tensor],
    create_graph: bool = False,
) -> Tensor | list[Tensor]:
    r"""Return the exact product with the generalised Gauss-Newton matrix `J^T H_L J` of `loss_fn(model(x), y)`.

    `J` is the Jacobian of the model's output in its parameters, `H_L` the Hessian of the loss in the output.

    Parameters
    ----------
    model, loss_fn, x, y, v, create_graph
        As for `model_hvp`. Any loss may be given; the matrix is positive semidefinite if it is convex in the output.

    Returns
    -------
    Tensor or list of Tensor
        In the form of `v`.

    Raises
    ------
    ArgumentError, NoExactRouteError
        As for `exact_hvp`.

    Examples
    --------
    For a model that is linear in its parameters it is the Hessian:

    >>> import torch
    >>> from secorder_func.compat.core.hvp import gauss_newton_product
    >>> model = torch.nn.Linear(2, 1)
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> gauss_newton_product(model, torch.nn.MSELoss(), x, y, [torch.ones(1, 2), torch.zeros(1)])
    [tensor([[ 6., 12.]]), tensor([6.])]
    """

    def product(params: Leaves, vector: Leaves) -> Leaves:
        return gauss_newton(
            lambda: model(x),
            lambda output: loss_fn(output, y),
            params,
            vector,
            create_graph=create_graph,
            where="gauss_newton_product",
        )

    with recording(create_graph):
        return _over_model(model, v, product, "gauss_newton_product")


def hessian_trace(
    func: Callable[[], Tensor],
    params: list[Tensor],
    num_samples: int = 10,
    create_graph: bool = False,
    sparse: bool = False,
) -> float:
    r"""Return an unbiased estimate of the trace of the Hessian by Hutchinson's method.

    Parameters
    ----------
    func, params
        As for `exact_hvp`.
    num_samples
        How many random probes, one product each.
    create_graph
        Whether to return a 0-dim tensor that can be differentiated, instead of a float.
    sparse
        Whether nine entries of ten of a probe are zero. Still unbiased; the variance is larger.

    Returns
    -------
    float
        With `create_graph=True` a 0-dim tensor.

    Raises
    ------
    ArgumentError, NoExactRouteError
        As for `exact_hvp`; also `num_samples` below one.

    Notes
    -----
    By second-order forward propagation, one evaluation of the closure for each chunk of probes, where every function of
    it has a rule; else it is evaluated once, and all probes are multiplied with one matrix in vectorised chunks. One
    seed a call is taken from torch's global generator. For the standard error use `secorder_func.hutchinson_trace`.

    References
    ----------
    M. F. Hutchinson, Communications in Statistics 19(2), 1990. https://doi.org/10.1080/03610919008812866

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hvp import hessian_trace
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_trace(lambda: (w**3).sum(), [w])
    18.0
    """
    where = "hessian_trace"
    check_func(func, where)
    leaves = checked_params(params, where)
    require_gradients(leaves, where)
    check_count(num_samples, where, name="num_samples")
    op = forms_operator_of(func, leaves, create_graph=create_graph, where=where)
    distribution = sparse_rademacher(0.1) if sparse else rademacher
    with recording(create_graph):
        trace: Any = hutchinson_trace(op, num_samples, distribution=distribution).value
    return trace if create_graph else float(trace)


def _over_model(
    model: Module,
    v: Any,
    product: Callable[[Leaves, Leaves], Leaves],
    where: str,
) -> Tensor | list[Tensor]:
    """Return a product over all parameters of a model, zeros for the frozen ones."""
    leaves = model_parameters(model, where)
    vector = checked_vector(v, leaves, where)
    free = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
    found: Leaves = ()
    if free:
        found = product(
            tuple(leaves[index] for index in free), tuple(vector.leaves[index] for index in free)
        )
    return vector.restore(with_frozen(found, leaves))
