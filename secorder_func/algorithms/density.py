"""The distribution of all eigenvalues of a symmetric operator, and traces of functions of it, by Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.krylov_spaces import krylov_spaces
from secorder_func.algorithms.probes import draw_seed, sphere
from secorder_func.checks import check_callable, check_count, check_positive
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
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
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    num_matvecs: int
    resolution: float = 0.0

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
    seed = draw_seed(generator)
    nodes, weights = [], []
    for first in range(0, num_vectors, together):
        rows = range(first, min(first + together, num_vectors))
        start = tree.ravel(sphere(seed, rows, op.like), batch_dims=1)[0].to(work)
        T, _ = krylov_spaces(op, start / math.sqrt(n), steps, where)
        values, vectors = torch.linalg.eigh(T)
        nodes.append(values)
        weights.append(vectors[:, 0, :] ** 2)
    every = torch.cat(nodes)
    resolution = 10 * torch.finfo(work).eps * float(every.abs().max())
    return SpectralDensity(every, torch.cat(weights), n, num_vectors * steps, resolution)
