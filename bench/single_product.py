"""What does one exact Hessian-vector product cost, in gradients?

Command: `python -m bench single_product` (`--quick` only sees that it runs).

Expected story, written before the first run of this file, with older measurements of some candidates known. By
counting products of matrices a gradient is 3, forward over reverse 9 and reverse over reverse 8 to 9, so a single
product should cost about 3 gradients by every eager route, ours and the peers', on models whose time is in matrix
products. Forward over reverse pays for torch's unfused forward rules and should be the slowest of ours, up to 4 on the
GPT. An operator that keeps the pullback of the gradient leaves only the last backward pass: 1.5 to 2.3. On the tiny
MLP all is overhead: transforms cost several times a double backward there, and an operator gets most of that
back. Our checks and repairs should be visible on the tiny MLP only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from bench.harness import Candidate, Run, UnavailableError, compare, relative_error
from bench.problems import Problem, oracle, problem
from secorder_func import hessian_operator, hvp

QUESTION = "What does one exact Hessian-vector product cost, in gradients?"
NOTES = (
    "Bold rows are ours. An operator that is made before has paid for the gradient and its graph; made anew, it "
    "pays in the row.",
    "curvlinops 3.0.1 computes `jvp(jacrev(f))`, which torch 2.13 gets wrong in the weights of a LayerNorm; "
    "`jvp(grad(f))` it gets right.",
)


def _leaves(result: Any) -> Sequence[Tensor]:
    return list(result.values()) if isinstance(result, dict) else list(result)


def _gradient(p: Problem) -> Run:
    return lambda: torch.autograd.grad(p.closure(), p.parameters)


def _hvp(mode: Any) -> Callable[[Problem], Run]:
    def make(p: Problem) -> Run:
        f, params = p.functional
        product = hvp(f, mode=mode)
        return lambda: product(params, p.vector_dict, p.inputs, p.targets)

    return make


def _operator(p: Problem) -> Run:
    f, params = p.functional
    op = hessian_operator(f, params, p.inputs, p.targets)
    return lambda: op @ p.vector_dict


def _operator_made(p: Problem) -> Run:
    f, params = p.functional
    return lambda: hessian_operator(f, params, p.inputs, p.targets) @ p.vector_dict


def _exact_hvp(package: str) -> Callable[[Problem], Run]:
    def make(p: Problem) -> Run:
        try:
            exact_hvp = import_module(f"{package}.core.hvp").exact_hvp
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"{package} is not installed") from error
        vector = list(p.vector)
        return lambda: exact_hvp(p.closure, p.parameters, vector)

    return make


def _curvlinops(p: Problem) -> Run:
    try:
        curvlinops = import_module("curvlinops")
    except ImportError as error:
        raise UnavailableError("curvlinops-for-pytorch is not installed") from error
    data = [(p.inputs, p.targets)]
    op = curvlinops.HessianLinearOperator(
        p.model, p.loss_fn, p.parameters, data, check_deterministic=False
    )
    vector = list(p.vector)
    return lambda: op @ vector


def _double_backward(p: Problem) -> Run:
    def product() -> Sequence[Tensor]:
        gradient = torch.autograd.grad(p.closure(), p.parameters, create_graph=True)
        return torch.autograd.grad(gradient, p.parameters, p.vector)

    return product


def _plain_jvp_grad(p: Problem) -> Run:
    params = {name: tensor.detach() for name, tensor in p.model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return p.loss_fn(functional_call(p.model, params, p.inputs), p.targets)

    return lambda: jvp(grad(loss), (params,), (p.vector_dict,))[1]


CANDIDATES = (
    Candidate("hvp", _hvp("auto")),
    Candidate('hvp, mode="reverse_over_reverse"', _hvp("reverse_over_reverse")),
    Candidate("hessian_operator @ v, made before", _operator),
    Candidate("hessian_operator @ v, made anew", _operator_made),
    Candidate("compat exact_hvp", _exact_hvp("secorder_func.compat")),
    Candidate("torch-secorder exact_hvp", _exact_hvp("torch_secorder"), peer=True),
    Candidate("curvlinops Hessian @ v, made before", _curvlinops, peer=True),
    Candidate("plain double backward", _double_backward, peer=True),
    Candidate("plain jvp(grad(f))", _plain_jvp_grad, peer=True),
)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every candidate on every problem."""
    names = ("tiny", "mlp") if quick else ("tiny", "mlp", "cnn", "gpt")
    problems = []
    for name in names:
        p = problem(name)
        truth = oracle(p)
        records = compare(
            p,
            _gradient(p),
            CANDIDATES,
            lambda result, truth=truth: relative_error(_leaves(result), truth),
            tolerance=1e-4,
            seconds=2.0 if quick else 40.0,
        )
        problems.append(
            {
                "name": p.name,
                "description": p.description,
                "parameters": p.num_parameters,
                "candidates": records,
            }
        )
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
