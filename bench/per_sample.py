"""What do the products of every sample's own Hessian with one vector cost, in gradients of the batch?

Command: `python -m bench per_sample` (`--quick` only sees that it runs).

Batches are those of the problems on the tiny, the small and the deep MLP, 8 samples of the others, whose answers are
as many copies of the parameters.

Expected story, written before the first run of this file. A loop over samples pays all overhead once a sample: 2.4 x
32 = 75 gradients of the batch on the tiny MLP, 60 on the small one, 150 on the deep one, where one call that is
mapped over the samples costs what one product costs, 15 to 20. On the MLP with 8 samples a gradient is bound by
reading the weights, and a product of every sample writes them 8 times: 12 mapped, 25 in a loop. On the CNN the loop
has 8 small convolutions where the map has grouped ones, which are slow on a CPU: 6 mapped, 5 in a loop, so the loop
may win. GPT: 6 mapped, 6 in a loop. JAX: 1 on the tiny MLP, 5 on the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import vmap

from bench.harness import (
    Candidate,
    Run,
    compare,
    described,
    gradient,
    leaves,
    relative_error,
)
from bench.jax_twins import jax_rows
from bench.oracles import hessian_rows
from bench.peers import plain_rows, torch_secorder_rows
from bench.problems import TIMED, Problem, problem
from bench.products import columns
from secorder_func import hvp

QUESTION = "What do the products of every sample's Hessian with one vector cost, in gradients of the batch?"
NOTES = (
    "8 samples on the large MLP, the CNN, the ResNet and the GPTs, the whole batch of 32 on the others.",
)


def _mapped(p: Problem) -> Run:
    f, params = p.functional
    product, v = hvp(f), p.vector_dict
    targets = p.targets.unflatten(0, (p.inputs.shape[0], -1))

    def one(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = product(params, v, x[None], y)
        return result

    return lambda: vmap(one)(p.inputs, targets)


CANDIDATES = (
    Candidate("vmap(hvp)", _mapped),
    Candidate("loop of torch-secorder exact_hvp", torch_secorder_rows, peer=True),
    Candidate("plain vmap(jvp(grad(f)))", plain_rows, peer=True),
    jax_rows("JAX jit vmap(jvp(grad(f)))"),
)


def _measured(p: Problem, seconds: float) -> dict[str, Any]:
    truth = hessian_rows(p)
    records = compare(
        p,
        gradient(p),
        CANDIDATES,
        lambda result: relative_error(columns(leaves(result), len(truth)), truth),
        tolerance=1e-4,
        seconds=seconds,
    )
    return described(p, records, samples=p.inputs.shape[0])


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    problems = []
    for name in ("tiny", "deep") if quick else ("small", *TIMED):
        p = problem(name)
        if name in ("mlp", "cnn", "resnet", "gpt_tiny", "gpt"):
            p = p.rows(0, 8)
        problems.append(_measured(p, 1.0 if quick else 10.0))
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
