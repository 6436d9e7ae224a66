"""The distribution of all eigenvalues of a symmetric operator, and traces of functions of it, by Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.checkpoint import CheckpointLike, keeping
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.krylov_spaces import KrylovSpaces
from secorder_func.algorithms.probes import sphere
from secorder_func.checks import check_callable, check_count, check_positive
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    message,
    warn_user,
)
from secorder_func.operators import LinearOperator
from secorder_func.operators.chunks import default_memory_budget
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.operators.outside import refuse_transforms

__all__ = ["Function", "SpectralDensity", "applied", "spectral_density"]

Function = Callable[[Tensor], Tensor]


def applied(f: Function, values: Tensor, where: str) -> Tensor:
    """Return `f` at these numbers; refuse one that does not act on each of them."""
    found: Any = f(values.clone())
    if not isinstance(found, Tensor) or found.shape != values.shape or found.is_complex():
        given = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else repr(found)
        problem = f"f must give a real number for each of {tuple(values.shape)}, got {given}"
        raise ArgumentTypeError(message(where, problem))
    numbers: Tensor = found.to(values)
    return numbers


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """An estimate of the distribution of the eigenvalues: for each random vector a probability measure of some atoms.

    Attributes
    ----------
    nodes, weights
        `(vectors, steps)`, float64, on the CPU. The weights of a vector add up to one. A node without weight fills up a
        vector whose Krylov space ended before.
    dimension
        How many eigenvalues there are, `n`.
    num_matvecs
        How many products were spent.
    resolution
        Eigenvalues nearer to each other than this, some roundings of the largest, are one.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, spectral_density
    >>> d = torch.linspace(0, 1, 100)
    >>> density = spectral_density(LinearOperator(lambda v: d * v, d), 10, num_steps=20)
    >>> print(density.mean_of(torch.square).value > 0.2)
    tensor(True)
    >>> str(density).startswith("density of 100 eigenvalues from")
    True
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    num_matvecs: int
    resolution: float = 0.0

    def __str__(self) -> str:
        seen = self.nodes[self.weights > 0]
        ends = f" from {float(seen.min()):.6g} to {float(seen.max()):.6g}" if len(seen) else ""
        vectors, steps = self.nodes.shape
        return (
            f"density of {self.dimension} eigenvalues{ends}, {vectors} vectors of {steps} steps "
            f"({self.num_matvecs} products)"
        )

    def mean_of(self, f: Function) -> Estimate:
        """Return the mean of `f` over the eigenvalues; `f` acts on each entry of a float64 tensor.

        The standard error is that of the random vectors; the quadrature is exact for polynomials of degree
        `2 steps - 1`.
        """
        where = "SpectralDensity.mean_of"
        check_callable(f, where)
        values = applied(f, self.nodes, where)
        seen = self.weights > 0
        if not bool(values[seen].isfinite().all()):
            worst = float(self.nodes[seen & ~values.isfinite()][0])
            problem = f"f is not finite at the eigenvalue {worst:.4g}"
            raise ArgumentError(message(where, problem, "Damp the operator: op.damped(...)"))
        return self._estimate(torch.where(seen, self.weights * values, 0.0).sum(1))

    def trace_of(self, f: Function) -> Estimate:
        """Return the trace of `f(A)`, `n` times the mean; with `torch.log` the log-determinant."""
        mean = self.mean_of(f)
        value, error = self.dimension * mean.value, self.dimension * mean.standard_error
        return replace(mean, value=value, standard_error=error)

    def schatten_norm(self, p: float) -> Estimate:
        """Return the Schatten norm, `(sum |eigenvalue|^p)^(1/p)`, its error by the first-order expansion."""
        where = "SpectralDensity.schatten_norm"
        check_positive(p, where, name="p")
        power = self.trace_of(lambda x: x.abs() ** p)
        norm = power.value ** (1 / p)
        tiny = torch.finfo(norm.dtype).tiny
        error = power.standard_error * norm / (p * power.value.clamp(min=tiny))
        return Estimate(norm, error, self.num_matvecs, None, len(self.nodes) - 1)

    def cumulative(self, points: Tensor) -> Estimate:
        """Return the share of eigenvalues up to each point, or beyond it by no more than the resolution."""
        flat = _points(points, "SpectralDensity.cumulative").reshape(-1, 1, 1) + self.resolution
        shares = (self.weights * (self.nodes <= flat)).sum(2).T
        return self._estimate(shares.reshape(-1, *points.shape))

    def density(self, points: Tensor, *, width: float | None = None) -> Estimate:
        """Return the density at each point, every atom spread out to a normal distribution.

        `width` is its standard deviation, in units of the eigenvalues; a hundredth of their range if None, at
        least a thousandth of the largest. The integral
        is one.
        """
        if width is None:
            kept = self.nodes[self.weights > 0]
            largest = float(kept.abs().max())
            width = max(float(kept.max() - kept.min()) / 100, 1e-3 * largest) or 1.0
        check_positive(width, "SpectralDensity.density", name="width")
        flat = _points(points, "SpectralDensity.density").reshape(-1, 1, 1)
        bells = torch.exp(-0.5 * ((flat - self.nodes) / width) ** 2) / (
            width * math.sqrt(2 * math.pi)
        )
        return self._estimate((self.weights * bells).sum(2).T.reshape(-1, *points.shape))

    def distance_to(self, eigenvalues: Tensor) -> Tensor:
        """Return the Wasserstein-1 distance to exact eigenvalues, in their units: the area between the two."""
        exact = _points(eigenvalues, "SpectralDensity.distance_to").reshape(-1)
        if not len(exact):
            problem = "there are no eigenvalues"
            raise ArgumentError(message("SpectralDensity.distance_to", problem))
        nodes, weights = self.nodes.reshape(-1), self.weights.reshape(-1) / len(self.nodes)
        points = torch.cat([nodes, exact])
        steps = torch.cat([weights, torch.full_like(exact, -1 / len(exact))])
        order = points.argsort()
        gaps = points[order].diff()
        return (steps[order].cumsum(0)[:-1].abs() * gaps).sum()

    def _estimate(self, each: Tensor) -> Estimate:
        """Return the mean over the vectors, along the first axis."""
        count = len(each)
        error = torch.full_like(each[0], math.inf)
        if count > 1:
            error = each.std(0) / math.sqrt(count)
        return Estimate(each.mean(0), error, self.num_matvecs, None, count - 1)


