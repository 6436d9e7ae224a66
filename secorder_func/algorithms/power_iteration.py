"""The eigenpairs of largest magnitude of a symmetric matrix on flat vectors, by block power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.flat_product import FlatProduct
from secorder_func.checks import check_count, check_number
from secorder_func.errors import ArgumentError, message

__all__ = ["power_iteration"]


def power_iteration(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    /,
    *,
    max_iterations: int = 100,
    tol: float = 0.0,
    where: str = "power_iteration",
) -> Eigenpairs:
    r"""Return the eigenpairs of largest magnitude, by subspace iteration with Rayleigh-Ritz.

    Parameters
    ----------
    product
        `(b, n) -> (b, n)`, the products with `b` stacked vectors, as `LinearOperator.mm` of a flat operator; symmetric.
        It may change its argument, which is a copy.
    start
        Random vectors, `(b, n)` with `1 <= b <= n`, linearly independent; as many pairs are returned. Dtype and device
        are those of the iteration; half precision is iterated in float32, with products in half precision.
    max_iterations
        The most iterations, one block product each.
    tol
        Stop when all residuals are at most `tol` times the largest magnitude. At least 50 roundings of the dtype (4
        for half precision).
    where
        The public function, for messages.

    Returns
    -------
    Eigenpairs
        Eigenvalues in descending magnitude, `(b,)`; eigenvectors `(n, b)`.

    Raises
    ------
    ArgumentError
        A bad argument, or a product of another shape.
    NonFiniteError
        A product has NaN or infinite entries.

    Notes
    -----
    At most `b * max_iterations` products, one block more if products are of a wider dtype than `start`. Residuals come
    from the same products. That of pair `i` shrinks by `|lambda_{b+1} / lambda_i|` an iteration: eigenvalues near the
    magnitude of the next one converge slowly, where `lanczos` does not. Eigenvalues of opposite sign and equal
    magnitude are separated only if both fit in the block.

    References
    ----------
    Y. Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., chapter 5, SIAM 2011.
    https://doi.org/10.1137/1.9781611970739
    Y. Yamamoto, Y. Nakatsukasa, Y. Yanagisawa, T. Fukaya, Roundoff error analysis of the CholeskyQR2 algorithm,
    ETNA 44, 2015.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.algorithms.power_iteration import power_iteration
    >>> d = torch.tensor([3.0, 2.0, 1.0, -5.0])
    >>> found = power_iteration(lambda V: V * d, torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 5]]))
    >>> found.eigenvalues.round(decimals=4)
    tensor([-5.,  3.])
    """
    check_count(max_iterations, where, name="max_iterations")
    check_number(tol, where, name="tol")
    multiply = FlatProduct(product, start, where)
    if start.ndim != 2 or not 1 <= start.shape[0] <= start.shape[1] or not tol >= 0:
        raise ArgumentError(
            message(
                where,
                "expected a start of shape (b, n) with 1 <= b <= n, and tol >= 0, got a start of shape "
                f"{tuple(start.shape)} and tol={tol}",
            )
        )
    V, Y = multiply.begin(lambda dtype: _householder(start.detach().to(dtype)))
    tol = multiply.tolerance(tol)
    for remaining in reversed(range(max_iterations)):
        values, X, Y = _rayleigh_ritz(V, Y)
        residuals = torch.linalg.vector_norm(Y - values[:, None] * X, dim=1)
        worst, largest = torch.stack([residuals.max(), values.abs().max()]).tolist()
        if not math.isfinite(worst):
            multiply.refuse_values()
        converged = worst <= tol * largest
        if converged or not remaining:
            break
        V = _orthonormal(Y)
        Y = multiply(V)
    return Eigenpairs(values, X.T.contiguous(), residuals, multiply.num_matvecs, converged)


def _rayleigh_ritz(V: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of `V A V^T` in descending magnitude, their vectors, and the products with these."""
    H = V @ Y.T
    if len(H) == 1:
        return H[0], V, Y
    if not bool(H.isfinite().all()):  # eigh would refuse it in its own words
        return H.diagonal(), V, Y
    values, S = torch.linalg.eigh((H + H.T) / 2)
    order = values.abs().argsort(descending=True)
    S = S[:, order].T
    return values[order], S @ V, S @ Y


def _orthonormal(Y: Tensor) -> Tensor:
    """Return orthonormal rows with the span of the rows of `Y`, and some others in the place of dependent ones.

    By Cholesky factors of the Gram matrix, twice, which reads `Y` as few times as can be; by Householder reflections
    where the rows are near to dependent.
    """
    lengths: Tensor = torch.linalg.vector_norm(Y, dim=1, keepdim=True)
    if len(Y) == 1:
        return Y / lengths  # not zero: that has the residual zero
    Q: Tensor = Y / lengths
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(Q @ Q.T)
        if int(failed) or not float(L.diagonal().min()) > 0.1:
            return _householder(Y)
        Q = torch.linalg.solve_triangular(L, Q, upper=False)
    return Q


def _householder(Y: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(Y.T).Q
    return Q.T.contiguous()
