"""A few outermost eigenpairs of a symmetric operator, by restarted Lanczos with full reorthogonalisation."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.checkpoint import CheckpointLike, keeping
from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.algorithms.estimate import State
from secorder_func.algorithms.flat_product import least_tolerance
from secorder_func.algorithms.probes import normal
from secorder_func.checks import check_count, check_like, check_positive
from secorder_func.digest import digest
from secorder_func.errors import (
    ArgumentError,
    ConvergenceWarning,
    NonFiniteError,
    message,
    warn_user,
)
from secorder_func.operators import LinearOperator
from secorder_func.operators.chunks import default_memory_budget
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.operators.outside import refuse_transforms
from secorder_func.typing import Tree

__all__ = ["Which", "eigsh", "wanted_first"]

Which = Literal["LA", "SA", "LM"]

_LOOKS_EVERY = 5
"""Steps between two looks at the residuals, which wait for the device."""
_DRAWS = 5


def eigsh(
    op: LinearOperator,
    /,
    k: int = 1,
    *,
    which: Which = "LA",
    rtol: float = 1e-6,
    max_matvecs: int | None = None,
    v0: Tree | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    checkpoint: CheckpointLike = None,
) -> Eigenpairs:
    r"""Return `k` outermost eigenvalues of a symmetric operator with their eigenvectors.

    Parameters
    ----------
    op
        A real symmetric operator.
    k
        How many pairs, `1 <= k <= n`.
    which
        `"LA"`: the algebraically largest, descending; `"SA"`: the smallest, ascending; `"LM"`: the largest in
        magnitude, descending.
    rtol
        What every residual norm may be beside the largest magnitude of an eigenvalue that was seen; at least 50 times
        the rounding of the dtype is allowed, 4 times in half precision. The eigenvalues themselves are off by about the
        square of it.
    max_matvecs
        The most products; `max(20 k, 200)` if None.
    v0
        Where to begin: a vector like `op.like`, or several stacked, as the `eigenvectors` of an earlier result.
    generator
        Its next value seeds the random vectors; torch's global generator if None.
    memory_budget
        Bytes for the vectors that are kept, two for each dimension of the Krylov space; by default 8 times that of
        `LinearOperator.mm`, and room for at least `2 k + 16` of them.
    checkpoint
        A file in which it is kept while it runs, and from which it goes on if it was interrupted; see `Checkpoint`.

    Returns
    -------
    Eigenpairs
        `eigenvalues` and `residual_norms` `(k,)`; `eigenvectors` a stacked tree, orthonormal.

    Raises
    ------
    TypeError, ValueError
        The operator is complex or not symmetric; a bad argument.
    NonFiniteError
        A product has NaN or infinite entries.

    Warns
    -----
    ConvergenceWarning
        `max_matvecs` were spent before.

    Notes
    -----
    One product a step; every vector is made orthogonal to all others, twice, so that no eigenvalue is found twice by
    rounding. When the memory is full, the best Ritz vectors are kept. A Krylov space of one vector sees one copy of a
    multiple eigenvalue, and one begun with an eigenvector nothing else. So when `k > 1` pairs have converged, or one
    from a given `v0`, a random vector is put in and followed for 5 steps, until that shows nothing new: further copies
    are found where the eigenvalue stands apart, not in a dense part of the spectrum.

    References
    ----------
    K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM Journal on Matrix
    Analysis and Applications 22(2), 2000. https://doi.org/10.1137/S0895479898334605

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, eigsh
    >>> d = torch.tensor([3.0, 1.0, -5.0, 2.0])
    >>> op = LinearOperator(lambda v: d * v, torch.zeros(4))
    >>> eigsh(op, 2, which="LM").eigenvalues.round(decimals=3)
    tensor([-5.,  3.])
    """
    where = "eigsh"
    check_real_operator(op, where)
    n = op.shape[0]
    check_count(k, where, name="k")
    if k > n:
        raise ArgumentError(
            message(where, f"k must be at most {n}, the size of the space, got {k}")
        )
    if which not in get_args(Which):
        known = ", ".join(repr(name) for name in get_args(Which))
        raise ArgumentError(message(where, f"which must be one of {known}, got {which!r}"))
    check_symmetric(op, where)
    check_positive(rtol, where, name="rtol")
    for name, count in (("max_matvecs", max_matvecs), ("memory_budget", memory_budget)):
        if count is not None:
            check_count(count, where, name=name)
    if max_matvecs is not None and max_matvecs < k:
        problem = f"max_matvecs must be at least k, {k}, got {max_matvecs}"
        raise ArgumentError(message(where, problem))
    refuse_transforms(where)
    work = torch.promote_types(op.dtype, torch.float32)
    begin = _begin(op, v0, work, where)
    tolerance = max(least_tolerance(float(rtol), t.dtype) for t in tree.flatten(op.like)[0])
    most = max(20 * k, 200) if max_matvecs is None else max_matvecs
    budget = 8 * default_memory_budget(op.device) if memory_budget is None else memory_budget
    # No more than are made; the projected matrix is of them, too.
    size = min(n, most + 1, max(2 * k + 16, budget // (2 * n * work.itemsize)))
    seed = op.draw_seed(generator)
    settings = {
        "seed": None if generator is None else seed,
        "k": k,
        "which": which,
        "rtol": float(rtol),
        "max_matvecs": max_matvecs,
        "memory_budget": memory_budget,
        "v0": None if begin is None else digest(begin),
    }
    run = _Run(op, k, which, tolerance, size, seed, work, where)
    with (
        keeping(checkpoint, op, where, settings),
        running.task(where, None, "products", run.state, together=op.ranks is not None) as task,
    ):
        run.begin(begin, task.resumed)
        task.done = run.spent
        converged = run.to_the_end(most)
    values, vectors, residuals = run.pairs()
    if not converged:
        problem = (
            f"{int((residuals > run.goal()).sum())} of {k} residuals are above the tolerance {tolerance:.2g} "
            f"after {run.spent} products, or others were not looked for; the largest is {float(residuals.max()):.2g}"
        )
        warn_user(
            message(where, problem, "Raise max_matvecs, or begin with v0=.eigenvectors"),
            ConvergenceWarning,
        )
    unravel = tree.ravel(op.like)[1]
    return Eigenpairs(
        values.to(op.dtype), unravel(vectors), residuals.to(op.dtype), run.spent, converged
    )


def _begin(op: LinearOperator, v0: Tree | None, work: torch.dtype, where: str) -> Tensor | None:
    """Return what to begin with as rows `(p, n)`."""
    if v0 is None:
        return None
    leaves, likes = tree.flatten(v0)[0], tree.flatten(op.like)[0]
    stacked = bool(leaves) and isinstance(leaves[0], Tensor) and leaves[0].ndim > likes[0].ndim
    check_like(v0, op.like, where, name="v0", batched=stacked)
    rows: Tensor = tree.ravel(v0, batch_dims=1 if stacked else 0)[0].detach().to(work)
    rows = rows if stacked else rows.unsqueeze(0)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ArgumentError(message(where, "v0 must be finite and not zero"))
    units: Tensor = rows / lengths.unsqueeze(1)
    return units


def wanted_first(values: Tensor, which: Which) -> Tensor:
    """Return what is largest for the eigenvalue that is wanted most."""
    return {"LA": values, "SA": -values, "LM": values.abs()}[which]


_NAMES = (
    "spent",
    "converged",
    "_columns",
    "_lengths",
    "_since",
    "_drawn",
    "_scale",
    "_warm",
    "_fresh",
    "_next",
    "_queue",
    "_before",
    "_seed",
    "_values",
    "_Y",
)
"""What a run consists of, beside `V`, `W` and `H`."""


class _Run:
    """Orthonormal rows `V`, their products `W`, and the projected matrix `H = V W^T`."""

    def __init__(
        self,
        op: LinearOperator,
        k: int,
        which: Which,
        tolerance: float,
        size: int,
        seed: int,
        work: torch.dtype,
        where: str,
    ) -> None:
        self._op, self._k, self._which, self._where = op, k, which, where
        self._tolerance, self._size, self._seed = tolerance, size, seed
        self._unravel = tree.ravel(op.like)[1]
        n = op.shape[0]
        self._V = torch.empty(size, n, dtype=work, device=op.device)
        self._W = torch.empty_like(self._V)
        self._H = torch.zeros(size, size, dtype=torch.float64)
        self._columns: list[Tensor] = []  # of H, not fetched yet
        self._lengths: list[tuple[int, Tensor]] = []  # of vectors before and after the projection
        self.count = 0
        self.spent = 0
        self._since = 0
        self._drawn = 0
        self._scale = 0.0
        self._warm = self._fresh = False
        self._next = self._V[:0]
        self._queue: list[Tensor] = []
        self.converged: bool | None = None
        self._before: Tensor | None = None  # the wanted values when a random vector was put in
        self._values = self._Y = torch.zeros(0, dtype=torch.float64)

    def begin(self, given: Tensor | None, state: State | None) -> None:
        """Begin, with some vectors if they are given, or go on from a state."""
        if state is None:
            self._queue = [] if given is None else list(given)
            self._warm = self._fresh = given is not None  # which may be of another eigenvalue
            self._next = self._queue.pop(0) if self._queue else self._random()
            return
        self.count = len(state["V"])
        known = slice(self.count)
        self._V[known], self._W[known], self._H[known, known] = state["V"], state["W"], state["H"]
        for name in _NAMES:
            setattr(self, name, state[name])

    def state(self) -> State:
        """Return what it takes to go on."""
        return {
            "V": self._V[: self.count].clone(),
            "W": self._W[: self.count].clone(),
            "H": self._H[: self.count, : self.count].clone(),
            **{name: getattr(self, name) for name in _NAMES},
        }

    def to_the_end(self, most: int) -> bool:
        """Iterate until all pairs have converged and no other is seen, or it is cancelled; say whether they have."""
        try:
            while self.converged is None:
                self._grow(self._next)
                last = self.spent >= most or self.count == self._op.shape[0]
                full = self.count == self._size
                if self._queue and not (last or full):
                    self._next = self._outside(self._queue.pop(0))
                elif last or full or self._fresh or self._since >= _LOOKS_EVERY:
                    self._fresh, self._queue = False, []
                    following = self._looked(most)
                    if isinstance(following, bool):
                        self.converged = following
                    else:
                        self._next = following
                else:
                    self._next = self._outside(self._W[self.count - 1])
                running.advance(self.spent)
        except running.Cancelled:
            if self._columns:
                self._solve()
            if self.count < self._k or not running.only_outermost():
                raise
            return bool(self.converged)
        return self.converged

    def _looked(self, most: int) -> Tensor | bool:
        """Look at the residuals; return the next vector, or whether all has converged once it ends."""
        self._since = 0
        broken = self._solve()
        whole = self.count == self._op.shape[0]
        residuals, worst = self._residuals()
        done = self.count >= self._k and bool((residuals <= self.goal()).all())
        new = done and (self._before is None or self._better_than(self._before))
        if done and (whole or (self._k == 1 and not self._warm) or not new):
            return True
        if whole or self.spent >= most:
            return done
        if done:
            self._before = self._wanted().clone()
        if self.count == self._size:
            self._restart()
        if done or broken:  # converged, or the space was invariant
            return self._random()
        return self._outside(worst)

    # ---------------------------------------------------------------------------- one step

    def _grow(self, v: Tensor) -> None:
        """Add a unit vector, its product, and a column of the projected matrix."""
        product = self._op @ self._unravel(v)
        w: Tensor = tree.ravel(product)[0].detach().to(v)
        self._V[self.count], self._W[self.count] = v, w
        self.count += 1
        self.spent += 1
        self._since += 1
        self._columns.append(self._V[: self.count] @ w)

    def _outside(self, w: Tensor) -> Tensor:
        """Return the unit vector of what is orthogonal to the space; the next look sees whether that is rounding."""
        V = self._V[: self.count]
        tiny = torch.finfo(w.dtype).tiny
        size = torch.linalg.vector_norm(w)
        r = w / size.clamp(min=tiny)
        for _ in range(2):
            r = r - V.T @ (V @ r)
        left = torch.linalg.vector_norm(r)
        self._lengths.append((self.count, torch.stack([size, left])))
        unit: Tensor = r / left.clamp(min=tiny)
        return unit

    def _random(self) -> Tensor:
        """Return a random unit vector orthogonal to the space, which must not be the whole."""
        V = self._V[: self.count]
        eps = torch.finfo(V.dtype).eps
        for _ in range(_DRAWS):
            row = normal(self._seed, range(self._drawn, self._drawn + 1), self._op.like)
            self._drawn += 1
            r: Tensor = tree.ravel(row, batch_dims=1)[0][0].to(V.dtype)
            size = torch.linalg.vector_norm(r)
            left = r - V.T @ (V @ r)
            if bool(torch.linalg.vector_norm(left) > 100 * eps * size):
                break  # else it is in the space, as one that the space was begun with
        for _ in range(3):  # the complement may be small, and one pass leaves mostly rounding
            r = r - V.T @ (V @ r)
            r = r / torch.linalg.vector_norm(r)
        return r

    # ----------------------------------------------------------------------- Rayleigh and Ritz

    def _solve(self) -> bool:
        """Find the Ritz pairs, wanted ones first; say whether the space could not grow. One synchronisation.

        What was added after it could not is dropped.
        """
        fetched = torch.cat([*self._columns, *(pair for _, pair in self._lengths)]).cpu().double()
        if not bool(fetched.isfinite().all()):
            problem = f"a product up to number {self.spent} has NaN or infinite entries, or too large a norm"
            mend = "Check the loss and its gradient at these parameters"
            raise NonFiniteError(message(self._where, problem, mend))
        split = fetched.split([*map(len, self._columns), *[2] * len(self._lengths)])
        for column in split[: len(self._columns)]:
            j = len(column) - 1
            self._H[: j + 1, j] = self._H[j, : j + 1] = column
        eps = torch.finfo(self._V.dtype).eps
        broken = False
        for (at, _), (size, left) in zip(self._lengths, split[len(self._columns) :], strict=True):
            self._scale = max(self._scale, float(size))
            if float(left) < 100 * eps or float(size) < eps * self._scale:
                self.count, broken = at, True
                break
        self._columns, self._lengths = [], []
        values, Y = torch.linalg.eigh(self._H[: self.count, : self.count])
        order = wanted_first(values, self._which).argsort(descending=True, stable=True)
        self._values, self._Y = values[order], Y[:, order]
        self._scale = max(self._scale, float(values.abs().max()))
        return broken

    def _wanted(self) -> Tensor:
        return self._values[: self._k]

    def _combined(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return some Ritz vectors and their products as rows."""
        y = columns.T.to(self._V)
        return y @ self._V[: self.count], y @ self._W[: self.count]

    def _residuals(self) -> tuple[Tensor, Tensor]:
        """Return the residual norms of the wanted pairs, on the CPU, and the largest residual."""
        x, ax = self._combined(self._Y[:, : self._k])
        r = ax - self._wanted().to(x).unsqueeze(1) * x
        norms = torch.linalg.vector_norm(r, dim=1).cpu().double()
        return norms, r[int(norms.argmax())]

    def goal(self) -> float:
        """Return what a residual may be."""
        return self._tolerance * self._scale

    def _better_than(self, before: Tensor) -> bool:
        """Say whether wanted values have got better than they were by more than their residuals explain."""
        now, old = (wanted_first(values, self._which) for values in (self._wanted(), before))
        return bool((now > old + 2 * self.goal()).any())

    def _restart(self) -> None:
        """Keep the best Ritz vectors, of the wanted ones and of those after them."""
        kept = max(1, min(self._size - 2, max(self._k + 4, (self._size + self._k) // 2)))
        x, ax = self._combined(self._Y[:, :kept])
        self._V[:kept], self._W[:kept] = x, ax
        self.count = kept
        self._H.zero_()
        self._values = self._values[:kept]
        self._Y = torch.eye(kept, dtype=self._values.dtype)
        self._H[:kept, :kept] = torch.diag(self._values)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the wanted values, unit vectors and residual norms."""
        x, ax = self._combined(self._Y[:, : self._k])
        lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        x, ax = x / lengths, ax / lengths
        values = (x * ax).sum(1)
        residuals = torch.linalg.vector_norm(ax - values.unsqueeze(1) * x, dim=1)
        order = wanted_first(values, self._which).argsort(
            descending=True, stable=True
        )  # rounding may have changed it
        return values[order], x[order], residuals[order]
