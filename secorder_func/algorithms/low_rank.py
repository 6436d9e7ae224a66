"""Estimators that first find the directions in which a matrix is large, and leave only the rest to chance.

Vectors are the rows of `(k, n)` tensors, entries in the order of `tree.ravel(op.like)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import Sampling
from secorder_func.algorithms.wide import wide
from secorder_func.errors import NonFiniteError, message
from secorder_func.operators import LinearOperator
from secorder_func.typing import Tree

__all__ = [
    "OfRange",
    "Products",
    "RangeFinder",
    "Sketch",
    "Sketched",
    "error_of_mean",
    "left_out",
    "mean_over_pairs",
]


class Products:
    """The products of an operator with vectors, of which there can be more."""

    def __init__(self, op: LinearOperator, sampling: Sampling, images: Tensor | None) -> None:
        self._op, self._sampling = op, sampling
        n, dtype = op.shape[0], torch.promote_types(op.dtype, torch.float32)
        self._parts = [
            torch.zeros(0, n, dtype=dtype, device=op.device) if images is None else images
        ]

    @property
    def images(self) -> Tensor:
        """The products, `(k, n)`."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(len(part) for part in self._parts)

    def extend(self, vectors: Callable[[int, slice], Tree], count: int) -> None:
        """Make it `count`, some at a time; `vectors(start, rows)` are the vectors, counted from `start`."""
        start = self.count

        def product(some: Tree, rows: slice) -> Tensor:
            with torch.no_grad():
                return self._flat(self._op.mm(some, chunk_size=None))

        chunks = self._sampling.chunks
        for part in chunks.map(partial(vectors, start), product, count - start):
            self._parts.append(part)
            running.further(len(part))

    def cut(self, count: int) -> None:
        """Forget all but the first."""
        self._parts = [self.images[:count]]

    def require_finite(self) -> None:
        """Refuse products with NaN or infinite entries; one synchronisation."""
        if not bool(self.images.isfinite().all()):
            problem = "a product has NaN or infinite entries"
            mend = "Check the loss and its gradient at these parameters"
            raise NonFiniteError(message(self._sampling.where, problem, mend))

    def _flat(self, stacked: Tree) -> Tensor:
        rows: Tensor = tree.ravel(stacked, batch_dims=1)[0]
        return rows.detach().to(self._parts[0].dtype)


class Sketch:
    """Random probes and their products."""

    def __init__(self, op: LinearOperator, sampling: Sampling, state: State | None) -> None:
        self._sampling = sampling
        if state is not None:
            sampling.require_same(state)
        self.products = Products(op, sampling, None if state is None else state["images"])

    @property
    def images(self) -> Tensor:
        """The products, `(k, n)`."""
        return self.products.images

    @property
    def count(self) -> int:
        """How many there are."""
        return self.products.count

    def probes(self) -> Tensor:
        """Return the probes, drawn anew, `(k, n)`."""
        stacked = self._sampling.probes(0, slice(0, self.count))
        rows: Tensor = tree.ravel(stacked, batch_dims=1)[0]
        return rows.detach().to(self.images.dtype)

    def extend(self, count: int) -> None:
        """Make it `count`."""
        self.products.extend(self._sampling.probes, count)

    def state(self) -> State:
        """Return the products so far."""
        return {**self._sampling.state(), "images": self.images}


class RangeFinder:
    """An orthonormal basis of the products `A W` with random probes, and the products with the basis.

    It grows by blocks: what is there stays, so that products with it are not made twice. An interruption may come
    between any two products.

    Attributes
    ----------
    sketch
        The probes `W` and their products.
    basis
        `(k, n)`, orthonormal rows `Q`, with `A W = Q^T R`.
    triangle
        `R`, `(k, k)`, upper triangular.
    """

    def __init__(self, op: LinearOperator, sampling: Sampling, state: State | None) -> None:
        self.sketch = Sketch(op, sampling, state)
        self.basis = self.sketch.images[:0]
        self.triangle = self.basis.new_zeros(0, 0)
        if state is not None:
            self.basis, self.triangle = state["basis"], state["triangle"]
        self._of_basis = Products(op, sampling, None if state is None else state["products"])
        self._unravel = tree.ravel(op.like)[1]

    @property
    def products(self) -> Tensor:
        """`A Q`, `(k, n)`."""
        return self._of_basis.images

    def extend(self, count: int) -> None:
        """Make it `count` probes, two products each."""
        self.sketch.extend(count)
        if len(self.basis) < count:
            self.sketch.products.require_finite()
            self._orthogonalise()
        self._of_basis.extend(self._rows, count)

    def cut(self) -> int:
        """Forget the probes that have not had both products; return how many are left."""
        count = self._of_basis.count
        self.sketch.products.cut(count)
        self.basis, self.triangle = self.basis[:count], self.triangle[:count, :count]
        return count

    def state(self) -> State:
        """Return what it takes to go on."""
        return {
            **self.sketch.state(),
            "basis": self.basis,
            "triangle": self.triangle,
            "products": self.products,
        }

    def _rows(self, start: int, rows: slice) -> Tree:
        return self._unravel(self.basis[start + rows.start : start + rows.stop])

    def _orthogonalise(self) -> None:
        """Take the products that are new into the basis."""
        old = len(self.basis)
        images = self.sketch.images[old:]
        inside = images.new_zeros(old, len(images))
        for _ in range(2 if old else 0):  # twice is enough
            part = self.basis @ images.T
            images = images - part.T @ self.basis
            inside += part
        new, corner = torch.linalg.qr(images.T)
        self.basis = torch.cat([self.basis, new.T])
        lower = torch.cat([corner.new_zeros(len(corner), old), corner], 1)
        self.triangle = torch.cat([torch.cat([self.triangle, inside], 1), lower])


