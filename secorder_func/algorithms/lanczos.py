"""The algebraically largest eigenpairs of a symmetric matrix on flat vectors, by Lanczos's method.

Every basis vector is made orthogonal to all others, and the whole projected matrix `Q A Q^T` is kept, not its three
diagonals only. So no eigenvalue is found twice by rounding, and the iteration may go on with a fresh random vector:
after an invariant subspace, and to look for copies of a multiple eigenvalue, of which one Krylov space sees one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.flat_product import FlatProduct
from secorder_func.algorithms.krylov_basis import KrylovBasis
from secorder_func.checks import check_count, check_number
from secorder_func.errors import ArgumentError, message

__all__ = ["lanczos"]

_MISSED = 1e-3
"""The probability at which a search for missed eigenvalues may fail to see one."""


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    /,
    k: int = 1,
    *,
    max_steps: int = 100,
    tol: float = 0.0,
    generator: torch.Generator | None = None,
    where: str = "lanczos",
) -> Eigenpairs:
    r"""Return the `k` algebraically largest eigenpairs, by Lanczos with full reorthogonalisation.

    Parameters
    ----------
    product
        `A v` for 1-D vectors; `A` symmetric. It may change its argument, which is a copy.
    start
        A random vector, `(n,)`, not zero; its dtype and device are those of the iteration. Half precision is iterated
        in float32, with products in half precision.
    k
        How many pairs, `1 <= k <= n`.
    max_steps
        The most steps, one product each; at least `k`. There are never more than `n`.
    tol
        Stop when all residuals are at most `tol` times the largest magnitude among the Ritz values. At least 50
        roundings of the dtype (4 for half precision).
    generator
        Source of fresh random vectors; torch's global one if None.
    where
        The public function, for messages.

    Returns
    -------
    Eigenpairs
        Eigenvalues in descending order, `(k,)`; eigenvectors `(n, k)`; residuals by `k` products of their own.

    Raises
    ------
    ArgumentError
        A bad argument, or a product of another shape.
    NonFiniteError
        A product has NaN or infinite entries.

    Notes
    -----
    At most `min(max_steps, n) + k` products, one more if products are of a wider dtype than `start`. A step reads the
    basis twice, which for large `n` costs as much as copying `2 j n` numbers at step `j`; memory is one vector a step.

    With `k > 1`, once the wanted pairs have converged, the iteration goes on in the orthogonal complement from a fresh
    random vector, until that shows no eigenvalue above the `k`-th: its largest Ritz value after `j` steps is below
    `(1 - e)` of an eigenvalue's height in the spectrum with probability at most `1.648 sqrt(n) exp(-(2 j - 1) sqrt(e))`
    (Kuczyński and Woźniakowski), here 0.001; or it has converged itself; or it has as many steps as went before. It
    is repeated while it adds something. If `max_steps` ends the search before, a copy of a multiple eigenvalue may be
    missing.

    References
    ----------
    C. Lanczos, J. Res. Nat. Bur. Standards 45, 1950. https://doi.org/10.6028/jres.045.026
    J. Daniel, W. Gragg, L. Kaufman, G. Stewart, Reorthogonalization and stable algorithms for updating the Gram-Schmidt
    QR factorization, Math. Comp. 30, 1976. https://doi.org/10.1090/S0025-5718-1976-0431641-8
    J. Kuczyński, H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start, SIAM J. Matrix Anal. Appl. 13, 1992. https://doi.org/10.1137/0613066

    Examples
    --------
    >>> import torch
    >>> from secorder_func.algorithms.lanczos import lanczos
    >>> d = torch.tensor([3.0, 3.0, 1.0, -5.0])
    >>> lanczos(lambda v: d * v, torch.ones(4), 2, max_steps=4).eigenvalues.round(decimals=4)
    tensor([3., 3.])
    """
    check_count(k, where, name="k")
    check_count(max_steps, where, name="max_steps")
    check_number(tol, where, name="tol")
    multiply = FlatProduct(product, start, where)
    if start.ndim != 1 or not 1 <= k <= start.numel() or not tol >= 0 or max_steps < k:
        raise ArgumentError(
            message(
                where,
                f"expected 1 <= k <= n for a start of shape (n,), k <= max_steps and tol >= 0, got k={k}, a start of "
                f"shape {tuple(start.shape)}, max_steps={max_steps} and tol={tol}",
            )
        )

    def unit(dtype: torch.dtype) -> Tensor:
        vector = start.detach().to(dtype)
        length: Tensor = torch.linalg.vector_norm(vector)
        if not 0 < float(length) < math.inf:
            raise ArgumentError(message(where, "the start must be finite and not zero"))
        return vector / length

    q, Aq = multiply.begin(unit)
    run = _Run(multiply, k, min(max_steps, start.numel()), multiply.tolerance(tol), generator)
    return run.to_the_end(q, Aq)


class _Run:
    """One iteration: basis, projected matrix, and where it left a direction unfollowed."""

    def __init__(
        self,
        multiply: FlatProduct,
        k: int,
        limit: int,
        tol: float,
        generator: torch.Generator | None,
    ) -> None:
        self.multiply, self.k, self.limit, self.tol = multiply, k, limit, tol
        self.generator = generator
        self.columns: list[Tensor] = []  # of the upper triangle of the projected matrix
        # step -> what A q had outside the basis and was not followed, and its norm
        self.left: dict[int, tuple[Tensor, float]] = {}
        self.chain = 0  # the step at which the present Krylov space began
        self.before: Tensor | None = None  # the wanted values before it began

    def to_the_end(self, q: Tensor, Aq: Tensor) -> Eigenpairs:
        basis = KrylovBasis(q, self.limit)
        scale, next_check, previous = 0.0, self.k + 2, (0, math.inf)
        basis.append(q, 1.0)
        while True:
            w, column, (length, rest) = basis.orthogonalised(Aq)
            if not math.isfinite(length):
                self.multiply.refuse_values()
            self.columns.append(column)
            scale = max(scale, length)
            steps = basis.count
            noise = 10 * torch.finfo(w.dtype).eps * scale
            if rest <= noise or steps in (next_check, self.limit):
                values, vectors = self.ritz()
                worst = self.worst(vectors, rest)
                goal = 0.5 * self.tol * float(values.abs().max())
                converged = steps >= self.k and worst <= goal
                if steps == self.limit or (converged and self.k == 1):
                    break
                overdue = None if converged else self.overdue(vectors, goal)
                if overdue is not None:
                    last, (w, rest) = (w, rest), basis.outside(self.left.pop(overdue)[0])
                    if rest > noise:
                        self.left[steps - 1] = last
                    else:  # it is in the basis by now
                        w, rest = last if last[1] > noise else (basis.fresh(self.generator), 1.0)
                elif rest <= noise or (converged and self.nothing_above(values, rest, goal, basis)):
                    if converged and self.unchanged(values, goal):
                        break
                    self.left[steps - 1] = (w, rest)
                    self.chain, self.before = steps, values[: self.k]
                    w, rest = basis.fresh(self.generator), 1.0
                next_check = steps + _wait(previous, (steps, worst), goal, steps - self.chain)
                previous = (steps, worst)
            Aq = self.multiply(basis.append(w, rest))
        return self.result(basis, values, vectors)

    def ritz(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return values and vectors of the projected matrix from step `start` on, descending, on the CPU."""
        m = len(self.columns)
        H = torch.zeros(m, m, dtype=torch.float64)
        rows, columns = torch.tril_indices(m, m)
        H[rows, columns] = torch.cat(self.columns).cpu().double()
        values, vectors = torch.linalg.eigh(H[start:, start:])  # reads the lower triangle
        return values.flip(0), vectors.flip(1)

    def worst(self, vectors: Tensor, rest: float) -> float:
        """Return a bound on the residuals of the wanted pairs: what was left outside, times how much of it they use."""
        outside = vectors.new_zeros(len(vectors))
        outside[-1] = rest
        for step, (_, norm) in self.left.items():
            outside[step] = norm
        return float((outside @ vectors[:, : self.k].abs()).max())

    def overdue(self, vectors: Tensor, goal: float) -> int | None:
        """Return the step whose unfollowed direction keeps the wanted pairs from the goal, if one does."""
        parts = {
            step: norm * float(vectors[step, : self.k].abs().max())
            for step, (_, norm) in self.left.items()
        }
        return max(parts, key=lambda step: parts[step]) if sum(parts.values()) > goal / 2 else None

    def nothing_above(self, values: Tensor, rest: float, goal: float, basis: KrylovBasis) -> bool:
        """Say whether the present Krylov space has shown all above the wanted values that it has to show."""
        if self.before is None:
            return True
        steps = basis.count - self.chain
        own, vectors = self.ritz(self.chain)
        height = float((values[self.k - 1] - own[0]) / (values[self.k - 1] - values[-1]))
        needed = math.log(1.648 * math.sqrt(basis.n) / _MISSED)
        seen = height > 0 and (2 * steps - 1) * math.sqrt(height) >= needed
        return seen or rest * float(vectors[-1, 0].abs()) <= goal or steps >= self.chain

    def unchanged(self, values: Tensor, goal: float) -> bool:
        """Say whether the present Krylov space has added nothing to the wanted values."""
        before = self.before
        if before is None or len(before) < self.k:
            return False
        return bool((values[: self.k] <= before + 2 * goal).all())

    def result(self, basis: KrylovBasis, values: Tensor, vectors: Tensor) -> Eigenpairs:
        rows = basis.combined(vectors[:, : self.k])
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        wanted = values[: self.k].to(rows)
        residuals = torch.stack(
            [
                torch.linalg.vector_norm(self.multiply(x) - theta * x)
                for x, theta in zip(rows, wanted, strict=True)
            ]
        )
        if not bool(residuals.isfinite().all()):
            self.multiply.refuse_values()
        return Eigenpairs(
            eigenvalues=wanted,
            eigenvectors=rows.T.contiguous(),
            residual_norms=residuals,
            num_matvecs=self.multiply.num_matvecs,
            converged=bool((residuals <= self.tol * float(values.abs().max())).all()),
        )


def _wait(previous: tuple[int, float], now: tuple[int, float], goal: float, own: int) -> int:
    """Return after how many steps to look again: half of what the decay so far still needs, as it quickens.

    `own` is how many steps the present Krylov space has.
    """
    steps, longest = now[0] - previous[0], own // 2
    if 0 < goal < now[1] < previous[1] < math.inf:
        needed = steps * math.log(now[1] / goal) / math.log(previous[1] / now[1])
        longest = min(own, int(needed / 2))
    return 4 if now[1] <= goal else max(4, longest)
