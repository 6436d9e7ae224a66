"""Products with one vector as candidates: how ours are made, and how any product becomes a candidate.

The peers' are made in `bench.peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.harness import Candidate, Made, UnavailableError
from bench.problems import Problem
from secorder_func import functional_model, ggn_operator, ggnvp, hessian_operator, hvp

__all__ = [
    "Factory",
    "Product",
    "columns",
    "compat_ggn",
    "compat_hvp",
    "function_of",
    "ggn",
    "ggn_kept",
    "ggn_made_anew",
    "looped",
    "operator",
    "operator_made_anew",
    "single",
    "transform",
]


@dataclass(frozen=True)
class Product:
    """A product with one vector.

    Parameters
    ----------
    multiply
        Vector -> product, in the package's own form.
    vector
        How the package wants a list of tensors. Not timed.
    facts
        What its making told: entries of the record.
    """

    multiply: Callable[[Any], Any]
    vector: Callable[[Sequence[Tensor]], Any] = list
    facts: dict[str, Any] = field(default_factory=dict)


Factory = Callable[[Problem], Product]


def single(name: str, factory: Factory, *, peer: bool = False) -> Candidate:
    """Return the candidate that multiplies the problem's one vector."""

    def make(p: Problem) -> Made:
        product = factory(p)
        vector = product.vector(p.vector)
        return Made(lambda: product.multiply(vector), lambda: product.facts)

    return Candidate(name, make, peer)


def looped(name: str, factory: Factory, count: int, *, peer: bool = False) -> Candidate:
    """Return the candidate that multiplies `count` vectors in a Python loop."""

    def make(p: Problem) -> Made:
        product = factory(p)
        rows = zip(*(leaf.unbind() for leaf in p.vectors(count)), strict=True)
        vectors = [product.vector(row) for row in rows]
        return Made(lambda: [product.multiply(v) for v in vectors], lambda: product.facts)

    return Candidate(name, make, peer)


def columns(found: list[Tensor], count: int) -> list[Tensor]:
    """Return `count` stacked leaves: those given, or the leaves of products one after the other, stacked."""
    if len(found) == count:
        return found
    return [torch.stack([t.detach() for t in found[i::count]]) for i in range(count)]


def function_of(package: str, name: str) -> Callable[..., Any]:
    """Return a function by its place below a package."""
    module, _, function = name.rpartition(".")
    place = f"{package}.{module}" if module else package
    try:
        return getattr(import_module(place), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{package} is not installed") from error


# ------------------------------------------------------------------------------------- Hessian


def transform(mode: Any = "auto") -> Factory:
    """Return how `hvp` is made in a mode."""

    def make(p: Problem) -> Product:
        f, params = p.functional
        product = hvp(f, mode=mode)
        return Product(lambda v: product(params, v, p.inputs, p.targets), p.named)

    return make


def operator(p: Problem) -> Product:
    """Return the product of an operator that is made before."""
    f, params = p.functional
    op = hessian_operator(f, params, p.inputs, p.targets)
    return Product(lambda v: op @ v, p.named)


def operator_made_anew(p: Problem) -> Product:
    """Return the product of an operator that is made for each."""
    f, params = p.functional
    return Product(lambda v: hessian_operator(f, params, p.inputs, p.targets) @ v, p.named)


def compat_hvp(p: Problem) -> Product:
    """Return the drop-in's product."""
    exact_hvp = function_of("secorder_func.compat", "core.hvp.exact_hvp")
    return Product(lambda v: exact_hvp(p.closure, p.parameters, v))


# -------------------------------------------------------------------------------- Gauss-Newton


def ggn(mode: Any = "auto") -> Factory:
    """Return the product by `ggnvp` in one mode."""

    def make(p: Problem) -> Product:
        model_fn, params = functional_model(p.model)
        product = ggnvp(model_fn, p.loss_fn, mode=mode)
        return Product(lambda v: product(params, v, p.inputs, p.targets), p.named)

    return make


def ggn_kept(p: Problem) -> Product:
    """Return the product of an operator that is made before."""
    model_fn, params = functional_model(p.model)
    op = ggn_operator(model_fn, p.loss_fn, params, p.inputs, p.targets)
    return Product(lambda v: op @ v, p.named)


def ggn_made_anew(p: Problem) -> Product:
    """Return the product of an operator that is made for each."""
    return Product(lambda v: ggn_kept(p).multiply(v), p.named)


def compat_ggn(p: Problem) -> Product:
    """Return the drop-in's product."""
    product = function_of("secorder_func.compat", "core.hvp.gauss_newton_product")
    return Product(lambda v: product(p.model, p.loss_fn, p.inputs, p.targets, v))
