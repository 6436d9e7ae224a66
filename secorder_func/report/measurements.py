"""The numbers of the demonstration: curvature of a model's mean loss, each beside an independent answer.

Pure computations: they print nothing, draw random vectors from the generator or seed given, and leave the model
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.func import grad, vmap

from secorder_func import (
    Estimate,
    LinearOperator,
    exact_trace,
    finite_difference_hvp,
    hutchinson_trace,
    hvp,
    tree,
)
from secorder_func.report.problem import Params, Problem, relative_difference, watched

__all__ = [
    "Distance",
    "Eigenpair",
    "Spectrum",
    "TraceConvergence",
    "fisher_trace",
    "gauss_newton_distance",
    "hessian_block",
    "product_against_differences",
    "softmax_block",
    "spectrum",
    "trace_convergence",
]


# ---------------------------------------------------------------------------------- one product


def product_against_differences(problem: Problem, *, generator: torch.Generator) -> float:
    """Return the relative difference of `hvp` and `finite_difference_hvp` along a random vector."""
    v = tree.random_like(problem.params, generator=generator)
    at = (problem.params, v, problem.inputs, problem.targets)
    return relative_difference(finite_difference_hvp(problem.loss)(*at), hvp(problem.loss)(*at))


def hessian_block(problem: Problem, op: LinearOperator, names: Sequence[str]) -> Tensor:
    """Return the block of the Hessian that belongs to some parameters, in the order of `tree.ravel`, from products."""
    chosen = {name: problem.params[name] for name in names}
    size = tree.numel(chosen)
    elsewhere = {name: p.new_zeros(size, *p.shape) for name, p in problem.params.items()}
    products = op.mm({**elsewhere, **tree.basis(chosen, 0, size)}, chunk_size=64)
    return tree.ravel({name: products[name] for name in names}, batch_dims=1)[0]


def softmax_block(features: Tensor, chances: Tensor) -> Tensor:
    """Return the Hessian of the mean cross-entropy in the last layer's bias and weight, in closed form.

    It is the mean of `(diag p - p p^T) x (1, h)(1, h)^T`, a Kronecker product, over samples with features `h` and
    predicted chances `p`; the labels do not enter. The bias comes first, then the rows of the weight.
    """
    num_samples, num_classes = chances.shape
    ones = features.new_ones(num_samples, 1)
    h = torch.cat([ones, features], 1)
    outputs = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    blocks = torch.einsum("nab,ni,nj->aibj", outputs, h, h) / num_samples
    size = num_classes * h.shape[1]
    places = torch.arange(size).reshape(num_classes, h.shape[1])
    order = torch.cat([places[:, 0], places[:, 1:].flatten()])
    return blocks.reshape(size, size)[order][:, order]


# --------------------------------------------------------------------------------- Gauss-Newton


@dataclass(frozen=True)
class Distance:
    """How far the Gauss-Newton matrix is from the Hessian along random vectors.

    Attributes
    ----------
    relative
        `|H v - G v| / |H v|`, the mean over vectors.
    cosine
        Of the angle between `H v` and `G v`, the mean over vectors.
    """

    relative: float
    cosine: float


def gauss_newton_distance(
    hessian: LinearOperator,
    gauss_newton: LinearOperator,
    *,
    num_vectors: int,
    generator: torch.Generator,
) -> Distance:
    """Compare two matrices by their products with the same standard normal vectors."""
    vectors = tree.stack(
        [tree.random_like(hessian.like, generator=generator) for _ in range(num_vectors)]
    )
    hv, gv = hessian.mm(vectors), gauss_newton.mm(vectors)
    apart = tree.sub(hv, gv)
    hv_norms, gv_norms, apart_norms = (tree.batched_dot(x, x).sqrt() for x in (hv, gv, apart))
    return Distance(
        relative=(apart_norms / hv_norms).mean().item(),
        cosine=(tree.batched_dot(hv, gv) / (hv_norms * gv_norms)).mean().item(),
    )


def fisher_trace(problem: Problem, *, chunk_size: int = 128) -> float:
    """Return the trace of the Fisher matrix of a softmax classifier, from gradients alone.

    It is the squared gradient of the cross-entropy, expected over labels drawn from the model itself and averaged over
    samples, and equals the trace of the Gauss-Newton matrix of the mean cross-entropy.
    """

    def squared_gradient(params: Params, inputs: Tensor, label: Tensor) -> Tensor:
        gradient = grad(problem.loss)(params, inputs, label)
        return tree.dot(gradient, gradient)

    every_label = vmap(squared_gradient, in_dims=(None, None, 0))
    every_sample = vmap(every_label, in_dims=(None, 0, None), chunk_size=chunk_size)
    with torch.no_grad():
        chances = problem.model_fn(problem.params, problem.inputs).softmax(1)
        labels = torch.arange(chances.shape[1])
        squares = every_sample(problem.params, problem.inputs, labels)  # (samples, classes)
        return float((chances * squares).sum(1).mean())


# --------------------------------------------------------------------------------------- trace


@dataclass(frozen=True, eq=False)
class TraceConvergence:
    """Estimates of a trace from more and more of the same probes, beside the exact trace.

    Attributes
    ----------
    estimates
        By increasing number of products; each knows its standard error.
    exact
        One product for every parameter.
    """

    estimates: tuple[Estimate, ...]
    exact: float

    @property
    def last(self) -> Estimate:
        """The estimate from all probes."""
        return self.estimates[-1]

    @property
    def z_score(self) -> float:
        """The error of the last estimate in standard errors."""
        return float((self.last.value - self.exact) / self.last.standard_error)


def trace_convergence(op: LinearOperator, counts: Sequence[int], *, seed: int) -> TraceConvergence:
    """Estimate a trace with each of the counts of products, and compute it exactly."""
    # Probe k depends on the seed and k only, so that a longer estimate continues a shorter one.
    estimates = [
        hutchinson_trace(op, count, generator=torch.Generator().manual_seed(seed))
        for count in counts
    ]
    return TraceConvergence(tuple(estimates), exact_trace(op).item())


# ------------------------------------------------------------------------------------- spectrum


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue and `|A u - value u|` of its unit vector: some eigenvalue of `A` is that close."""

    value: float
    residual: float


@dataclass(frozen=True)
class Spectrum:
    """The ends of a spectrum.

    Attributes
    ----------
    largest
        In descending order.
    smallest
        The most negative.
    num_matvecs
        How many products SciPy spent.
    """

    largest: tuple[Eigenpair, ...]
    smallest: Eigenpair
    num_matvecs: int


def spectrum(op: LinearOperator, num_largest: int, *, generator: torch.Generator) -> Spectrum:
    """Return the ends of the spectrum by SciPy's implicitly restarted Lanczos method."""
    spent = 0

    def count(products: int) -> None:
        nonlocal spent
        spent += products

    matrix = watched(op, count).scipy()
    start = torch.randn(op.shape[0], dtype=op.dtype, generator=generator).numpy()
    flat = op.flat()

    def pairs(which: str, number: int) -> list[Eigenpair]:
        values, vectors = eigsh(matrix, k=number, which=which, v0=start)
        columns = torch.as_tensor(vectors).T
        found = []
        for value, u in zip(values.tolist(), columns, strict=True):
            residual = (flat @ u.contiguous() - value * u).norm() / u.norm()
            found.append(Eigenpair(value, residual.item()))
        return sorted(found, key=lambda pair: -pair.value)

    largest, (smallest,) = pairs("LA", num_largest), pairs("SA", 1)
    return Spectrum(tuple(largest), smallest, spent)
