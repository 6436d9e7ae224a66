"""Traces of operators with decaying spectra: Hutch++, XTrace, XNysTrace."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func.algorithms.checkpoint import CheckpointLike
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import Sampling, settings_of
from secorder_func.algorithms.low_rank import (
    OfRange,
    RangeFinder,
    Sketch,
    Sketched,
    error_of_mean,
    left_out,
    mean_over_pairs,
)
from secorder_func.algorithms.probes import rademacher, sphere
from secorder_func.algorithms.stopping import Accumulated, Target, estimated
from secorder_func.algorithms.trace import exact_trace
from secorder_func.errors import ArgumentError, message
from secorder_func.operators import LinearOperator
from secorder_func.operators.linear_operator import check_real_operator, check_symmetric
from secorder_func.typing import ChunkSize

__all__ = ["hutchpp_trace", "xnystrace", "xtrace"]


def hutchpp_trace(
    op: LinearOperator,
    /,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    resume: Estimate | None = None,
    checkpoint: CheckpointLike = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Estimate:
    """Estimate the trace by Hutch++: exact on the range of a sketch, by random probes on the rest.

    A third of the products each goes into the sketch, its basis and the probes.

    Parameters
    ----------
    op
        A real operator, symmetric or not.
    num_matvecs
        How many products. From the size of the space on, the exact trace is returned by as many products as that.
    rtol, atol, max_matvecs, resume, checkpoint, generator, chunk_size, memory_budget
        As for `hutchinson_trace`. `num_matvecs` vectors are kept.

    Returns
    -------
    Estimate
        Value and standard error are 0-dim tensors; unbiased. The standard error is that of the probes on the rest.

    Raises
    ------
    TypeError, ValueError
        As for `hutchinson_trace`.

    Notes
    -----
    For positive semidefinite matrices the error falls at least as `1 / num_matvecs`, that of `hutchinson_trace` as its
    square root. No derivative is recorded.

    References
    ----------
    R. A. Meyer, C. Musco, C. Musco, D. P. Woodruff, Hutch++: optimal stochastic trace estimation, SOSA 2021.
    https://doi.org/10.1137/1.9781611976496.16

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, hutchpp_trace
    >>> ones = LinearOperator(lambda v: v.sum().expand(50), torch.zeros(50))
    >>> print(f"{hutchpp_trace(ones, 6).value:.3f}")
    50.000
    """
    where = "hutchpp_trace"
    target = _checked(op, num_matvecs, rtol, atol, max_matvecs, where)

    def begin(seed: int, state: State | None) -> Accumulated:
        sketch = Sampling(op, seed, rademacher, chunk_size, memory_budget, where)
        rest = Sampling(op, _other(seed), rademacher, chunk_size, memory_budget, where)
        return _HutchPP(op, sketch, rest, state)

    settings = settings_of(chunk_size, memory_budget)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def xtrace(
    op: LinearOperator,
    /,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    resume: Estimate | None = None,
    checkpoint: CheckpointLike = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Estimate:
    """Estimate the trace by XTrace: every probe in turn is left out of a sketch and estimates what that misses.

    Half of the products goes into the sketch, half into its basis.

    Parameters
    ----------
    op
        A real operator, symmetric or not.
    num_matvecs
        How many products, an even number of them is made. From the size of the space on, the exact trace is returned.
    rtol, atol, max_matvecs, resume, checkpoint, generator, chunk_size, memory_budget
        As for `hutchinson_trace`. One and a half times `num_matvecs` vectors are kept.

    Returns
    -------
    Estimate
        Value and standard error are 0-dim tensors; unbiased.

    Raises
    ------
    TypeError, ValueError
        As for `hutchinson_trace`.

    Notes
    -----
    The error falls as that of the best approximation by half as many eigenvectors: exponentially where the eigenvalues
    do, at least as `1 / num_matvecs` for positive semidefinite matrices. No derivative is recorded.

    References
    ----------
    E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace estimation,
    SIAM Journal on Matrix Analysis and Applications 45(1), 2024. https://doi.org/10.1137/23M1548323

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, xtrace
    >>> falling = 0.5 ** torch.arange(50.0)
    >>> op = LinearOperator(lambda v: falling * v, torch.zeros(50))
    >>> print(f"{xtrace(op, 30).value:.2f}")
    2.00
    """
    where = "xtrace"
    target = _checked(op, num_matvecs, rtol, atol, max_matvecs, where)

    def begin(seed: int, state: State | None) -> Accumulated:
        return _XTrace(op, Sampling(op, seed, sphere, chunk_size, memory_budget, where), state)

    settings = settings_of(chunk_size, memory_budget)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def xnystrace(
    op: LinearOperator,
    /,
    num_matvecs: int | None = None,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    resume: Estimate | None = None,
    checkpoint: CheckpointLike = None,
    generator: torch.Generator | None = None,
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> Estimate:
    """Estimate the trace of a positive semidefinite operator by XNysTrace.

    As XTrace, with the Nystrom approximation, which one product a probe gives: all products go into the sketch.

    Parameters
    ----------
    op
        A real, symmetric, positive semidefinite operator: a Gauss-Newton matrix of a convex loss, a Fisher matrix.
    num_matvecs
        How many products. From the size of the space on, the exact trace is returned.
    rtol, atol, max_matvecs, resume, checkpoint, generator, chunk_size, memory_budget
        As for `hutchinson_trace`. `num_matvecs` vectors are kept.

    Returns
    -------
    Estimate
        Value and standard error are 0-dim tensors; unbiased.

    Raises
    ------
    ValueError
        The products show that the operator is not positive semidefinite; also as for `hutchinson_trace`.

    Notes
    -----
    The error falls as that of the best approximation by as many eigenvectors as there are products. No derivative is
    recorded.

    References
    ----------
    E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace estimation,
    SIAM Journal on Matrix Analysis and Applications 45(1), 2024. https://doi.org/10.1137/23M1548323

    Examples
    --------
    >>> import torch
    >>> from secorder_func import LinearOperator, xnystrace
    >>> falling = 0.5 ** torch.arange(50.0).double()
    >>> op = LinearOperator(lambda v: falling * v, torch.zeros(50).double())
    >>> print(f"{xnystrace(op, 15).value:.2f}")
    2.00
    """
    where = "xnystrace"
    target = _checked(op, num_matvecs, rtol, atol, max_matvecs, where)
    check_symmetric(op, where, "Take xtrace, which needs no symmetry")

    def begin(seed: int, state: State | None) -> Accumulated:
        return _XNysTrace(op, Sampling(op, seed, sphere, chunk_size, memory_budget, where), state)

    settings = settings_of(chunk_size, memory_budget)
    return estimated(op, target, resume, generator, begin, where, checkpoint, settings)


def _checked(
    op: LinearOperator,
    num_matvecs: int | None,
    rtol: float | None,
    atol: float,
    max_matvecs: int | None,
    where: str,
) -> Target:
    check_real_operator(op, where)
    return Target.checked(num_matvecs, rtol, atol, max_matvecs, op.shape[0], where)


def _other(seed: int) -> int:
    """Return the seed of another stream."""
    return seed ^ 0x5DEECE66D


class _SketchedTrace(Sketched):
    def whole(self) -> Tensor:
        sampling = self.sampling
        return exact_trace(
            self.op, chunk_size=sampling.chunk_size, memory_budget=sampling.memory_budget
        )

    def shaped(self, value: Tensor) -> Tensor:
        return value.to(self.op.dtype)


class _HutchPP(_SketchedTrace):
    def __init__(
        self, op: LinearOperator, sketch: Sampling, rest: Sampling, state: State | None
    ) -> None:
        super().__init__(op, sketch, state)
        self.range = RangeFinder(op, sketch, state)
        self.rest = Sketch(op, rest, None if state is None else state["rest"])

    def grow(self, total: int) -> None:
        both = max(total // 3, len(self.range.products))  # more, where a run was cut short
        self.range.extend(both)
        self.rest.extend(max(self.rest.count, total - 2 * both))

    def values(self, total: int) -> tuple[Tensor, Tensor, int]:
        Q, AQ = self.range.basis, self.range.products
        G, AG = self.rest.probes(), self.rest.images
        inside = G @ Q.T
        outside = G - inside @ Q
        forms = (outside * (AG - inside @ AQ)).sum(1)
        values = forms + (Q * AQ).sum()
        return values, error_of_mean(values, values.new_zeros(())), 2 * len(Q) + len(G)

    def cut(self) -> int:
        both = self.range.cut()
        return 2 * both + self.rest.count if self.rest.count else 0

    def kept(self) -> State:
        return {**self.range.state(), "rest": self.rest.state()}


class _XTrace(_SketchedTrace, OfRange):
    def values(self, total: int) -> tuple[Tensor, Tensor, int]:
        Q, AQ = self.range.basis, self.range.products
        probes = self.range.sketch.probes()
        k, n = Q.shape
        R = self.range.triangle.double()
        P, rank, S = left_out(
            self.range.triangle
        )  # what the products span, and what that loses without a probe
        H = P @ (Q @ AQ.T).double() @ P  # Q^T A Q
        W = P @ (Q @ probes.T).double()
        T = P @ (AQ @ probes.T).double()
        loses = (S.square().sum(0) > 0.5).to(H.dtype)  # one dimension, or none
        # Of probe w: r = w - Q Q^T w outside of the basis, and what its products with Q and itself are.
        rest = probes.square().sum(1).double() - W.square().sum(0)
        form = (W * (H @ W - T)).sum(0)
        mixed = S.T @ (R - H @ W + T - H.T @ W)
        along, bent, near = S.T @ W, S.T @ H @ S, S.T @ S

        own, curved = along.diagonal(), bent.diagonal()
        square = rest + own**2
        values = H.trace() - curved
        values += (form + own * mixed.diagonal() + own**2 * curved) * ((n - rank + loses) / square)

        # The same for probe j without probe i, which is lost from the basis too: x = r + a s_i + b s_j.
        both = (bent + bent.T) / 2
        apart = (1 - near**2).clamp(min=_CLOSE)
        a, b = (along - near * own) / apart, (own - near * along) / apart
        square = rest + a * along + b * own
        forms = form + a * mixed + b * mixed.diagonal()
        forms += a**2 * curved.unsqueeze(1) + b**2 * curved + 2 * a * b * both
        without = H.trace() - (curved.unsqueeze(1) + curved - 2 * near * both) / apart
        without += forms * ((n - rank + loses.unsqueeze(1) + loses) / square)
        differences = values - without  # (i, j)
        return values, error_of_mean(values, mean_over_pairs(differences)), 2 * k


class _XNysTrace(_SketchedTrace):
    def __init__(self, op: LinearOperator, sampling: Sampling, state: State | None) -> None:
        super().__init__(op, sampling, state)
        self.sketch = Sketch(op, sampling, state)

    def grow(self, total: int) -> None:
        self.sketch.extend(total)

    def values(self, total: int) -> tuple[Tensor, Tensor, int]:
        self.sketch.products.require_finite()
        probes, images = self.sketch.probes(), self.sketch.images
        k, n = probes.shape
        gram = (probes @ images.T).double()
        own = (probes @ probes.T).double()
        shift = _shift(gram, own, torch.finfo(images.dtype).eps)
        _, R = torch.linalg.qr((images + shift.to(images.dtype) * probes).T)
        R = R.double()
        factor = torch.linalg.cholesky((gram + gram.T) / 2 + shift * own)
        # |Y F^-T|² is the trace of the approximation Y (W^T Y)^-1 Y^T.
        whole = torch.linalg.solve_triangular(factor, R.T, upper=False).square().sum()
        M = torch.cholesky_inverse(factor)
        L = torch.cholesky_inverse(torch.linalg.cholesky(own))
        RM = R @ M
        G = RM.T @ RM
        m, g, length = M.diagonal(), G.diagonal(), L.diagonal()
        values = whole - n * shift - g / m + (n - k + 1) * length / m

        # The same for probe j without probe i.
        share = M / m.unsqueeze(1)
        m_j = (m - M * share).clamp(min=_CLOSE * m)
        g_j = g - 2 * G * share + g.unsqueeze(1) * share**2
        length_j = length - L**2 / length.unsqueeze(1)
        without = whole - n * shift - (g / m).unsqueeze(1)
        without = without - g_j / m_j + (n - k + 2) * length_j / m_j
        differences = values - without
        return values, error_of_mean(values, mean_over_pairs(differences)), k

    def cut(self) -> int:
        return self.sketch.count

    def kept(self) -> State:
        return self.sketch.state()


_CLOSE = 1e-13
"""Below which two directions are one."""
_NEGATIVE, _ABOVE = 100.0, 4.0
"""In units of rounding: how negative rounding makes an eigenvalue at most, and how far above zero all are raised."""


def _shift(gram: Tensor, own: Tensor, eps: float) -> Tensor:
    """Return by how much `A` is to be raised for `W^T A W` to be positive definite; refuse a negative matrix."""
    values = torch.linalg.eigvalsh((gram + gram.T) / 2)
    largest = values.abs().max()
    if bool(values[0] < -_NEGATIVE * eps * largest):
        problem = f"the operator is not positive semidefinite: {float(values[0]):.3g} beside {float(largest):.3g}"
        raise ArgumentError(message("xnystrace", problem, "Take xtrace, which needs no sign"))
    above = 2 * (-values[0]).clamp(min=0) + _ABOVE * eps * largest
    shift: Tensor = above.clamp(min=torch.finfo(gram.dtype).tiny) / torch.linalg.eigvalsh(own)[0]
    return shift
