"""The curvature of every sample without ours: plain PyTorch in a loop and mapped, and BackPACK.

A task is one of those of `bench.per_sample_curvature`; `vectors` are its probes, or the one vector of a product.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import Run
from bench.problems import Problem
from bench.products import function_of

__all__ = ["backpack", "loop", "mapped", "twice_differentiable"]

Vectors = Sequence[Sequence[Tensor]]


def twice_differentiable(run: Run) -> Run:
    """Return the call with the kernel of attention that has second derivatives; the fused ones have none."""

    @wraps(run)
    def call() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    return call


# ------------------------------------------------------------------------------------ in a loop


def loop(p: Problem, task: str, vectors: Vectors, count: int) -> Run:
    """Return the loop over `count` samples."""
    one = _rows_squared if task.startswith("ggn") else _double_backward
    rows = [(p.inputs[i : i + 1], p.targets[i : i + 1]) for i in range(count)]
    return twice_differentiable(lambda: [one(p, task, vectors, x, y) for x, y in rows])


def _double_backward(p: Problem, task: str, vectors: Vectors, x: Tensor, y: Tensor) -> Any:
    """Keep the graph of one gradient for all vectors."""
    gradient = torch.autograd.grad(p.loss_fn(p.model(x), y), p.parameters, create_graph=True)
    total = [torch.zeros_like(v) for v in vectors[0]]
    for v in vectors:
        product = torch.autograd.grad(gradient, p.parameters, v, retain_graph=True)
        if task == "product":
            return product
        torch._foreach_addcmul_(total, list(product), list(v))
    if task == "trace":
        return sum(leaf.sum() for leaf in total) / len(vectors)
    return [leaf / len(vectors) for leaf in total]


def _root(outputs: Tensor) -> Tensor:
    """Return `S` with `S S^T` the Hessian of cross-entropy in the outputs of a sample."""
    share = outputs.detach().softmax(-1)
    root = share.sqrt()
    return root.diag() - torch.outer(share, root)


def _rows_squared(p: Problem, task: str, _: Vectors, x: Tensor, y: Tensor) -> Any:
    """Pull back a root of the loss's Hessian, an output at a time."""
    outputs = p.model(x)[0]
    total = [torch.zeros_like(q) for q in p.parameters]
    for column in _root(outputs).unbind(1):
        row = torch.autograd.grad(outputs, p.parameters, column, retain_graph=True)
        torch._foreach_addcmul_(total, list(row), list(row))
    return sum(leaf.sum() for leaf in total) if task == "ggn trace" else total


# --------------------------------------------------------------------------------------- mapped


def mapped(p: Problem, task: str, vectors: Vectors) -> Run:
    """Return the map over all samples."""
    params = {name: q.detach() for name, q in p.model.named_parameters()}
    ways: dict[str, Callable[[], Any]] = {
        "product": lambda: _products(p, params, vectors[0]),
        "trace": lambda: _mean(p, params, vectors, _forms),
        "diagonal": lambda: _mean(p, params, vectors, _entries),
        "ggn trace": lambda: sum(leaf.flatten(1).sum(1) for leaf in _diagonals(p, params)),
        "ggn diagonal": lambda: _diagonals(p, params),
    }
    return twice_differentiable(ways[task])


def _products(p: Problem, params: dict[str, Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    def one(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def loss(q: dict[str, Tensor]) -> Tensor:
            value: Tensor = p.loss_fn(functional_call(p.model, q, (x[None],)), y[None])
            return value

        product: dict[str, Tensor] = jvp(grad(loss), (params,), (p.named(v),))[1]
        return product

    return list(vmap(one)(p.inputs, p.targets).values())


def _mean(
    p: Problem,
    params: dict[str, Tensor],
    vectors: Vectors,
    join: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Return the mean over the vectors of what is made of them and their products."""
    parts = [join(_products(p, params, v), v) for v in vectors]
    return [sum(leaves[1:], leaves[0]) / len(vectors) for leaves in zip(*parts, strict=True)]


def _forms(products: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    parts = [(a * b).flatten(1).sum(1) for a, b in zip(products, v, strict=True)]
    return [torch.stack(parts).sum(0)]


def _entries(products: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    return [a * b for a, b in zip(products, v, strict=True)]


def _diagonals(p: Problem, params: dict[str, Tensor]) -> list[Tensor]:
    def one(x: Tensor) -> list[Tensor]:
        def outputs(q: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = functional_call(p.model, q, (x[None],))[0]
            return found, found

        jacobian, at = jacrev(outputs, has_aux=True)(params)
        root = _root(at)
        return [torch.tensordot(root.T, leaf, 1).square().sum(0) for leaf in jacobian.values()]

    return list(vmap(one, chunk_size=64)(p.inputs))


# ------------------------------------------------------------------------------------- BackPACK


def backpack(p: Problem, task: str) -> Run:
    """Return the diagonals of the Gauss-Newton matrix of every sample, or their sums."""
    extend, context, extension = (
        function_of("backpack", name)
        for name in ("extend", "backpack", "extensions.BatchDiagGGNExact")
    )
    model = extend(copy.deepcopy(p.model))
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))  # a mean would divide by the samples
    params = list(model.parameters())

    def run() -> Any:
        loss = loss_fn(model(p.inputs), p.targets)
        with context(extension()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # inputs need none
            loss.backward()
        found = [q.diag_ggn_exact_batch for q in params]
        model.zero_grad()
        if task == "ggn diagonal":
            return found
        return sum(leaf.flatten(1).sum(1) for leaf in found)

    return run
