"""The truth about a third derivative of one problem, and the compositions by which the library gives it.

A third derivative is symmetric, so the gradient of `<u, H(p) v>` is the derivative of `H(p) v` along `u`: one vector
answers every composition. The truth is a central difference of fourth order of products that are known right at the
point and at both ends. Its error shows in the change from one step to the next; where that is large (poles, rounded
numbers), or the two sides do not meet (kinks), there is no truth, and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from secorder_func import hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from tests.coverage.problems import Problem
from tests.coverage.reference import SEED, _attempt, _double_backward, _gradient, flat, truth_of

Tree = Any
Route = Callable[[Problem, Tree, Tree], Tree]

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
CONVERGED = 1e-6
"""Change from one step to the next, relative to the derivative, below which the differences count as converged."""
ACCEPTED = 1e-5
"""How far a right answer may be from converged differences."""
ONE_SIDED = 1e-2
"""Distance of the two one-sided differences, relative to the derivative, above which a point counts as a kink."""
FLOOR = 1e-3
"""Errors are relative to the derivative, or to this part of the product it is the derivative of: it may be zero."""


@dataclass(frozen=True)
class ThirdTruth:
    """`value` is the derivative, `size` what errors are relative to; without any value `why` says what failed."""

    value: Tensor | None
    size: float
    spread: float
    why: str = ""

    def error(self, answer: Tree) -> float:
        """Return the relative error of a tree; infinite for NaN."""
        assert self.value is not None
        return _error(flat(answer), self.value, self.size)

    def accepts(self, answer: Tree) -> bool:
        """Say whether a tree is the third derivative."""
        return self.error(answer) <= ACCEPTED


def _error(answer: Tensor, value: Tensor, size: float) -> float:
    ratio = float((answer - value).norm()) / size if answer.shape == value.shape else float("inf")
    return float("inf") if ratio != ratio else ratio


def dot(x: Tree, y: Tree) -> Tensor:
    """Return the real inner product in float64, with its graph; a missing gradient counts as zero."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(optree.tree_leaves(x), optree.tree_leaves(y, none_is_leaf=True), strict=True):
        if b is not None:
            total = total + (a.conj() * b).real.sum().to(torch.float64)
    return total


def smooth_direction(problem: Problem, u: Tree) -> Tree:
    """Return `u` with zeros for tensors without a gradient, such as targets that are compared with."""
    leaves, spec = optree.tree_flatten(problem.params)
    at = [leaf.detach().requires_grad_() for leaf in leaves]
    found = _gradient(problem, at, spec)
    pairs = zip(optree.tree_leaves(u), found, strict=True)
    return spec.unflatten([torch.zeros_like(d) if g is None else d for d, g in pairs])


# ------------------------------------------------------------------------------------- the truth


def third_truth_of(problem: Problem, u: Tree, v: Tree) -> ThirdTruth:
    """Return the derivative along `u` of the product of a problem's Hessian with `v`."""
    product, why = _right_product(problem, u, v)
    if product is None:
        return ThirdTruth(None, 0.0, float("inf"), why)
    found, why = _attempt(lambda: [_difference(problem, product, u, v, step) for step in STEPS])
    if found is None:
        return ThirdTruth(None, 0.0, float("inf"), why)
    middle = float(product(problem, v).nan_to_num().norm())
    sizes = [max(float(row.norm()), FLOOR * middle, 1e-8) for row in found]
    gaps = [_error(found[i + 1], found[i], sizes[i]) for i in range(len(found) - 1)]
    best = gaps.index(min(gaps))
    if gaps[best] > CONVERGED:
        return ThirdTruth(None, 0.0, gaps[best], f"differences change by {gaps[best]:.1e}")
    wide, narrow = (_kink(problem, product, u, v, step) for step in (STEPS[1], STEPS[-1]))
    shrinks = narrow < float("inf") and narrow <= 0.3 * wide  # as that of a smooth function does
    if narrow > ONE_SIDED * sizes[best] and not shrinks:
        return ThirdTruth(None, 0.0, float("inf"), "the two one-sided differences do not meet")
    return ThirdTruth(found[best], sizes[best], gaps[best])


