"""How much memory does each way take at its peak, in a process of its own?

Command: `python -m bench memory` (`--quick` only sees that it runs); one method: `python -m bench.memory METHOD
PROBLEM`.

A process imports everything, runs its method on the tiny MLP, makes the model and takes one plain gradient. That is
its baseline. Then the mark of the peak is reset, and the method runs once on the real problem. Allocations of 64 KiB
and more go back to the system when they are freed, so that the peak is of what lives. An operator's own memory counts
in its peak; with a budget only what a call adds does, less its result, which the caller asked for.

Expected story, written before the first run of this file. On the MLP parameters and what is shaped like them, 2.6 MiB
a copy, are most of it: a gradient takes 4 MiB, a double backward 15, `jvp(grad(f))` 15, an operator keeps 8 and peaks
at 14. On the CNN and the GPT activations are: a gradient 35 and 60 MiB, double backward 3 times that, with all graphs
alive at once, forward over reverse 2 to 2.5 times, JAX 2 times because it frees what is not used again. curvlinops'
32 products at once take 32 times the tangents: 300 MiB on the MLP, 1.5 GiB on the CNN and 2 GiB on the GPT, ours with
a budget stay below 64 MiB above the operator. A trace of torch-secorder takes what one product takes.

Added with products by propagation, which `hvp` and the drop-in now are, before the first run with them. For every layer
they keep the activation and its term where a double backward keeps the activation, its gradient and what the second
pass makes of both: half to three quarters of it everywhere, and 0.6 on a new MLP of 24 layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import jax_twins, k_products, oracles, peers, products, trace
from bench.harness import (
    Candidate,
    Made,
    UnavailableError,
    described,
    gradient,
    leaves,
    relative_error,
    rounded,
)
from bench.problems import Problem, problem
from bench.products import looped, single

QUESTION = "How much memory does each way take at its peak, in a process of its own?"
NOTES = (
    "MiB above a process that holds the packages, the model and its data, and has taken one plain gradient.",
    "What an operator or a graph keeps counts in its peak. With a budget: what the call adds, less its result.",
)
COUNT = 32
BUDGET = 64 * 2**20
_MIB = 2**20
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

Check = Callable[[Any], float]


def _product_check(p: Problem) -> Check:
    truth = oracles.hessian(p)
    return lambda result: relative_error(result, truth)


def _gradient_check(p: Problem) -> Check:
    wide = p.double()
    truth = gradient(wide)()
    return lambda result: relative_error(result, truth)


def trace_check(p: Problem, count: int = trace.PROBES) -> Check:
    """Return the error in units of what five standard errors allow, so that 1e-4 is the limit as elsewhere."""
    exact, error, spread = oracles.trace(p, 32)
    allowed = 5 * (error**2 + spread**2 / count) ** 0.5
    return lambda result: 1e-4 * abs(float(leaves(result)[0]) - exact) / allowed


@dataclass(frozen=True)
class Method:
    """A way to compute something.

    Parameters
    ----------
    candidate
        What runs.
    check
        Problem -> how its answer is checked.
    keeps
        Whether what it makes before is part of it, as an operator is.
    vectors
        How many vectors it makes before as well, which are the caller's.
    budget
        Bytes that a call may add.
    """

    candidate: Candidate
    check: Callable[[Problem], Check] = _product_check
    keeps: bool = False
    vectors: int = 0
    budget: int | None = None


def _method(
    name: str, factory: products.Factory, *, peer: bool = True, keeps: bool = False
) -> Method:
    return Method(single(name, factory, peer=peer), keeps=keeps)


METHODS = {
    "gradient": Method(Candidate("gradient", gradient), _gradient_check),
    "hvp": _method("hvp", products.transform(), peer=False),
    "hvp-forward": _method(
        'hvp, mode="forward_over_reverse"', products.transform("forward_over_reverse"), peer=False
    ),
    "hvp-reverse": _method(
        'hvp, mode="reverse_over_reverse"', products.transform("reverse_over_reverse"), peer=False
    ),
    "operator": _method("hessian_operator @ v", products.operator, peer=False, keeps=True),
    "compat": _method("compat exact_hvp", products.compat_hvp, peer=False),
    "torch-secorder": _method("torch-secorder exact_hvp", peers.torch_secorder_hvp),
    "curvlinops": _method("curvlinops Hessian @ v", peers.curvlinops_hessian),
    "backpack": _method("BackPACK hessian_vector_product", peers.backpack_hvp),
    "jvp-grad": _method("plain jvp(grad(f))", peers.plain_jvp_grad),
    "reused-graph": _method("PyHessian-style, graph kept", peers.reused_graph, keeps=True),
    "jax": _method("JAX jit jvp(grad(f))", jax_twins.jax_hvp),
}


def _counted(count: int) -> dict[str, Method]:
    """Return the methods that multiply `count` vectors."""
    check = partial(k_products.check_of, count=count)
    of_trace = partial(trace_check, count=count)
    budget: dict[str, Any] = {"memory_budget": BUDGET}
    loop = looped(
        f"loop of torch-secorder exact_hvp, {count}", peers.torch_secorder_hvp, count, peer=True
    )
    several = k_products.several(f"hessian_operator.mm of {count}, budget 64 MiB", count, **budget)
    estimate = trace.ours(f"hutchinson_trace, {count} probes, budget 64 MiB", count, **budget)
    found = {
        "several": Method(several, check, keeps=True, vectors=count, budget=BUDGET),
        "several-torch-secorder": Method(loop, check),
        "several-curvlinops": Method(
            peers.curvlinops_several(f"curvlinops Hessian @ M, {count}", count), check
        ),
        "several-jax": Method(
            jax_twins.jax_several(f"JAX jit, {count} vectors mapped", count), check
        ),
        "trace": Method(estimate, of_trace, keeps=True, budget=BUDGET),
    }
    if count == trace.PROBES:
        others = ("torch-secorder", "curvlinops", "reused-graph", "jax")
        for key, candidate in zip(others, trace.CANDIDATES[2:], strict=True):
            found[f"trace-{key}"] = Method(candidate, of_trace)
    return found


_ASKED = tuple(key for key in METHODS | _counted(COUNT) if key != "several-torch-secorder")
"""What `measure` asks; the loop over vectors is for growth."""


def _all(count: int) -> dict[str, Method]:
    return METHODS | _counted(count)


# ------------------------------------------------------------------------------ inside the process


def resident() -> int:
    """Return what the process holds now, after everything that is free went back to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, AttributeError):
        return peak_bytes()
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Set the mark to what the process holds now; where the system cannot, the mark of before stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the mark, of this program only: `ru_maxrss` starts at what the parent held."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _calls(made: Any) -> Made:
    return made if isinstance(made, Made) else Made(made)