class Sketched:
    """An estimator that keeps a sketch; exact where that is cheaper."""

    def __init__(self, op: LinearOperator, sampling: Sampling, state: State | None) -> None:
        self.op, self.sampling = op, sampling
        self.n = op.shape[0]
        self.exact: Tensor | None = None if state is None else state["exact"]

    def extend(self, total: int) -> None:
        """Make what is missing."""
        if total < self.n:
            self.grow(total)
        elif self.exact is None:
            self.exact = self.whole().detach()

    def cut(self) -> int:
        """Drop what is half done, and return how many products an estimate can be made from."""
        raise NotImplementedError

    def estimate(self, total: int) -> Estimate:
        """Return the mean of the values, or the exact answer."""
        if self.exact is not None:
            value, error = self.shaped(self.exact), self.shaped(torch.zeros_like(self.exact))
            return Estimate(value, error, self.n, degrees_of_freedom=max(1, self.n - 1))
        values, error, spent = self.values(total)
        mean = self.shaped(values.mean(0))
        return Estimate(mean, self.shaped(error), spent, None, len(values) - 1)

    def state(self) -> State:
        """Return what it takes to go on."""
        return {"exact": self.exact, **self.kept()}

    def grow(self, total: int) -> None:
        """Make the products that are missing, of fewer than the space has entries."""
        raise NotImplementedError

    def values(self, total: int) -> tuple[Tensor, Tensor, int]:
        """Return values with the answer as their mean, the error of their mean, and how many products they took."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Return the exact answer, by as many products as the space has entries."""
        raise NotImplementedError

    def shaped(self, value: Tensor) -> Tree:
        """Return an answer as the user gets it."""
        raise NotImplementedError

    def kept(self) -> State:
        """Return the products."""
        raise NotImplementedError


class OfRange(Sketched):
    """One that spends half of its products on a range and half on the products with that."""

    def __init__(self, op: LinearOperator, sampling: Sampling, state: State | None) -> None:
        super().__init__(op, sampling, state)
        self.range = RangeFinder(op, sampling, state)

    def grow(self, total: int) -> None:
        """Make the products that are missing."""
        self.range.extend(max(1, total // 2))

    def cut(self) -> int:
        """Drop what is half done, and return how many products an estimate can be made from."""
        return 2 * self.range.cut()

    def kept(self) -> State:
        """Return the products."""
        return self.range.state()


def left_out(triangle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what of the basis the products span, how much that is, and what is lost when one of them is left out.

    Returns
    -------
    tuple
        In float64: the projector onto the span of the columns of `R`, `(k, k)`: where these depend on each other, the
        basis has more directions, which come from rounding and mean nothing. The rank. And the lost directions,
        `(k, k)`: column `i` is the unit vector in the span orthogonal to all columns of `R` but column `i`; zero where
        column `i` depends on the others.
    """
    left, values, right = torch.linalg.svd(wide(triangle))
    floor = torch.finfo(triangle.dtype).eps * len(values) * values[:1]
    kept = (values > floor).to(values)
    columns = (left * (kept / torch.where(kept > 0, values, torch.ones_like(values)))) @ right
    lengths = torch.linalg.vector_norm(columns, dim=0)
    dependent = ((1 - kept).unsqueeze(1) * right).square().sum(0)
    lost = (dependent < _DEPENDS) & (lengths > 0)
    directions = torch.where(lost, columns / lengths, torch.zeros_like(columns))
    return (left * kept) @ left.T, kept.sum(), directions


_DEPENDS = 1e-8
"""What share of a column among the combinations that vanish makes it depend on the others."""


def error_of_mean(values: Tensor, covariance: Tensor) -> Tensor:
    """Return the standard error of the mean of `k` dependent values along the first axis.

    `values[i]` is unbiased whatever the other probes are. With `values_j[i]` for the same without probe `j`, the
    differences `d_ij = values[i] - values_j[i]` have no mean given either probe, so that `E[d_ij d_ji]` is exactly the
    covariance of values `i` and `j`. Hence the mean over pairs of `d_ij d_ji`, given as `covariance`, and the usual
    variance over `k` add up to an unbiased estimate of the variance of the mean. Without the first the error of a
    sketch would be understated, many times where the spectrum falls fast.
    """
    k = len(values)
    if k == 1:
        return torch.full_like(values[0], math.inf)
    variance = wide(values).var(0) / k + wide(covariance).clamp(min=0)
    return variance.sqrt().to(values.dtype)


def mean_over_pairs(differences: Tensor) -> Tensor:
    """Return the mean of `d_ij d_ji` over `i != j`, of `(k, k, ...)`."""
    k = differences.shape[0]
    differences = wide(differences)
    products = differences * differences.transpose(0, 1)
    own = products.diagonal().sum(-1)
    return (products.sum((0, 1)) - own) / max(1, k * (k - 1))
