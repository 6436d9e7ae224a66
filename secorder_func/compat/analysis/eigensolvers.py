"""Eigenvalues by products, with the signatures of `torch_secorder.analysis.eigensolvers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from secorder_func.algorithms import lanczos as _lanczos
from secorder_func.algorithms import power_iteration as _power
from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.checks import check_callable, check_count
from secorder_func.compat._arguments import model_parameters
from secorder_func.compat._closure import hessian_operator_of
from secorder_func.compat.analysis._hessian import FlatHessian
from secorder_func.compat.analysis._iteration import (
    check_iteration,
    check_pairs,
    checked_device,
    solved,
    warn_if_unfinished,
)
from secorder_func.errors import ArgumentError, message
from secorder_func.rules.inference import out_of_inference_mode

__all__ = [
    "estimate_eigenvalues",
    "lanczos",
    "lanczos_iteration",
    "model_eigenvalues",
    "power_iteration",
]

_MEND = {
    "lanczos": "Raise num_iterations or tol",
    "power_iteration": "Raise num_iterations or tol, or use Lanczos, which needs fewer products for near eigenvalues",
}


def power_iteration(
    matrix_vector_product: Callable[[Tensor], Tensor],
    dim: int,
    num_iterations: int = 100,
    num_vectors: int = 1,
    tol: float = 1e-6,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the eigenpairs of largest magnitude of a symmetric matrix, by block power iteration.

    Parameters
    ----------
    matrix_vector_product
        `(dim, num_vectors) -> (dim, num_vectors)`, the products with columns; `(dim, 1)` for one vector.
    dim
        Rows of the matrix.
    num_iterations
        The most iterations, one block product each.
    num_vectors
        How many pairs, at most `dim`.
    tol
        Stop when every residual `|A x - lambda x|` is at most `tol` times the largest magnitude; about 6e-6 in float32
        where `tol` is below that.
    device
        Where to iterate. By default on CUDA if that is available and the product works there, else on the CPU.

    Returns
    -------
    tuple
        Eigenvalues `(num_vectors,)` in descending magnitude, and orthonormal eigenvectors `(dim, num_vectors)`, without
        a graph. They are of torch's default dtype if the product takes it, else float64 (or float32, if that is not the
        default); or of the dtype to which the product promotes.

    Raises
    ------
    ArgumentError
        A bad argument, or a product of another shape; both a `ValueError` and a `RuntimeError`.
    NonFiniteError
        A product has NaN or infinite entries.

    Warns
    -----
    ConvergenceWarning
        `num_iterations` ended before every residual was within the tolerance.

    Notes
    -----
    The start is what `torch.randn(dim, num_vectors)` draws from the global generator. Convergence is slow where the
    next eigenvalue is near in magnitude; see `secorder_func.algorithms.power_iteration`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.eigensolvers import power_iteration
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> values, vectors = power_iteration(lambda V: A @ V, dim=2, num_vectors=2)
    >>> values.round(decimals=4), vectors.shape
    (tensor([3.6180, 1.3820]), torch.Size([2, 2]))
    """
    where = "power_iteration"
    check_callable(matrix_vector_product, where, name="matrix_vector_product")
    check_count(dim, where, name="dim")
    check_iteration(num_iterations, tol, where)
    check_pairs(num_vectors, dim, where, name="num_vectors")

    def solve(product: Callable[[Tensor], Any], start: Tensor) -> Eigenpairs:
        def rows(vectors: Tensor) -> Any:
            block = vectors.T.contiguous()
            columns = product(block)
            if isinstance(columns, Tensor) and columns.shape != block.shape:
                problem = (  # in the orientation of the caller's own blocks
                    "the product must have the shape of its vectors. "
                    f"Expected {tuple(block.shape)}, got {tuple(columns.shape)}"
                )
                raise ArgumentError(message(where, problem))
            return columns.T if isinstance(columns, Tensor) and columns.ndim == 2 else columns

        return _power.power_iteration(
            rows, start.T, max_iterations=num_iterations, tol=tol, where=where
        )

    found = solved(matrix_vector_product, (dim, num_vectors), checked_device(device, where), solve)
    warn_if_unfinished(found, num_iterations, tol, where, _MEND["power_iteration"])
    return found.eigenvalues, found.eigenvectors


