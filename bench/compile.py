"""What does a compiled product cost, what does its compilation cost, and is it paid once?

Command: `python -m bench compile` (`--quick` only sees that it runs).

Expected story, written before the first run of this file, with older measurements of a compiled `jvp(grad(f))` known.
Compiling takes 20 to 40 s for the MLP and 40 to 80 s for the GPT, of which half is the C++ compiler's. A compiled
product of an operator that is made for every vector costs 2.1 gradients on both, as a compiled `jvp(grad(f))`: fused
elementwise functions and no unused work. One that is made before and keeps its pullback costs less in eager mode
already, 1.5 on the MLP, where only matrix products are left: compiling helps where elementwise functions are, on the
GPT, 2.1 to 1.8, and on the tiny MLP, 2 to 0.5. JAX compiles in 1 to 4 s and costs 2.0 and 2.3. A second operator at
new values of the parameters compiles nothing: it takes milliseconds.
"""

from __future__ import annotations

from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from bench import peers, products
from bench.harness import compare, described, gradient, relative_error
from bench.jax_twins import jax_hvp
from bench.oracles import hessian
from bench.problems import Problem, problem
from bench.products import Product, single
from secorder_func import hessian_operator

QUESTION = "What does a compiled product cost, in gradients, and what does compiling it cost?"
NOTES = (
    "Compilation, from an empty cache, is outside the timing. A second operator is made at other values of the "
    "parameters and multiplies once.",
)


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _compiled_operator(p: Problem) -> Product:
    f, params = p.functional
    data = p.inputs, p.targets
    op = hessian_operator(f, params, *data, compile=True)
    op @ p.vector_dict
    graphs, begin = _graphs(), perf_counter()
    moved = {name: tensor + 0.01 for name, tensor in params.items()}
    hessian_operator(f, moved, *data, compile=True) @ p.vector_dict
    facts = {
        "compile_seconds": round(float(op.compile_seconds), 2),
        "second_operator_seconds": round(perf_counter() - begin, 4),
        "compiled_again": _graphs() > graphs,
    }
    return Product(lambda v: op @ v, p.named, facts)


CANDIDATES = (
    single("hessian_operator @ v, compile=True", _compiled_operator),
    single("hessian_operator @ v", products.operator),
    single("torch.compile of jvp(grad(f))", peers.compiled_jvp_grad, peer=True),
    single("JAX jit jvp(grad(f))", jax_hvp, peer=True),
    single("torch-secorder exact_hvp", peers.torch_secorder_hvp, peer=True),
)


def _measured(p: Problem, *, quick: bool) -> dict[str, Any]:
    truth = hessian(p)
    torch.compiler.reset()
    with nullcontext() if quick else fresh_cache():
        torch.compile(torch.sin)(
            torch.ones(3)
        )  # what is compiled once a process, headers, is nobody's
        records = compare(
            p,
            gradient(p),
            CANDIDATES,
            lambda result: relative_error(result, truth),
            tolerance=1e-4,
            seconds=1.0 if quick else 15.0,
        )
    return described(p, records)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny",) if quick else ("mlp", "gpt")
    problems = [_measured(problem(name), quick=quick) for name in names]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
