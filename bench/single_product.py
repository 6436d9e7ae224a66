"""What does one exact Hessian-vector product cost, in gradients?

Command: `python -m bench single_product` (`--quick` only sees that it runs).

Expected story, written before the first run of this file, with older measurements of some candidates known. By
counting products of matrices a gradient is 3, forward over reverse 9 and reverse over reverse 8 to 9, so a single
product should cost about 3 gradients by every eager route, ours and the peers', on models whose time is in matrix
products. Forward over reverse pays for torch's unfused forward rules and should be the slowest of ours, up to 4 on the
GPT. An operator that keeps the pullback of the gradient leaves only the last backward pass: 1.5 to 2.3. On the tiny
MLP all is overhead: transforms cost several times a double backward there, and an operator gets most of that
back. Our checks and repairs should be visible on the tiny MLP only.

Added before the first run with more peers and problems. BackPACK is a double backward: within 10% of torch-secorder.
A graph kept in the manner of PyHessian costs what our operator costs, on the tiny MLP less (1.3 where ours is 2).
JAX, compiled: 2.0 on the MLP, 2.3 on the GPT, 3 to 6 on convolutions, whose derivatives XLA does not fuse on a CPU,
and 0.3 on the tiny and the deep MLP, because it has no overhead a layer; its kept linear map costs two thirds of that.
The deep MLP is all overhead: 12 for `hvp`, 3 for a double backward. The ResNet is like the CNN, the small GPT
like the large one with a tenth more overhead.

Added with products by propagation, which `hvp` and `compat.exact_hvp` now are where they have rules, before the first
run of this file with them; single runs by hand were known. A forward pass with terms and one backward pass are 8
thirds of a gradient by the count, less for the first layer: 2.4 on the MLP, 2.8 on CNN and ResNet, 3.0 on the GPTs,
0.9, 0.8 and 0.95 of torch-secorder. Rules in Python cost 5 to 10 microseconds a function: 4 on the tiny MLP and 4 on
the deep one, where torch-secorder takes 2.5 and 3.3. `compat.exact_hvp` stays a double backward on the tiny one, at 1.5
times torch-secorder.
"""

from __future__ import annotations

from typing import Any

from bench import jax_twins, peers, products
from bench.harness import compare, described, gradient, relative_error
from bench.oracles import hessian
from bench.problems import TIMED, problem
from bench.products import single

QUESTION = "What does one exact Hessian-vector product cost, in gradients?"
NOTES = (
    "Bold rows are ours. An operator that is made before has paid for the gradient and its graph; made anew, it "
    "pays in the row.",
    "curvlinops 3.0.1 computes `jvp(jacrev(f))`, which torch 2.13 gets wrong in the weights of a LayerNorm; "
    "`jvp(grad(f))` it gets right.",
    "JAX compiles the same model, written in jax.numpy with the same weights, before it is timed.",
)
CANDIDATES = (
    single("hvp", products.transform()),
    single('hvp, mode="forward_over_reverse"', products.transform("forward_over_reverse")),
    single('hvp, mode="reverse_over_reverse"', products.transform("reverse_over_reverse")),
    single("hessian_operator @ v, made before", products.operator),
    single("hessian_operator @ v, made anew", products.operator_made_anew),
    single("compat exact_hvp", products.compat_hvp),
    single("torch-secorder exact_hvp", peers.torch_secorder_hvp, peer=True),
    single("curvlinops Hessian @ v, made before", peers.curvlinops_hessian, peer=True),
    single("BackPACK hessian_vector_product", peers.backpack_hvp, peer=True),
    single("plain double backward", peers.double_backward, peer=True),
    single("plain jvp(grad(f))", peers.plain_jvp_grad, peer=True),
    single("PyHessian-style, graph made before", peers.reused_graph, peer=True),
    single("JAX jit jvp(grad(f))", jax_twins.jax_hvp, peer=True),
    single("JAX jit linearize(grad(f)), made before", jax_twins.jax_linearized, peer=True),
)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny", "mlp") if quick else TIMED
    problems = []
    for name in names:
        p = problem(name)
        truth = hessian(p)
        records = compare(
            p,
            gradient(p),
            CANDIDATES,
            lambda result, truth=truth: relative_error(result, truth),
            tolerance=1e-4,
            seconds=1.0 if quick else 12.0,
        )
        problems.append(described(p, records))
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
