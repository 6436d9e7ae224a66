"""The results of the demonstration and what is said about them."""

from __future__ import annotations

from dataclasses import dataclass

from secorder_func.report.measurements import Distance, Spectrum, TraceConvergence
from secorder_func.report.per_sample import Ranking, SampleTraces
from secorder_func.report.tables import Row

__all__ = ["Results", "rows"]

# What passes for rounding in float64, for a difference of gradients, for a standard normal variable.
EXACT, BY_DIFFERENCES, Z_SCORE = 1e-10, 1e-6, 4.0


@dataclass(frozen=True, eq=False)
class Results:
    """All that was measured on one problem.

    Attributes
    ----------
    num_params
        The order of the matrices.
    product
        Relative difference of a product and its finite difference.
    block, block_size
        Relative difference of the last layer's block to its closed form; its order.
    before, after
        Gauss-Newton against Hessian, at the initial and at the trained parameters.
    gauss_newton_trace, fisher_trace
        The same number by products and by gradients.
    trace, spectrum, samples, ranking
        Of the Hessian of the mean loss, and of the Hessians of the samples' losses.
    reference
        The trace for the most curved sample by double backward.
    untouched
        Whether the model's parameters are what they were after training, bit by bit.
    """

    num_params: int
    product: float
    block: float
    block_size: int
    before: Distance
    after: Distance
    gauss_newton_trace: float
    fisher_trace: float
    trace: TraceConvergence
    spectrum: Spectrum
    samples: SampleTraces
    ranking: Ranking
    reference: float
    untouched: bool


def rows(results: Results) -> list[Row]:
    """Return the lines of the table of results."""
    return [
        *_products(results),
        *_gauss_newton(results),
        *_trace(results.trace, results.num_params),
        *_spectrum(results.spectrum),
        *_samples(results),
        Row(
            "the model after all this",
            f"{results.num_params} parameters",
            "a copy made after training: " + ("bit-identical" if results.untouched else "CHANGED"),
            results.untouched,
        ),
    ]


def _products(results: Results) -> list[Row]:
    size = results.block_size
    return [
        Row(
            "product H v",
            "hvp, random v",
            f"central differences of the gradient: {_apart(results.product)}",
            results.product < BY_DIFFERENCES,
        ),
        Row(
            "last layer's block of H",
            f"{size} x {size}",
            f"its closed form, no autograd: {_apart(results.block)}",
            results.block < EXACT,
            closes=True,
        ),
    ]


def _gauss_newton(results: Results) -> list[Row]:
    before, after = results.before, results.after
    difference = _relative(results.gauss_newton_trace, results.fisher_trace)
    return [
        Row(
            "|H v - G v| / |H v|",
            f"{after.relative:.3f}",
            f"{before.relative:.3f} before training: closer as residuals shrink",
            after.relative < before.relative,
        ),
        Row(
            "cosine of H v and G v",
            f"{after.cosine:.3f}",
            f"{before.cosine:.3f} before training",
            after.cosine > before.cosine,
        ),
        Row(
            "trace of G",
            f"{results.gauss_newton_trace:.5g}",
            f"the Fisher matrix, from gradients: {_apart(difference)}",
            difference < EXACT,
            closes=True,
        ),
    ]


def _trace(trace: TraceConvergence, num_params: int) -> list[Row]:
    last = trace.last
    return [
        Row(
            "trace of H, estimated",
            f"{last.value.item():.4g} ± {last.standard_error.item():.2g}",
            f"exact {trace.exact:.5g}: z = {trace.z_score:+.2f}; {last.num_matvecs} products, not {num_params}",
            abs(trace.z_score) < Z_SCORE,
            closes=True,
        )
    ]


def _spectrum(spectrum: Spectrum) -> list[Row]:
    scale = spectrum.largest[0].value
    residual = max(pair.residual for pair in spectrum.largest)
    return [
        Row(
            f"{len(spectrum.largest)} largest eigenvalues of H",
            " ".join(f"{pair.value:.2f}" for pair in spectrum.largest),
            f"residuals |H u - value u| up to {residual:.1e}",
            residual < EXACT * scale,
        ),
        Row(
            "smallest eigenvalue of H",
            f"{spectrum.smallest.value:.3g}",
            f"residual {spectrum.smallest.residual:.1e}; SciPy spent {spectrum.num_matvecs} products on both",
            spectrum.smallest.residual < EXACT * scale,
            closes=True,
        ),
    ]


def _samples(results: Results) -> list[Row]:
    samples, ranking = results.samples, results.ranking
    traces = samples.estimate.value
    exact = ranking.most_traces[0].item()
    difference = _relative(exact, results.reference)
    return [
        Row(
            f"traces of {len(traces)} samples",
            f"median {traces.median().item():.2g}, mean {traces.mean().item():.3g}",
            f"v·H v of the mean loss, {samples.estimate.num_matvecs} probes: {_apart(samples.mismatch)}",
            samples.mismatch < EXACT,
        ),
        Row(
            "the most curved sample",
            f"trace {exact:.5g}",
            f"torch.autograd's dense Hessian: {_apart(difference)}",
            difference < EXACT,
            closes=True,
        ),
    ]


def _apart(difference: float) -> str:
    return f"differs by {difference:.0e}" if difference >= 1e-15 else "differs by < 1e-15"


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)
