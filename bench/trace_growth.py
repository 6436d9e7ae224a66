"""How do time and peak memory of a trace grow with probes, width, depth and sequence length?

Command: `python -m bench trace_growth` (`--quick` only sees that it runs).

Times are of one probe, by `hutchinson_trace` of 32 probes (on the first axis of as many as it says) beside one
product of torch-secorder; memory is the peak of a fresh process: what a trace by 64 probes adds, by forward
propagation in the default chunk, and what one product by double backward takes.

Expected story, written before the first run of this file. More probes share evaluations and larger groups share
second-order terms, until 128: 1.2 gradients a probe for 8, 0.7 for 128. Wider layers are bound by products of matrices,
0.9 at 1024 and 0.5 at 64, where a gradient is bound by overhead; deeper ones cost the same share. Longer sequences
move the cost to attention, whose terms are moved more than they are multiplied: 0.9 at 32 tokens, 1.2 at 256. Memory of
a trace is flat in the depth, that of a double backward linear.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import memory, trace
from bench.harness import Candidate, compare, described, gradient, leaves
from bench.oracles import trace as trace_of
from bench.peers import torch_secorder_hvp
from bench.problems import GPT, Problem, problem, problem_of
from bench.products import single

QUESTION = (
    "How do time and peak memory of a trace grow with probes, width, depth and sequence length?"
)
NOTES = (
    "`stack-WIDTH-DEPTH-BATCH` is an MLP of equal layers, `gpt-LENGTH` the small GPT at another length.",
)
_PRODUCT = Candidate(
    "torch-secorder exact_hvp, one product",
    single("torch-secorder exact_hvp", torch_secorder_hvp, peer=True).make,
    peer=True,
    read=lambda result: [],
)


def _measured(p: Problem, count: int, seconds: float) -> dict[str, Any]:
    exact, error, spread = trace_of(p, 16)
    tolerance = 6 * (error + spread / count**0.5) / abs(exact)

    def check(result: Any) -> float:
        return abs(float(leaves(result)[0]) - exact) / abs(exact) if len(result) else 0.0

    ours = compare(
        p,
        gradient(p),
        (trace.ours("hutchinson_trace, a probe", count),),
        check,
        tolerance=tolerance,
        seconds=seconds,
        per=count,
    )
    peer = compare(p, gradient(p), (_PRODUCT,), check, tolerance=1.0, seconds=seconds)
    return described(p, [*ours, *peer[1:]])


def _sequence(length: int) -> Problem:
    batch = max(1, 512 // length)
    model = GPT(vocabulary=256, width=128, heads=4, layers=2, length=length)
    inputs = torch.randint(256, (batch, length))
    return problem_of(
        f"gpt-{length}", f"GPT, 2 layers, {batch} x {length} tokens", model, inputs, 256
    )


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records along every axis."""
    seconds = 0.5 if quick else 2.0
    problems = []
    for count in (8,) if quick else (8, 16, 32, 64, 128, 256):
        found = _measured(problem("stack-256-4-128"), count, seconds)
        problems.append({**found, "name": f"{count} probes", "samples": 0})
    if quick:
        return {"question": QUESTION, "notes": NOTES, "problems": problems}
    for name in (
        *(f"stack-{width}-4-128" for width in (64, 256, 1024)),
        *(f"stack-128-{depth}-128" for depth in (6, 12, 24, 48)),
    ):
        problems += [{**_measured(problem(name), 32, seconds), "samples": 0}]
    for length in (32, 64, 128, 256):
        torch.manual_seed(0)
        problems.append({**_measured(_sequence(length), 32, seconds), "samples": 0})
    for depth in (6, 12, 24, 48):
        name = f"stack-256-{depth}-512"
        record = memory.measured("trace", name, 64)
        double = memory.measured("torch-secorder", name)
        added = {"name": "trace by 64 probes, adds", "peer": False, "peak_mib": record["added_mib"]}
        taken = {**double, "name": "torch-secorder exact_hvp, one product"}
        p = problem(name)
        problems.append({**described(p, [added, taken]), "name": f"memory {depth}", "samples": 0})
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