def _points(points: Any, where: str) -> Tensor:
    if not isinstance(points, Tensor):
        problem = f"expected a tensor of numbers, got {type(points).__name__}"
        raise ArgumentTypeError(message(where, problem))
    flat = points.detach().double().cpu()
    if bool(flat.isnan().any()):
        raise ArgumentError(message(where, "a number is NaN"))
    return flat


def spectral_density(
    op: LinearOperator,
    /,
    num_vectors: int = 8,
    *,
    num_steps: int = 64,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    checkpoint: CheckpointLike = None,
) -> SpectralDensity:
    """Estimate the distribution of the eigenvalues by stochastic Lanczos quadrature.

    Parameters
    ----------
    op
        A real symmetric operator.
    num_vectors
        How many random vectors; their spread gives the errors.
    num_steps
        How many Lanczos steps of each, one product each; at most `n`.
    generator
        Its next value seeds the vectors; torch's global generator if None.
    memory_budget
        Bytes for the Krylov spaces, `num_steps` vectors each, of the vectors that are worked on together; by default 8
        times that of `LinearOperator.mm`, and room for at least one.
    checkpoint
        A file in which it is kept while it runs, and from which it goes on if it was interrupted; see `Checkpoint`.

    Returns
    -------
    SpectralDensity
        Its methods give the density, the cumulative distribution, and traces of functions, with their errors.

    Raises
    ------
    TypeError, ValueError
        The operator is complex or not symmetric; a count is below one.
    NonFiniteError
        A product has NaN or infinite entries.

    Notes
    -----
    With full reorthogonalisation. The mean over many vectors is the exact distribution, as seen by polynomials of
    degree `2 num_steps - 1`, but for the resolution, some roundings of the largest eigenvalue; one vector of `n`
    entries has errors of about `sqrt(2 / n)` of the share of eigenvalues.

    References
    ----------
    S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM Journal on Matrix
    Analysis and Applications 38(4), 2017. https://doi.org/10.1137/16M1104974
    L. Lin, Y. Saad, C. Yang, Approximating spectral densities of large matrices, SIAM Review 58(1), 2016.
    https://doi.org/10.1137/130934283

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, spectral_density
    >>> d = torch.linspace(1, 2, 1000)
    >>> density = spectral_density(LinearOperator(lambda v: d * v, d), generator=torch.Generator().manual_seed(0))
    >>> log_determinant = density.trace_of(torch.log)
    >>> bool((log_determinant.value - d.log().sum()).abs() < 4 * log_determinant.standard_error)
    True
    """
    where = "spectral_density"
    check_real_operator(op, where)
    check_symmetric(op, where)
    check_count(num_vectors, where, name="num_vectors")
    check_count(num_steps, where, name="num_steps")
    if memory_budget is not None:
        check_count(memory_budget, where, name="memory_budget")
    refuse_transforms(where)
    n = op.shape[0]
    if not n:
        raise ArgumentError(message(where, "the space has no entries"))
    steps = min(num_steps, n)
    work = torch.promote_types(op.dtype, torch.float32)
    budget = 8 * default_memory_budget(op.device) if memory_budget is None else memory_budget
    together = max(1, budget // (steps * n * work.itemsize))
    seed = op.draw_seed(generator)
    settings = {
        "seed": None if generator is None else seed,
        "num_vectors": num_vectors,
        "num_steps": num_steps,
        "memory_budget": memory_budget,
    }
    run = _Run(op, num_vectors, steps, together, work, where)
    with (
        keeping(checkpoint, op, where, settings),
        running.task(
            where, num_vectors * steps, "products", run.state, together=op.ranks is not None
        ) as task,
    ):
        run.begin(seed, task.resumed)
        task.done = run.spent
        return run.to_the_end()


class _Run:
    """The quadratures of the random vectors that are done, and the Krylov spaces of those that are worked on."""

    def __init__(
        self,
        op: LinearOperator,
        count: int,
        steps: int,
        together: int,
        work: torch.dtype,
        where: str,
    ) -> None:
        self._op, self._count, self._steps, self._together = op, count, steps, together
        self._work, self._where = work, where
        self._nodes: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._seed = 0
        self._spaces: KrylovSpaces | None = None

    @property
    def done(self) -> int:
        """How many vectors are done."""
        return sum(map(len, self._nodes))

    @property
    def spent(self) -> int:
        """How many products were made."""
        within = 0 if self._spaces is None else self._spaces.done * len(self._spaces.Q)
        return self.done * self._steps + within

    def begin(self, seed: int, state: State | None) -> None:
        """Begin, or go on from a state."""
        self._seed = seed
        if state is not None:
            self._seed = state["seed"]
            self._nodes, self._weights = list(state["nodes"]), list(state["weights"])
            if state["spaces"] is not None:
                self._spaces = self._begun()
                self._spaces.resume(state["spaces"])

    def state(self) -> State:
        """Return what it takes to go on."""
        return {
            "seed": self._seed,
            "nodes": self._nodes,
            "weights": self._weights,
            "spaces": None if self._spaces is None else self._spaces.state(),
        }

    def to_the_end(self) -> SpectralDensity:
        """Return the density of all vectors, or of what there is when it is cancelled."""
        try:
            while self.done < self._count:
                if self._spaces is None:
                    self._spaces = self._begun()
                self._spaces.run()
                self._add(self._spaces)
        except running.Cancelled:
            nothing = not self._nodes and (self._spaces is None or not self._spaces.done)
            if nothing or not running.only_outermost():
                raise
            problem = f"cancelled after {self.spent} of {self._count * self._steps} products"
            mend = (
                "The density is of those: its polynomials are of lower degree, or its errors larger"
            )
            warn_user(message(self._where, problem, mend), ConvergenceWarning)
            spent = self.spent
            if not self._nodes:
                assert self._spaces is not None
                self._add(self._spaces)
            return self._density(spent)
        return self._density(self.spent)

    def _begun(self) -> KrylovSpaces:
        rows = range(self.done, min(self.done + self._together, self._count))
        n = self._op.shape[0]
        start = tree.ravel(sphere(self._seed, rows, self._op.like), batch_dims=1)[0].to(self._work)
        return KrylovSpaces(self._op, start / math.sqrt(n), self._steps, self._where)

    def _add(self, spaces: KrylovSpaces) -> None:
        values, vectors = torch.linalg.eigh(spaces.projected())
        self._spaces = None
        self._nodes.append(values)
        self._weights.append(vectors[:, 0, :] ** 2)

    def _density(self, spent: int) -> SpectralDensity:
        nodes, weights = torch.cat(self._nodes), torch.cat(self._weights)
        resolution = 10 * torch.finfo(self._work).eps * float(nodes.abs().max())
        return SpectralDensity(nodes, weights, self._op.shape[0], spent, resolution)
