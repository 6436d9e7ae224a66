"""What do traces, diagonals and products of every one of 256 samples cost beside a loop over samples?

Command: `python -m bench per_sample_curvature` (`--quick` only sees that it runs).

Small models, of which one asks for the curvature of every sample: an MLP, a CNN and PyTorch's Transformer encoder
layer. Ours makes its operator inside the call. Loops take 32 of the samples, and their times are multiplied by 8. The
estimates of everyone are of the same probes, which only ours has to draw; so every answer is compared with double
backward in float64. For the encoder plain PyTorch takes the attention kernel that has second derivatives.

- `product`: of every sample's Hessian with one vector.
- `trace`: Hutchinson's, by 32 probes; `diagonal`: by 8 probes.
- `ggn trace`, `ggn diagonal`: exact, of the Gauss-Newton matrix of every sample.

Expected story, written before the first run of this file. A loop pays all overhead once a sample: 0.4 ms of double
backward, 100 ms in all, 1.5 ms of our operator, 400 ms in all. A mapped product pays it once, and writes 256 copies of
the parameters: 5 ms on the MLP, with the making of the operator 8, a tenth and less of either loop; on the encoder 30
ms of 400. The CNN is the exception: mapped convolutions with a weight of each sample's own are grouped ones, slow on a
CPU, so that the loop takes 4 times as long at most. Traces need no products: 32 probes of all samples are a forward
propagation each, 1 ms on the MLP and 10 on the CNN, where the loop multiplies 8192 times: 60 times as long on the MLP,
20 on the others. Diagonals are 8 mapped products: 20 times on the MLP, 4 on the CNN, 10 on the encoder. Gauss-Newton
matrices take 10 mapped backward passes: 30 times on the MLP, 5 on the CNN, 15 on the encoder. BackPACK contracts
diagonals without a copy of the parameters for each sample, and is 3 times as fast as ours; it has no encoder layer.
`vmap(jvp(grad))`, written by hand, is as fast as our products, and loses traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import secorder_func as sf
from bench import sampled_peers
from bench.harness import (
    Candidate,
    Run,
    compare,
    described,
    gradient,
    leaves,
    relative_error,
    rounded,
)
from bench.oracles import sampled
from bench.problems import SAMPLED, Problem, problem
from bench.products import columns
from secorder_func.algorithms.probes import draw_seed, rademacher

QUESTION = "What do traces, diagonals and products of every one of 256 samples cost beside a loop over samples?"
NOTES = (
    "256 samples. `trace`: 32 probes, `diagonal`: 8; Gauss-Newton traces and diagonals are exact. Ours makes its "
    "operator in the call. Loops are timed on 32 samples, times 8.",
)
PROBES = {"trace": 32, "diagonal": 8}
TASKS = ("product", "trace", "diagonal", "ggn trace", "ggn diagonal")
_SEED = 1
_PARTS = 8
"""A loop takes one sample of so many."""


def vectors_of(p: Problem, task: str) -> list[list[Tensor]]:
    """Return the vectors that a task multiplies: the problem's own, or the probes that ours draws."""
    if task not in PROBES:
        return [list(p.vector)]
    seed = draw_seed(torch.Generator().manual_seed(_SEED))
    stacks = rademacher(seed, range(PROBES[task]), p.functional[1])
    return [list(row) for row in zip(*(stack.unbind() for stack in stacks.values()), strict=True)]


# ---------------------------------------------------------------------------------------- ours


def _of(task: str, hessian: Callable[[], Any], ggn: Callable[[], Any], v: Any) -> Any:
    """Return what the task asks of an operator, of one sample or of all."""
    generator = torch.Generator().manual_seed(_SEED)
    if task == "product":
        return hessian() @ v
    if task == "trace":
        return sf.hutchinson_trace(hessian(), PROBES[task], generator=generator).value
    if task == "diagonal":
        return sf.hutchinson_diagonal(hessian(), PROBES[task], generator=generator).value
    return sf.exact_trace(ggn()) if task == "ggn trace" else sf.exact_diagonal(ggn())