def lanczos(
    matrix_vector_product: Callable[[Tensor], Tensor],
    dim: int,
    num_iterations: int = 100,
    num_vectors: int = 1,
    tol: float = 1e-6,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the algebraically largest eigenpairs of a symmetric matrix, by Lanczos with full reorthogonalisation.

    Parameters
    ----------
    matrix_vector_product
        `(dim,) -> (dim,)`, the product with one vector.
    num_iterations
        The most steps, one product each; at least `num_vectors`, at most `dim` are taken.
    dim, num_vectors, tol, device
        As for `power_iteration`.

    Returns
    -------
    tuple
        Eigenvalues `(num_vectors,)` in descending order, multiple ones as often as they occur, and orthonormal
        eigenvectors `(dim, num_vectors)`; otherwise as for `power_iteration`.

    Raises
    ------
    ArgumentError, NonFiniteError
        As for `power_iteration`.

    Warns
    -----
    ConvergenceWarning
        As for `power_iteration`.

    Notes
    -----
    `num_vectors` more products show the residuals. With `num_vectors` above one some of the steps look for further
    copies of multiple eigenvalues; see `secorder_func.algorithms.lanczos`. The start is what `torch.randn(dim)` draws.
    Memory is one vector a step.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.eigensolvers import lanczos
    >>> d = torch.tensor([2.0, 2.0, 1.0, -5.0])
    >>> lanczos(lambda v: d * v, dim=4, num_vectors=3)[0].round(decimals=4)
    tensor([2., 2., 1.])
    """
    where = "lanczos"
    check_callable(matrix_vector_product, where, name="matrix_vector_product")
    check_count(dim, where, name="dim")
    check_iteration(num_iterations, tol, where)
    check_pairs(num_vectors, dim, where, name="num_vectors", steps=num_iterations)

    def solve(product: Callable[[Tensor], Tensor], start: Tensor) -> Eigenpairs:
        return _lanczos.lanczos(
            product, start, num_vectors, max_steps=num_iterations, tol=tol, where=where
        )

    found = solved(matrix_vector_product, (dim,), checked_device(device, where), solve)
    warn_if_unfinished(found, num_iterations, tol, where, _MEND["lanczos"])
    return found.eigenvalues, found.eigenvectors


def model_eigenvalues(
    model: Module,
    loss_fn: Callable[[Module, Tensor, Tensor], Tensor],
    data: Tensor,
    target: Tensor,
    num_eigenvalues: int = 1,
    method: str = "lanczos",
    num_iterations: int = 100,
    tol: float = 1e-6,
    device: torch.device | None = None,
) -> tuple[Tensor, list[list[Tensor]]]:
    r"""Return eigenpairs of the Hessian of `loss_fn(model, data, target)` in the model's parameters.

    Parameters
    ----------
    model
        Any module with parameters that require gradients.
    loss_fn
        `loss_fn(model, data, target) -> loss`, one element; sum or mean is its choice.
    data, target
        Of any type: they are for `loss_fn`.
    num_eigenvalues
        How many pairs, at most as many as the parameters that require gradients have entries.
    method
        `"lanczos"`, the algebraically largest, or `"power_iteration"`, the largest in magnitude; in any case.
    num_iterations, tol
        As for `lanczos` and `power_iteration`.
    device
        Where to iterate and keep the basis (one vector a step), and where the results are. The loss is evaluated and
        multiplied where the parameters are, which is the default.

    Returns
    -------
    tuple
        Eigenvalues `(num_eigenvalues,)`, and for each a list like `list(model.parameters())`, of norm one over all
        parameters together. Frozen parameters have zeros, unused ones too, but for an eigenvalue that is zero.

    Raises
    ------
    ArgumentError
        A bad argument, a model without a parameter that requires gradients, or a loss that depends on none.
    NonFiniteError, NoExactRouteError
        As for `power_iteration` and `exact_hvp`.

    Warns
    -----
    ConvergenceWarning
        As for `power_iteration`.

    Notes
    -----
    The loss is evaluated once, and so are its random numbers drawn; a product costs one to two gradients. The model is
    left bit-identical. Parameters of several dtypes are iterated in their common one, half precision in float32 with
    products in half precision.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.eigensolvers import model_eigenvalues
    >>> model, x, y = torch.nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
    >>> loss_fn = lambda model, x, y: ((model(x) - y) ** 2).sum()
    >>> values, vectors = model_eigenvalues(model, loss_fn, x, y, num_eigenvalues=2)
    >>> values.round(decimals=4), [v.shape for v in vectors[0]]
    (tensor([2., 2.]), [torch.Size([1, 2])])
    """
    where = "model_eigenvalues"
    params = model_parameters(model, where)
    free = tuple(p for p in params if p.requires_grad)
    dim = sum(p.numel() for p in free)
    name = str(method).lower()
    if name not in _MEND:
        problem = f"method must be 'lanczos' or 'power_iteration', got {method!r}"
        raise ArgumentError(message(where, problem))
    if dim == 0:
        problem = "no parameter of the model requires gradients"
        raise ArgumentError(message(where, problem, "Call model.requires_grad_()"))
    check_callable(loss_fn, where, name="loss_fn")
    check_iteration(num_iterations, tol, where)
    steps = num_iterations if name == "lanczos" else None
    entries = "the number of entries that require gradients"
    check_pairs(num_eigenvalues, dim, where, name="num_eigenvalues", steps=steps, of=entries)
    place = checked_device(device, where)
    with out_of_inference_mode():
        op = hessian_operator_of(
            lambda: loss_fn(model, data, target), free, create_graph=False, where=where
        )
        op.require_real(where)
        product = FlatHessian(op, place or op.device)
        if name == "lanczos":
            found = _lanczos.lanczos(
                product,
                product.draw(),
                num_eigenvalues,
                max_steps=num_iterations,
                tol=tol,
                where=where,
            )
        else:
            found = _power.power_iteration(
                product,
                product.draw(num_eigenvalues),
                max_iterations=num_iterations,
                tol=tol,
                where=where,
            )
        warn_if_unfinished(found, num_iterations, tol, where, _MEND[name])
        return found.eigenvalues, [
            product.like_parameters(i, found, params, place) for i in range(num_eigenvalues)
        ]


estimate_eigenvalues = model_eigenvalues
lanczos_iteration = lanczos
