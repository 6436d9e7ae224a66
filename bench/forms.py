"""What do forms of samples, Gauss-Newton traces and Laplacians cost, and which chunk is best?

Command: `python -m bench forms` (`--quick` only sees that it runs).

- `samples`: `v . H_i v` of all 256 samples of the MLP's batch, in gradients of that batch.
- `ggn ...`: a trace of the Gauss-Newton matrix by 32 probes, in gradients a probe.
- `tiny 64`: a trace by 64 probes on the tiny MLP.
- `laplacian`: of an MLP 64-128-128-1 with tanh at 256 points, exact; the unit is the gradient in the points.
- `chunk ...`: a Hessian trace by 32 probes, at every chunk size.

Expected story, written before the first run of this file. By the count of products of matrices the forms of all
samples cost 1.3 gradients, 2 with overhead; mapped products write 256 copies of the parameters, 60 to 120. A
Gauss-Newton probe costs 0.5, 0.8 and 0.8, curvlinops 3 times that. 64 probes on the tiny MLP are one evaluation of 3
ms: 20 times faster than torch-secorder. The Laplacian shares one basis among all points, so that the first layer is
free: three times faster than `vmap(hessian)`, 2.5 than nested jvp. Chunks, after trials by hand and so no prediction:
the evaluation and its overhead are shared until the terms leave the caches, so that the MLP is best at 16, the CNN at 4
and the GPT at 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jvp, vmap

from bench import peers, trace
from bench.harness import Candidate, Made, Run, compare, described, gradient, leaves, relative_error
from bench.oracles import trace as trace_of
from bench.problems import Problem, problem
from bench.products import function_of
from secorder_func import (
    functional_loss,
    ggn_operator,
    hutchinson_trace,
    laplacian,
    quadratic_form,
)

QUESTION = (
    "What do forms of samples, Gauss-Newton traces and Laplacians cost, and which chunk is best?"
)
NOTES = (
    "`samples`: all 256 forms together, in gradients of the batch. `laplacian`: in gradients in the points. Else a "
    "probe of 32 (tiny: 64), drawing included.",
)

# ------------------------------------------------------------------------------------ samples


def _per_sample(p: Problem) -> tuple[Any, dict[str, Tensor]]:
    return functional_loss(p.model, nn.CrossEntropyLoss(reduction="none"))


def _forms(p: Problem) -> Run:
    f, params = _per_sample(p)
    form, v = quadratic_form(f), p.vector_dict
    return lambda: form(params, v, p.inputs, p.targets)


def _nested(p: Problem) -> Run:
    f, params = _per_sample(p)
    v = p.vector_dict

    def slope(q: Any) -> Tensor:
        found: Tensor = jvp(lambda q: f(q, p.inputs, p.targets), (q,), (v,))[1]
        return found

    return lambda: jvp(slope, (params,), (v,))[1]


def _mapped_products(p: Problem) -> Run:
    loss, params = p.functional
    v = p.vector_dict

    def one(x: Tensor, y: Tensor) -> Tensor:
        hv = jvp(torch.func.grad(lambda q: loss(q, x[None], y[None])), (params,), (v,))[1]
        return torch.stack([(hv[name] * v[name]).sum() for name in v]).sum()

    return lambda: vmap(one, chunk_size=32)(p.inputs, p.targets)


def _samples(*, quick: bool) -> dict[str, Any]:
    p = problem("tiny" if quick else "mlp")
    if not quick:
        torch.manual_seed(0)
        p = Problem(
            p.name,
            p.description,
            p.model,
            p.loss_fn,
            torch.randn(256, 784),
            torch.randint(10, (256,)),
            p.vector,
        )
    truth = [_mapped_products(p.double())()]
    records = compare(
        p,
        gradient(p),
        (
            Candidate("quadratic_form, all samples", _forms),
            Candidate("plain jvp(jvp(f)), all samples", _nested, peer=True),
            Candidate("plain vmap(jvp(grad(f))), contracted", _mapped_products, peer=True),
        ),
        lambda result: relative_error(result, truth),
        tolerance=1e-4,
        seconds=1.0 if quick else 20.0,
    )
    return {**described(p, records), "name": "samples", "samples": p.inputs.shape[0]}


# ------------------------------------------------------------------------------------- traces


def _ggn(p: Problem) -> Made:
    def model(params: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(p.model, params, (x,))

    op = ggn_operator(model, p.loss_fn, p.functional[1], p.inputs, p.targets)
    return Made(lambda: hutchinson_trace(op, trace.PROBES).value)


def _curvlinops_ggn(p: Problem) -> Run:
    hutchinson = function_of("curvlinops", "hutchinson_trace")
    op = peers.curvlinops_operator(p, "GGNLinearOperator")
    return lambda: hutchinson(op, trace.PROBES)


def _ggn_trace(name: str, *, quick: bool) -> dict[str, Any]:
    p = problem(name)
    run = _ggn(p.double()).run
    many = torch.stack([run() for _ in range(4 if quick else 16)])
    exact, spread = float(many.mean()), float(many.std())
    records = compare(
        p,
        gradient(p),
        (
            Candidate("hutchinson_trace(ggn_operator)", _ggn),
            Candidate("curvlinops hutchinson_trace(GGN)", _curvlinops_ggn, peer=True),
        ),
        lambda result: abs(float(leaves(result)[0]) - exact) / abs(exact),
        tolerance=6 * spread / abs(exact),
        seconds=1.0 if quick else 10.0,
        per=trace.PROBES,
    )
    return {**described(p, records), "name": f"ggn {name}", "samples": 0}


def _tiny() -> dict[str, Any]:
    p = problem("tiny")
    exact, error, spread = trace_of(p, 1024)
    count = 64

    def torch_secorder(p: Problem) -> Run:
        hessian_trace = function_of("torch_secorder", "core.hvp.hessian_trace")
        return lambda: hessian_trace(p.closure, p.parameters, num_samples=count)

    records = compare(
        p,
        gradient(p),
        (
            trace.ours("hutchinson_trace", count),
            Candidate("torch-secorder hessian_trace", torch_secorder, peer=True),
        ),
        lambda result: abs(float(leaves(result)[0]) - exact) / abs(exact),
        tolerance=6 * (error + spread / 8) / abs(exact),
        seconds=3.0,
        per=count,
    )
    return {**described(p, records), "name": "tiny 64", "samples": 0}


def _chunks(name: str, *, quick: bool) -> dict[str, Any]:
    p = problem(name)
    exact, error, spread = trace_of(p, 8 if quick else 64)
    sizes = (1, 2, 4, 8, 16, 32)
    records = compare(
        p,
        gradient(p),
        (
            *(trace.ours(f"chunk_size={size}", chunk_size=size) for size in sizes),
            trace.ours('chunk_size="auto"'),
        ),
        lambda result: abs(float(leaves(result)[0]) - exact) / abs(exact),
        tolerance=6 * (error + spread / trace.PROBES**0.5) / abs(exact),
        seconds=1.0 if quick else 20.0,
        per=trace.PROBES,
    )
    return {**described(p, records), "name": f"chunk {name}", "samples": 0}


# ----------------------------------------------------------------------------------- Laplacian


def _laplacian(*, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    inside = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)]
    model = nn.Sequential(*inside).requires_grad_(requires_grad=False)
    x = torch.randn(256, 64)
    basis = torch.eye(64)

    def value(x: Tensor) -> Tensor:
        found: Tensor = model(x).squeeze(-1)
        return found

    def by_hessian(x: Tensor) -> Tensor:
        return vmap(lambda row: hessian(value)(row).diagonal().sum())(x)

    def by_jvp(x: Tensor) -> Tensor:
        def second(e: Tensor) -> Tensor:
            along = e.to(x).expand_as(x)
            found: Tensor = jvp(lambda x: jvp(value, (x,), (along,))[1], (x,), (along,))[1]
            return found

        return vmap(second)(basis).sum(0)

    at = x.clone().requires_grad_()
    model.double()
    truth = [by_hessian(x.double())]
    model.float()
    found = laplacian(value, per_sample=True)
    records = compare(
        problem("tiny"),
        lambda: torch.autograd.grad(value(at).sum(), at),
        (
            Candidate("laplacian, per sample", lambda _: lambda: found(x)),
            Candidate("plain vmap(hessian), traced", lambda _: lambda: by_hessian(x), peer=True),
            Candidate("plain vmap(jvp(jvp(f)))", lambda _: lambda: by_jvp(x), peer=True),
        ),
        lambda result: relative_error(result, truth),
        tolerance=1e-4,
        seconds=1.0 if quick else 10.0,
    )
    return {
        "name": "laplacian",
        "description": "MLP 64-128-128-1, tanh, 256 points",
        "parameters": 64,
        "samples": 256,
        "candidates": records,
    }


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    torch.manual_seed(0)
    names = ("tiny",) if quick else ("mlp", "cnn", "gpt")
    problems = [_samples(quick=quick), *(_ggn_trace(name, quick=quick) for name in names)]
    problems += [_tiny(), _laplacian(quick=quick)]
    problems += [_chunks(name, quick=quick) for name in names]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}


__all__ = ["NOTES", "QUESTION", "measure"]