def all_samples(p: Problem, task: str) -> Run:
    """Return the call of the operator of every sample."""
    losses, params = sf.functional_loss(p.model, nn.CrossEntropyLoss(reduction="none"))
    model, _ = sf.functional_model(p.model)
    data, v = (p.inputs, p.targets), p.vector_dict
    return lambda: _of(
        task,
        lambda: sf.per_sample_hessian_operator(losses, params, *data),
        lambda: sf.per_sample_ggn_operator(model, p.loss_fn, params, *data),
        v,
    )


def one_by_one(p: Problem, task: str, count: int) -> Run:
    """Return the loop of operators of one sample each."""
    loss, params = p.functional
    model, _ = sf.functional_model(p.model)
    rows = [(p.inputs[i : i + 1], p.targets[i : i + 1]) for i in range(count)]
    v = p.vector_dict

    def one(x: Tensor, y: Tensor) -> Any:
        return _of(
            task,
            lambda: sf.hessian_operator(loss, params, x, y),
            lambda: sf.ggn_operator(model, p.loss_fn, params, x, y),
            v,
        )

    return lambda: [one(*row) for row in rows]


# --------------------------------------------------------------------------------- the question

_OURS, _LOOP = "operator of all samples", "loop of operators of one sample"
PLAIN = "loop of plain double backward"


def _candidates(task: str, looped: int) -> list[Candidate]:
    ggn = task.startswith("ggn")
    plain, mapped = PLAIN, "plain vmap(jvp(grad(f)))"
    if ggn:
        plain, mapped = "loop of plain backward passes", "plain vmap(jacrev(f))"

    def with_vectors(make: Callable[..., Run], *args: Any) -> Callable[[Problem], Run]:
        return lambda p: make(p, task, vectors_of(p, task), *args)

    found = [
        Candidate(_OURS, lambda p: all_samples(p, task)),
        Candidate(_LOOP, lambda p: one_by_one(p, task, looped), times=_PARTS),
        Candidate(plain, with_vectors(sampled_peers.loop, looped), True, times=_PARTS),
        Candidate(mapped, with_vectors(sampled_peers.mapped), True),
    ]
    if ggn:
        found.append(
            Candidate("BackPACK BatchDiagGGNExact", lambda p: sampled_peers.backpack(p, task), True)
        )
    return found


def _check(result: Any, truth: list[Tensor]) -> float:
    found = columns(leaves(result), len(truth))
    return relative_error(found, [t[: f.shape[0]] for t, f in zip(truth, found, strict=True)])


def measured(p: Problem, task: str, seconds: float) -> dict[str, Any]:
    """Return the records of a task on a problem."""
    count = p.inputs.shape[0]
    wide = p.double()
    truth = sampled(wide, task, vectors_of(wide, task))
    exactly = _check(all_samples(wide, task)(), truth)
    if exactly > 1e-10:
        raise AssertionError(f"{task} on {p.name} in float64: relative error {exactly:.2g}")
    records = compare(
        p,
        gradient(p),
        _candidates(task, count // _PARTS),
        lambda result: _check(result, truth),
        tolerance=1e-4,
        seconds=seconds,
        beside=_LOOP,
    )
    ratios = records[1]["relative_to_peers"]
    loops = [ratio for name, ratio in ratios.items() if name.startswith("loop")]
    return described(
        p,
        records,
        samples=count,
        task=task,
        float64_error=float(f"{exactly:.1g}"),
        fold=rounded(1 / max(loops)),
    ) | {"name": p.name.removeprefix("samples_")}


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate for every task on every problem."""
    problems = []
    for name in SAMPLED:
        p = problem(name).rows(0, 16 if quick else 256)
        problems += [measured(p, task, 0.5 if quick else 10.0) for task in TASKS]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
