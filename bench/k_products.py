"""What does one of K products with the same Hessian cost, in gradients?

Command: `python -m bench k_products` (`--quick` only sees that it runs).

64 vectors, 16 on the CNN, the ResNet and the GPTs. Operators and graphs are made before.

Expected story, written before the first run of this file. With overhead only (tiny, deep), all at once costs nearly
as much as one: 64 products by `op.mm` cost as much as 3 to 4 gradients, 0.05 a product, 50 times less than
torch-secorder's loop at 2.5; JAX 0.02. Where time is in matrix products, a product of many costs what a product of an
operator costs, because the flops are the same: 1.5 on the MLP, 2.2 on the GPT, whether in a loop or at once; the loop
of torch-secorder stays at its single product, 2.6 and 3.2. At once may even lose on convolutions, where 16 vectors at
a time leave the cache (2.5 to 3.5). A graph that is reused in the manner of PyHessian costs what our loop costs.
curvlinops maps one product with everything in it over the vectors: the model is evaluated once, so 3.5 on the MLP
where a single one is 4.4, but as slow as its single product on the CNN. JAX's batched products gain nothing over its
single ones but on the small models: 2 on the MLP, 2.3 on the GPT, 5 on the CNN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import peers, products
from bench.harness import Candidate, Run, compare, described, gradient, leaves, relative_error
from bench.jax_twins import jax_several
from bench.oracles import hessian
from bench.problems import BIG, TIMED, Problem, problem
from bench.products import columns, looped
from secorder_func import hessian_operator

QUESTION = "What does one of K products with the same Hessian cost, in gradients?"
NOTES = (
    "64 vectors, 16 on the CNN, the ResNet and the GPTs. Operators and graphs that can be kept are made before; what "
    "drop-in functions recompute they recompute.",
    "JAX maps with `vmap`, but loops in Python where there are convolutions: mapped they took ten times as long.",
)


def several(name: str, count: int, **options: Any) -> Candidate:
    """Return the candidate that multiplies `count` vectors at once, by an operator that is made before."""

    def make(p: Problem) -> Run:
        f, params = p.functional
        op = hessian_operator(f, params, p.inputs, p.targets)
        vectors = p.named(p.vectors(count))
        return lambda: op.mm(vectors, **options)

    return Candidate(name, make)


def _candidates(count: int) -> list[Candidate]:
    return [
        several("hessian_operator.mm(V)", count),
        looped("loop of hessian_operator @ v", products.operator, count),
        looped("loop of compat exact_hvp", products.compat_hvp, count),
        looped("loop of torch-secorder exact_hvp", peers.torch_secorder_hvp, count, peer=True),
        peers.curvlinops_several("curvlinops Hessian @ M", count),
        looped("PyHessian-style, graph kept", peers.reused_graph, count, peer=True),
        jax_several("JAX jit jvp(grad(f)), mapped", count),
    ]


def check_of(p: Problem, count: int) -> Callable[[Any], float]:
    """Return the largest error of the first product, the last one, and the sum of all."""
    vectors = p.vectors(count)
    chosen = [[v[0] for v in vectors], [v[-1] for v in vectors], [v.sum(0) for v in vectors]]
    truths = [hessian(p, vector) for vector in chosen]

    def check(result: Any) -> float:
        found = columns(leaves(result), len(vectors))
        answers = [[t[0] for t in found], [t[-1] for t in found], [t.sum(0) for t in found]]
        return max(relative_error(a, t) for a, t in zip(answers, truths, strict=True))

    return check


def _measured(p: Problem, count: int, seconds: float) -> dict[str, Any]:
    records = compare(
        p,
        gradient(p),
        _candidates(count),
        check_of(p, count),
        tolerance=1e-4,
        seconds=seconds,
        per=count,
    )
    return described(p, records, products=count)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny", "deep") if quick else TIMED
    seconds = 1.0 if quick else 15.0
    problems = [_measured(problem(name), 16 if name in BIG else 64, seconds) for name in names]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
