"""Answers that share no code with `secorder_func`.

Second derivatives come from plain autograd, differentiated twice, with attention on the math kernel; trees are taken
apart by optree, dict keys sorted, which is the documented order of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Tree = Any
Fn = Callable[..., Any]


# ----------------------------------------------------------------------------- trees and numbers


def leaves_of(tree: Tree) -> list[Tensor]:
    """Return the leaves, dict keys sorted."""
    return optree.tree_leaves(tree)


def flat(tree: Tree) -> Tensor:
    """Return all entries as one vector in the widest dtype among the leaves."""
    leaves = leaves_of(tree)
    dtype = leaves[0].dtype
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])


def real_flat(tree: Tree) -> Tensor:
    """Return all entries as one float64 vector; complex ones as two."""
    parts = [
        (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).reshape(-1)
        for leaf in (leaf.detach() for leaf in leaves_of(tree))
    ]
    return torch.cat([part.double() for part in parts])


def like(vector: Tensor, tree: Tree) -> Tree:
    """Fold one vector into a tree; the inverse of `flat`."""
    leaves, spec = optree.tree_flatten(tree)
    pieces = vector.split([leaf.numel() for leaf in leaves])
    return spec.unflatten(
        [p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(pieces, leaves, strict=True)]
    )


def dot(x: Tree, y: Tree) -> Tensor:
    """Return the real inner product as a float64 number that carries its graph."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(leaves_of(x), leaves_of(y), strict=True):
        total = total + (a.conj() * b).real.sum().double()
    return total


def random_like(tree: Tree, seed: int) -> Tree:
    """Return a tree of standard normal entries."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(
        lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator), tree
    )


def shifted(tree: Tree, step: float, direction: Tree) -> Tree:
    """Return `tree + step * direction`."""
    return optree.tree_map(lambda p, d: p + step * d, tree, direction)


def relative_error(actual: Tree, expected: Tree) -> float:
    """Return `|actual - expected| / |expected|` over all entries, in float64."""
    a, e = real_flat(actual), real_flat(expected)
    assert float(e.norm()) > 0, "an answer of zeros proves nothing"
    return float((a - e).norm() / e.norm())


def assert_same(actual: Tree, expected: Tree, rtol: float = 1e-10) -> None:
    """Assert equal structure, shapes and dtypes, and a relative error of at most `rtol`."""
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for a, e in zip(leaves_of(actual), leaves_of(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
    error = relative_error(actual, expected)
    assert error <= rtol, f"relative error {error:.3g}"


def assert_acts(product: Tree, v: Tree) -> None:
    """Assert that a product is neither zero nor the vector itself: identities hold for both."""
    assert relative_error(v, product) > 1e-3


# --------------------------------------------------------------------------------- derivatives


@contextmanager
def untouched(model: nn.Module | None) -> Iterator[None]:
    """Use differentiable attention inside; put a module's buffers back afterwards."""
    buffers = [] if model is None else [(b, b.clone()) for b in model.buffers()]
    with sdpa_kernel(SDPBackend.MATH):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _variables(params: Tree) -> tuple[Tree, list[Tensor]]:
    fresh = optree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), params)
    return fresh, leaves_of(fresh)


def _grad(output: Tensor, leaves: list[Tensor], *, keep: bool = False) -> list[Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(
        output, leaves, create_graph=keep, retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    ]


def gradient(f: Fn, params: Tree, *args: Any, model: nn.Module | None = None) -> Tree:
    """Return the gradient of `f(params, *args)`."""
    fresh, leaves = _variables(params)
    with untouched(model), torch.enable_grad():
        grads = _grad(f(fresh, *args), leaves)
    return optree.tree_unflatten(optree.tree_structure(params), grads)


def hvp(f: Fn, params: Tree, v: Tree, *args: Any, model: nn.Module | None = None) -> Tree:
    """Return `H v` by double backward."""
    fresh, leaves = _variables(params)
    with untouched(model), torch.enable_grad():
        grads = _grad(f(fresh, *args), leaves, keep=True)
        hv = _grad(dot(v, grads_like(grads, params)), leaves)
    return optree.tree_unflatten(optree.tree_structure(params), hv)


def grads_like(grads: list[Tensor], params: Tree) -> Tree:
    """Put gradients into the structure of the parameters."""
    return optree.tree_unflatten(optree.tree_structure(params), grads)


def hessian(f: Fn, params: Tree, *args: Any, model: nn.Module | None = None) -> Tensor:
    """Return the dense Hessian by double backward, entry by entry of the gradient."""
    fresh, leaves = _variables(params)
    with untouched(model), torch.enable_grad():
        entries = flat(_grad(f(fresh, *args), leaves, keep=True))
        rows = [flat(_grad(entry, leaves)) for entry in entries]
    return torch.stack(rows)


def jacobian(outputs: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """Return the dense Jacobian of all entries of outputs, one backward pass a row."""
    return torch.stack([flat(_grad(entry, leaves)) for out in outputs for entry in out.reshape(-1)])


def ggn(
    model_fn: Fn,
    loss_fn: Fn,
    params: Tree,
    inputs: Any,
    targets: Any,
    model: nn.Module | None = None,
) -> Tensor:
    """Return the dense `J^T H_L J`."""
    fresh, leaves = _variables(params)
    with untouched(model), torch.enable_grad():
        outputs = model_fn(fresh, inputs)
        J = jacobian(leaves_of(outputs), leaves)
    H = hessian(loss_fn, optree.tree_map(Tensor.detach, outputs), targets)
    return J.T @ H @ J


def directional_derivative(
    function: Callable[[Tree], Tensor], params: Tree, direction: Tree, step: float = 1e-3
) -> Tensor:
    """Return the derivative of a scalar function along a direction by a central difference of fourth order."""
    at = {k: function(shifted(params, k * step, direction)).detach() for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
