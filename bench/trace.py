"""What does a trace by random probes cost: one probe of 32, and the time to a standard error of 5% of the trace?

Command: `python -m bench trace` (`--quick` only sees that it runs).

Each call draws 32 Rademacher probes and multiplies them; operators and graphs are made before. The variance of one
probe is a property of the matrix, so that every candidate needs the same number of probes, and the time to a given
standard error is that number times the measured time of a probe. Number and trace come from the matrix itself on the
tiny and the small model, else from many probes by plain autograd. A candidate is right if its estimate is within five
standard errors of that trace.

Expected story, written before the first run of this file. A probe costs a product of an operator and the drawing: 1.9
on the MLP (1.5 and 0.2, because a probe has 670,000 entries), 2.5 on the CNN, 2.3 on the GPT, 0.1 on the tiny MLP.
torch-secorder pays for a whole double backward and for `randint` in float: 3.4, 3.7, 3.3, and 3 on the tiny MLP.
curvlinops draws all probes first and maps its product over them: 4.0, 4.7, 3.5, and nearly as little as ours on the
tiny one. A graph in the manner of PyHessian: 2.3, 2.6, 2.3 with `randint`. JAX: 2, 5, 2.5. The traces of untrained
models are small beside what is off their diagonals, so that 5% takes thousands of probes: seconds on the tiny MLP,
minutes on the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.harness import (
    Candidate,
    Made,
    Run,
    compare,
    described,
    gradient,
    leaves,
    rounded,
)
from bench.jax_twins import jax_trace
from bench.oracles import trace
from bench.problems import BIG, TIMED, Problem, problem
from bench.products import function_of
from secorder_func import hessian_operator, hutchinson_trace

QUESTION = "What does a trace by random probes cost, in gradients a probe?"
NOTES = (
    "32 Rademacher probes a call, drawing included; operators and graphs are made before.",
    "JAX maps over 8 probes at a time, but loops in Python where there are convolutions: mapped they took ten times "
    "as long.",
    "The number of probes to 5% comes from the variance of one probe, which is the matrix's, not the package's; the "
    "time is that number times the time of a probe.",
)
PROBES = 32
_TARGET = 0.05


def ours(name: str, count: int = PROBES, **options: Any) -> Candidate:
    """Return the candidate with an operator that is made before."""

    def make(p: Problem) -> Made:
        f, params = p.functional
        op = hessian_operator(f, params, p.inputs, p.targets)
        last = hutchinson_trace(op, 1, **options)

        def run() -> Tensor:
            nonlocal last
            last = hutchinson_trace(op, count, **options)
            return last.value  # type: ignore[no-any-return]

        return Made(run, lambda: {"chunk_size": getattr(last, "chunk_size", None)})

    return Candidate(name, make)


def _ours_made_anew(p: Problem) -> Run:
    f, params = p.functional
    data = p.inputs, p.targets
    return lambda: hutchinson_trace(hessian_operator(f, params, *data), PROBES).value


def _torch_secorder(p: Problem) -> Run:
    hessian_trace = function_of("torch_secorder", "core.hvp.hessian_trace")
    return lambda: hessian_trace(p.closure, p.parameters, num_samples=PROBES)


def _curvlinops(p: Problem) -> Run:
    hutchinson = function_of("curvlinops", "hutchinson_trace")
    op = peers.curvlinops_operator(p)
    return lambda: hutchinson(op, PROBES)


def _reused(p: Problem) -> Run:
    """Return the loop of PyHessian: draw, multiply by a kept graph, contract."""
    product = peers.reused_graph(p)

    def estimate() -> float:
        forms = []
        for _ in range(PROBES):
            v = [torch.randint_like(q, high=2).mul_(2).sub_(1) for q in p.parameters]
            forms.append(sum((a * b).sum() for a, b in zip(product.multiply(v), v, strict=True)))
        return float(sum(forms)) / PROBES

    return estimate


CANDIDATES = (
    ours("hutchinson_trace, operator made before"),
    Candidate("hutchinson_trace, operator made anew", _ours_made_anew),
    Candidate("torch-secorder hessian_trace", _torch_secorder, peer=True),
    Candidate("curvlinops hutchinson_trace", _curvlinops, peer=True),
    Candidate("PyHessian-style, graph kept", _reused, peer=True),
    jax_trace("JAX jit, probes mapped", PROBES),
)


def _measured(p: Problem, reference: int, seconds: float) -> dict[str, Any]:
    exact, error, spread = trace(p, reference)
    tolerance = 5 * math.hypot(error, spread / PROBES**0.5) / abs(exact)
    records = compare(
        p,
        gradient(p),
        CANDIDATES,
        lambda result: abs(float(leaves(result)[0]) - exact) / abs(exact),
        tolerance=tolerance,
        seconds=seconds,
        per=PROBES,
    )
    needed = math.ceil((spread / (_TARGET * exact)) ** 2)
    for record in records[1:]:
        if "milliseconds" in record:
            record["seconds_to_target"] = rounded(needed * record["milliseconds"]["median"] / 1e3)
    facts = {"trace": exact, "standard_error": error, "one_probe": spread}
    return described(
        p,
        records,
        probes_to_target=needed,
        tolerance=rounded(tolerance),
        **{name: rounded(value) for name, value in facts.items()},
    )


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny", "deep") if quick else ["small", *(name for name in TIMED if name != "resnet")]
    torch.manual_seed(0)
    problems = [
        _measured(
            problem(name),
            32 if quick else 128 if name in BIG else 1024,
            1.0 if quick else 15.0,
        )
        for name in names
    ]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
