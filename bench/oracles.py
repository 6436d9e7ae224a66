"""Independent answers in float64, by plain autograd: nothing here calls the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.problems import Problem

__all__ = ["gauss_newton", "hessian", "hessian_rows", "sampled", "trace"]


def _gradient(wide: Problem) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    params: list[Tensor] = list(wide.model.parameters())
    loss = F.cross_entropy(wide.model(wide.inputs), wide.targets)
    return params, torch.autograd.grad(loss, params, create_graph=True)


def hessian(given: Problem, vector: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return the Hessian-vector product by double backward."""
    params, gradient = _gradient(given.double())
    vector = given.vector if vector is None else vector
    return list(torch.autograd.grad(gradient, params, [v.double() for v in vector]))


def hessian_rows(given: Problem) -> list[Tensor]:
    """Return the product of every sample's own Hessian with the vector, samples along a leading axis."""
    wide = given.double()
    rows = [hessian(wide.rows(i, i + 1)) for i in range(wide.inputs.shape[0])]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def gauss_newton(given: Problem) -> list[Tensor]:
    """Return `J^T H_L J v`, the Jacobian by the derivative of a pullback in its cotangent."""
    wide = given.double()
    params = list(wide.model.parameters())
    output = wide.model(wide.inputs)
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, params, u, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, u, wide.vector, retain_graph=True)
    z = output.detach().requires_grad_()
    (slope,) = torch.autograd.grad(wide.loss_fn(z, wide.targets), z, create_graph=True)
    (bent,) = torch.autograd.grad(slope, z, tangent)
    return list(torch.autograd.grad(output, params, bent))


def sampled(given: Problem, task: str, vectors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the answer of a task of `bench.per_sample_curvature`, leaves with an axis of samples."""
    one = _sampled_ggn if task.startswith("ggn") else _sampled_hessian
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        rows = [one(given.rows(i, i + 1), task, vectors) for i in range(given.inputs.shape[0])]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _sampled_hessian(
    given: Problem, task: str, vectors: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    params, gradient = _gradient(given)
    stacks = [torch.stack(column) for column in zip(*vectors, strict=True)]
    products = torch.autograd.grad(gradient, params, stacks, is_grads_batched=True)
    if task == "product":
        return [leaf[0] for leaf in products]
    joined = [(a * b).mean(0) for a, b in zip(products, stacks, strict=True)]
    return joined if task == "diagonal" else [torch.stack([leaf.sum() for leaf in joined]).sum()]


def _sampled_ggn(given: Problem, task: str, _: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    params = given.parameters
    outputs = given.model(given.inputs)[0]
    units = torch.eye(len(outputs), dtype=outputs.dtype)
    rows = torch.autograd.grad(outputs, params, units, is_grads_batched=True)
    share = outputs.detach().softmax(0)
    curvature = share.diag() - torch.outer(share, share)
    diagonal = [torch.einsum("c...,cd,d...->...", row, curvature, row) for row in rows]
    if task == "ggn diagonal":
        return diagonal
    return [torch.stack([leaf.sum() for leaf in diagonal]).sum()]


def trace(given: Problem, probes: int = 64) -> tuple[float, float, float]:
    """Return the trace of the Hessian, its standard error, and the standard deviation of one Rademacher probe.

    Up to 20,000 parameters from the matrix itself, without error; above that from `probes` probes, in float32.
    """
    if given.num_parameters > 20_000:
        return _estimated(given, probes)
    params, gradient = _gradient(given.double())
    flat = torch.cat([g.flatten() for g in gradient])
    total, square, diagonal = 0.0, 0.0, 0.0
    for indices in torch.arange(flat.numel()).split(256):
        seeds = torch.zeros(len(indices), flat.numel(), dtype=flat.dtype)
        seeds[torch.arange(len(indices)), indices] = 1
        block = torch.autograd.grad(flat, params, seeds, retain_graph=True, is_grads_batched=True)
        rows = torch.cat([b.flatten(1) for b in block], 1)
        entries = rows[torch.arange(len(indices)), indices]
        total += float(entries.sum())
        square += float(rows.square().sum())
        diagonal += float(entries.square().sum())
    return total, 0.0, (2 * (square - diagonal)) ** 0.5


def _estimated(given: Problem, probes: int) -> tuple[float, float, float]:
    params, gradient = _gradient(given)
    generator = torch.Generator().manual_seed(2)
    forms = []
    for _ in range(probes):
        v = [torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1 for p in params]
        product = torch.autograd.grad(gradient, params, v, retain_graph=True)
        forms.append(sum((a.double() * b).sum() for a, b in zip(product, v, strict=True)))
    values = torch.stack([torch.as_tensor(form) for form in forms])
    spread = float(values.std())
    return float(values.mean()), spread / probes**0.5, spread