def _kink(problem: Problem, product: Any, u: Tree, v: Tree, step: float) -> float:
    """Return how far the two one-sided differences are apart: at a symmetric kink the central one converges."""
    low, middle, high = (product(_shifted(problem, k * step, u), v) for k in (-1, 0, 1))
    gap = float((high + low - 2 * middle).norm()) / step
    return float("inf") if gap != gap else gap


def _right_product(problem: Problem, u: Tree, v: Tree) -> tuple[Any, str]:
    """Return double backward, else the library's product, whichever is right here and at both ends."""
    ends = [_shifted(problem, 2 * sign * STEPS[1], u) for sign in (1, 0, -1)]
    truths = [truth_of(end, v) for end in ends]
    for truth in truths:
        if truth.value is None:
            return None, truth.why
    if all(truth.double_backward_is_right for truth in truths):
        return _double_backward, ""
    own, why = _attempt(lambda: [_library(end, v) for end in ends])
    if own is not None and all(t.accepts(a) for t, a in zip(truths, own, strict=True)):
        return _library, ""
    return None, why or "no product is right here and at both ends"


def _library(problem: Problem, v: Tree) -> Tensor:
    torch.manual_seed(SEED)
    return flat(hvp(problem.f)(_detached(problem.params), v))


def _difference(problem: Problem, product: Any, u: Tree, v: Tree, step: float) -> Tensor:
    at = {k: product(_shifted(problem, k * step, u), v) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def _shifted(problem: Problem, step: float, u: Tree) -> Problem:
    moved = optree.tree_map(
        lambda p, d: (p.detach() + step * d).requires_grad_(), problem.params, u
    )
    return replace(problem, params=moved)


def _detached(params: Tree) -> Tree:
    return optree.tree_map(Tensor.detach, params)


# ------------------------------------------------------------------------------ the compositions
#
# Each takes a problem, u and v, and returns the derivative along u of the product with v.


def _gradient_of_product(mode: Any) -> Route:
    def route(problem: Problem, u: Tree, v: Tree) -> Tree:
        return torch.func.grad(lambda p: dot(u, hvp(problem.f, mode=mode)(p, v)))(
            _detached(problem.params)
        )

    return route


def _jvp_of_product(mode: Any) -> Route:
    def route(problem: Problem, u: Tree, v: Tree) -> Tree:
        params = _detached(problem.params)
        return torch.func.jvp(lambda p: hvp(problem.f, mode=mode)(p, v), (params,), (u,))[1]

    return route


def _autograd_of_product(problem: Problem, u: Tree, v: Tree) -> Tree:
    leaves, spec = optree.tree_flatten(problem.params)
    at = [leaf.detach().requires_grad_() for leaf in leaves]
    return spec.unflatten(_pulled(dot(u, hvp(problem.f)(spec.unflatten(at), v)), at))


def _gradient_of_operator(problem: Problem, u: Tree, v: Tree) -> Tree:
    return torch.func.grad(lambda p: dot(u, hessian_operator(problem.f, p) @ v))(
        _detached(problem.params)
    )


def _compat_create_graph(problem: Problem, u: Tree, v: Tree) -> Tree:
    leaves, spec = optree.tree_flatten(problem.params)
    product = exact_hvp(problem.closure, leaves, optree.tree_leaves(v), create_graph=True)
    return spec.unflatten(_pulled(dot(optree.tree_leaves(u), product), leaves))


def _pulled(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]


def inner_gradient(problem: Problem, u: Tree) -> Callable[[Tree], Tensor]:
    """Return `<u, gradient>` as a loss; its Hessian's product is a third derivative of the problem."""
    return lambda p: dot(u, torch.func.grad(problem.f)(p)) + _nothing(p)


def inner_autograd(problem: Problem, u: Tree) -> Callable[[Tree], Tensor]:
    """Return the same by plain autograd, on whatever tensors it is given."""

    def loss(params: Tree) -> Tensor:
        leaves = optree.tree_leaves(params)
        found = torch.autograd.grad(problem.f(params), leaves, create_graph=True, allow_unused=True)
        return dot(optree.tree_leaves(u), list(found)) + _nothing(params)

    return loss


def inner_jvp(problem: Problem, u: Tree) -> Callable[[Tree], Tensor]:
    """Return the same in forward mode."""
    return lambda p: torch.func.jvp(problem.f, (p,), (u,))[1] + _nothing(p)


def _nothing(params: Tree) -> Tensor:
    """Return zero, so that a loss depends on its parameters also where the gradient is constant."""
    return 0 * dot(params, params)


def _product_of(loss: Any, mode: Any) -> Route:
    def route(problem: Problem, u: Tree, v: Tree) -> Tree:
        return hvp(loss(problem, u), mode=mode)(_detached(problem.params), v)

    return route


def _operator_of(loss: Any) -> Route:
    def route(problem: Problem, u: Tree, v: Tree) -> Tree:
        return hessian_operator(loss(problem, u), _detached(problem.params)) @ v

    return route


def _compat_of_inner(problem: Problem, u: Tree, v: Tree) -> Tree:
    leaves, spec = optree.tree_flatten(problem.params)
    of_closure = replace(problem, f=lambda _: problem.closure())
    loss = inner_autograd(of_closure, u)
    found = exact_hvp(lambda: loss(problem.params), leaves, optree.tree_leaves(v))
    return spec.unflatten(found)


ROUTES: dict[str, Route] = {
    "grad of hvp": _gradient_of_product("auto"),
    "jvp of hvp": _jvp_of_product("auto"),
    "grad of forward hvp": _gradient_of_product("forward_over_reverse"),
    "jvp of forward hvp": _jvp_of_product("forward_over_reverse"),
    "autograd of hvp": _autograd_of_product,
    "grad of operator": _gradient_of_operator,
    "compat create_graph": _compat_create_graph,
    "hvp of grad": _product_of(inner_gradient, "auto"),
    "reverse hvp of grad": _product_of(inner_gradient, "reverse_over_reverse"),
    "hvp of autograd": _product_of(inner_autograd, "auto"),
    "operator of autograd": _operator_of(inner_autograd),
    "compat of autograd": _compat_of_inner,
    "hvp of jvp": _product_of(inner_jvp, "auto"),
    "reverse hvp of jvp": _product_of(inner_jvp, "reverse_over_reverse"),
}
"""Name -> a composition that the library offers."""

PROPAGATED: dict[str, Route] = {
    "grad of propagated hvp": _gradient_of_product("reverse_over_forward"),
    "jvp of propagated hvp": _jvp_of_product("reverse_over_forward"),
}
"""The same for a product by our own propagation: the second is always refused, the first where a rule is missing."""


def verdict(route: Route, problem: Problem, truth: ThirdTruth, u: Tree, v: Tree) -> str:
    """Return "right", "wrong by ...", or "refused: " with the message of a `RuntimeError`."""
    torch.manual_seed(SEED)
    try:
        answer = route(problem, u, v)
    except RuntimeError as error:
        return f"refused: {error}"
    return "right" if truth.accepts(answer) else f"wrong by {truth.error(answer):.1e}"


# ------------------------------------------------------------------------------------- torch raw


def _raw(outer: str, inner: str) -> Route:
    def route(problem: Problem, u: Tree, v: Tree) -> Tree:
        params = _detached(problem.params)
        slope = torch.func.grad(problem.f)

        def product(p: Tree) -> Tree:
            if inner == "jvp":
                return torch.func.jvp(slope, (p,), (v,))[1]
            return torch.func.vjp(slope, p)[1](v)[0]

        if outer == "jvp":
            return torch.func.jvp(product, (params,), (u,))[1]
        return torch.func.grad(lambda p: dot(u, product(p)))(params)

    return route


def _raw_autograd(problem: Problem, u: Tree, v: Tree) -> Tree:
    leaves, spec = optree.tree_flatten(problem.params)
    at = [leaf.detach().requires_grad_() for leaf in leaves]
    first = _gradient(problem, at, spec, create_graph=True)
    value = dot(optree.tree_leaves(v), first)
    if not value.requires_grad:
        return spec.unflatten([torch.zeros_like(leaf) for leaf in at])
    second = torch.autograd.grad(value, at, create_graph=True, allow_unused=True)
    return spec.unflatten(_pulled(dot(optree.tree_leaves(u), list(second)), at))


RAW: dict[str, Route] = {
    "grad(vjp(grad))": _raw("grad", "vjp"),
    "grad(jvp(grad))": _raw("grad", "jvp"),
    "jvp(vjp(grad))": _raw("jvp", "vjp"),
    "jvp(jvp(grad))": _raw("jvp", "jvp"),
    "triple backward": _raw_autograd,
}
"""The compositions of torch alone, without any rule."""