def measured_here(key: str, name: str, count: int) -> dict[str, Any]:
    """Return the record of a method on a problem, measured in this process, which should be fresh."""
    method = _all(count)[key]
    candidate = method.candidate
    torch.manual_seed(0)
    warm = problem("tiny")
    error = method.check(warm)(candidate.read(_calls(candidate.make(warm)).run()))
    p = problem(name)
    gradient(p)()
    _ = p.vector_dict, p.functional

    before = resident()
    reset_peak()
    made = _calls(candidate.make(p))
    facts: dict[str, Any] = {}
    held = resident()
    if method.keeps:
        before += method.vectors * _size(p.vector)
        facts = {"making_mib": (peak_bytes() - before) / _MIB, "kept_mib": (held - before) / _MIB}
    else:
        before = held
    reset_peak()
    result = made.run()
    peak = peak_bytes()
    facts["peak_mib"] = (peak - before) / _MIB
    facts = {fact: rounded(max(0.0, value)) for fact, value in facts.items()} | made.facts()
    if method.budget is not None:
        size = _size(leaves(result))
        facts["added_mib"] = rounded((peak - held - size) / _MIB)
        facts["budget_mib"] = method.budget / _MIB
        facts["inside_budget"] = peak - held - size <= method.budget
    if not key.startswith("trace"):
        error = max(error, method.check(p)(candidate.read(result)))
    return {"relative_error": float(f"{error:.2g}"), "right": error <= 1e-4, **facts}


# ---------------------------------------------------------------------------------- from outside


def measured(key: str, name: str, count: int = COUNT) -> dict[str, Any]:
    """Return the record of a method on a problem, measured in a process of its own."""
    candidate = _all(count)[key].candidate
    record: dict[str, Any] = {"name": candidate.name, "peer": candidate.peer}
    command = [sys.executable, "-m", "bench.memory", key, name]
    command += ["--count", str(count), "--threads", str(torch.get_num_threads())]
    environment = {**os.environ, **ALLOCATOR}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode == 0:
        record |= json.loads(done.stdout.splitlines()[-1])
        if not record.get("right", True) and not candidate.peer:
            raise AssertionError(f"{candidate.name} on {name} is wrong: {record}")
        return record
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    if not candidate.peer:
        raise RuntimeError(f"{candidate.name} on {name}: {reason}")
    return record | {"left_out": reason}


def _problem(name: str, keys: Sequence[str]) -> dict[str, Any]:
    records = [measured(key, name) for key in keys]
    return described(problem(name), records)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every method on every problem."""
    names = ("mlp",) if quick else ("mlp", "cnn", "gpt")
    keys = ("gradient", "hvp", "torch-secorder", "several", "trace") if quick else _ASKED
    problems = [_problem(name, keys) for name in names]
    if not quick:
        problems += [_problem(name, tuple(METHODS)) for name in ("deep_tanh", "deep_relu")]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("method", choices=_all(trace.PROBES))
    parser.add_argument("problem")
    parser.add_argument("--count", type=int, default=COUNT, help="vectors of what takes many")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        print(json.dumps(measured_here(options.method, options.problem, options.count)))
    except UnavailableError as reason:
        print(json.dumps({"left_out": str(reason)}))


if __name__ == "__main__":
    main()
