"""What does one Gauss-Newton product cost, in gradients?

Command: `python -m bench ggn` (`--quick` only sees that it runs).

Expected story, written before the first run of this file. By counting products of matrices forward mode costs 3
(model and tangent, 1 and 2 thirds of a gradient) and 2 thirds back: 5 thirds to 2 gradients for the whole, and an
operator that is made before leaves the tangent and the way back, 1.3 to 1.4. So `ggnvp` 2 to 2.5 on the MLP, 3 on CNN
and GPT, 12 on the tiny MLP; `ggn_operator` 1.4, 1.8, 1.8, 3 on the tiny one; made anew 3. curvlinops evaluates the
model twice, 3 to 4, and 20 on the tiny MLP. BackPACK gets the tangent from two backward passes: 4. The drop-in 2.5
everywhere and 5 on the tiny MLP. JAX 1.3 on the MLP, 1.8 on the GPT, 3 on convolutions. torch-secorder takes a
backward pass for every output and returns zeros: wrong by 100%, 60 gradients on the tiny MLP, where the others are
not waited for.

Added with `J v` by propagation, before the first run of this file with it: `ggnvp` and the drop-in 1.9 on MLP, CNN and
GPT, 5 on the tiny MLP (it was 11), faster than curvlinops on all.
"""

from __future__ import annotations

from typing import Any

from bench import peers, products
from bench.harness import compare, described, gradient, relative_error
from bench.jax_twins import jax_ggn
from bench.oracles import gauss_newton
from bench.problems import TIMED, problem
from bench.products import single

QUESTION = "What does one Gauss-Newton product cost, in gradients?"
NOTES = (
    "torch-secorder's `gauss_newton_product` returns zeros, after a backward pass for every output; it is timed where "
    "these are at most 128.",
)
CANDIDATES = (
    single("ggnvp", products.ggn()),
    single('ggnvp, mode="forward_over_reverse"', products.ggn("forward_over_reverse")),
    single("ggn_operator @ v, made before", products.ggn_kept),
    single("ggn_operator @ v, made anew", products.ggn_made_anew),
    single("compat gauss_newton_product", products.compat_ggn),
    single("torch-secorder gauss_newton_product", peers.torch_secorder_ggn, peer=True),
    single("curvlinops GGN @ v, made before", peers.curvlinops_ggn, peer=True),
    single("BackPACK ggn_vector_product", peers.backpack_ggn, peer=True),
    single("JAX jit", jax_ggn, peer=True),
)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny", "mlp") if quick else TIMED
    problems = []
    for name in names:
        p = problem(name)
        truth = gauss_newton(p)
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
