"""The other packages, and what a user would write without one: how each makes its products.

Everything about how a peer is called stands here, once; JAX's models are in `bench.jax_twins`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from bench.harness import Candidate, Made, Run, UnavailableError
from bench.problems import Problem
from bench.products import Product, function_of

__all__ = [
    "backpack_ggn",
    "backpack_hvp",
    "compiled_jvp_grad",
    "curvlinops_ggn",
    "curvlinops_hessian",
    "curvlinops_operator",
    "curvlinops_several",
    "double_backward",
    "plain_jvp_grad",
    "plain_rows",
    "reused_graph",
    "torch_secorder_ggn",
    "torch_secorder_hvp",
    "torch_secorder_rows",
]

_OUTPUTS = 128
"""More backward passes than this for one product are no measurement but a wait."""

# -------------------------------------------------------------------------------- torch-secorder


def torch_secorder_hvp(p: Problem) -> Product:
    exact_hvp = function_of("torch_secorder", "core.hvp.exact_hvp")
    return Product(lambda v: exact_hvp(p.closure, p.parameters, v))


def torch_secorder_ggn(p: Problem) -> Product:
    product = function_of("torch_secorder", "core.hvp.gauss_newton_product")
    outputs = p.model(p.inputs).numel()
    if outputs > _OUTPUTS:
        raise UnavailableError(f"takes {outputs:,} backward passes")
    return Product(lambda v: product(p.model, p.loss_fn, p.inputs, p.targets, v))


def torch_secorder_rows(p: Problem) -> Run:
    """Return the products of every sample's Hessian, in a loop."""
    products = [torch_secorder_hvp(p.rows(i, i + 1)) for i in range(p.inputs.shape[0])]
    vector = list(p.vector)
    return lambda: [product.multiply(vector) for product in products]


# ------------------------------------------------------------------------------------ curvlinops


def curvlinops_operator(p: Problem, name: str = "HessianLinearOperator") -> Any:
    data = [(p.inputs, p.targets)]
    make = function_of("curvlinops", name)
    return make(p.model, p.loss_fn, p.parameters, data, check_deterministic=False)


def curvlinops_hessian(p: Problem) -> Product:
    op = curvlinops_operator(p)
    return Product(lambda v: op @ v)


def curvlinops_ggn(p: Problem) -> Product:
    op = curvlinops_operator(p, "GGNLinearOperator")
    return Product(lambda v: op @ v)


def curvlinops_several(name: str, count: int) -> Candidate:
    """Return the candidate that multiplies `count` vectors at once; curvlinops has them along the last axis."""

    def make(p: Problem) -> Run:
        op = curvlinops_operator(p)
        vectors = [v.movedim(0, -1).contiguous() for v in p.vectors(count)]
        return lambda: op @ vectors

    return Candidate(name, make, True, read=lambda result: [r.movedim(-1, 0) for r in result])


# -------------------------------------------------------------------------------------- BackPACK


def backpack_hvp(p: Problem) -> Product:
    product = function_of("backpack", "hessianfree.hvp.hessian_vector_product")
    return Product(lambda v: product(p.closure(), p.parameters, v))


def backpack_ggn(p: Problem) -> Product:
    product = function_of("backpack", "hessianfree.ggnvp.ggn_vector_product")

    def multiply(v: list[Tensor]) -> Any:
        output = p.model(p.inputs)
        return product(p.loss_fn(output, p.targets), output, p.model, v)

    return Product(multiply)


# --------------------------------------------------------------------------------- plain PyTorch


def double_backward(p: Problem) -> Product:
    def multiply(v: list[Tensor]) -> Any:
        gradient = torch.autograd.grad(p.closure(), p.parameters, create_graph=True)
        return torch.autograd.grad(gradient, p.parameters, v)

    return Product(multiply)


def reused_graph(p: Problem) -> Product:
    """Return the way of PyHessian: a gradient with its graph once, then a backward pass of it for each product."""
    gradient = torch.autograd.grad(p.closure(), p.parameters, create_graph=True)
    return Product(lambda v: torch.autograd.grad(gradient, p.parameters, v, retain_graph=True))


def _loss(p: Problem) -> tuple[Any, dict[str, Tensor]]:
    params = {name: tensor.detach() for name, tensor in p.model.named_parameters()}

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = p.loss_fn(functional_call(p.model, params, inputs), targets)
        return value

    return loss, params


def plain_jvp_grad(p: Problem) -> Product:
    loss, params = _loss(p)
    data = p.inputs, p.targets
    return Product(lambda v: jvp(grad(lambda q: loss(q, *data)), (params,), (v,))[1], p.named)


def compiled_jvp_grad(p: Problem) -> Product:
    """Return the same through `torch.compile`, with the seconds of its first call."""
    from time import perf_counter

    loss, params = _loss(p)

    def product(params: Any, v: Any, inputs: Tensor, targets: Tensor) -> Any:
        return jvp(grad(lambda q: loss(q, inputs, targets)), (params,), (v,))[1]

    compiled = torch.compile(product)
    begin = perf_counter()
    compiled(params, p.vector_dict, p.inputs, p.targets)
    facts = {"compile_seconds": round(perf_counter() - begin, 2)}
    return Product(lambda v: compiled(params, v, p.inputs, p.targets), p.named, facts)


def plain_rows(p: Problem) -> Made:
    """Return the products of every sample's Hessian by `vmap(jvp(grad(f)))`."""
    loss, params = _loss(p)
    v = p.vector_dict
    targets = p.targets.unflatten(0, (p.inputs.shape[0], -1))

    def one(x: Tensor, y: Tensor) -> Any:
        return jvp(grad(lambda q: loss(q, x[None], y)), (params,), (v,))[1]

    return Made(lambda: vmap(one)(p.inputs, targets))
