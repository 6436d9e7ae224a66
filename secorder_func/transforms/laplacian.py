"""The Laplacian of a function in its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.checks import check_callable
from secorder_func.errors import ArgumentError, message
from secorder_func.rules.levels import mapping
from secorder_func.rules.torch_func import grad
from secorder_func.transforms.forms import (
    checked_value,
    propagated_to_second_order,
    quadratic_form,
)
from secorder_func.transforms.hessian import hvp
from secorder_func.transforms.loss import FlatLoss, Leaves, flat_loss
from secorder_func.transforms.plan import Plan
from secorder_func.transforms.policy import differentiated_outside, first_exact, in_transform
from secorder_func.typing import Tree

__all__ = ["laplacian", "plan_for", "refuse_dependence", "require_samples"]

_CACHE = 2**22
_PROOFS = 4
"""How many random halves of the values are asked for gradients in the other samples."""


def laplacian(f: Callable[..., Tensor], *, per_sample: bool = False) -> Callable[..., Tensor]:
    r"""Transform `f` into its Laplacian, the sum of the second derivatives in every entry of `x`.

    Parameters
    ----------
    f
        `f(x, *args, **kwargs) -> value`, a real floating tensor of any shape; `x` is a tensor or a tree.
    per_sample
        Whether the leading axis of `x` and of the value counts samples, each of which has a Laplacian of its own.
        Then one basis serves all samples. A sample on whose value another one has an influence is an error.

    Returns
    -------
    Callable
        `(x, *args, **kwargs) -> Laplacian`, shaped like the value.

    Raises
    ------
    TypeError, ValueError
        As for `hvp`; also, per sample, leading axes of different lengths and samples that depend on each other.

    Notes
    -----
    By second-order forward propagation along all basis vectors at once, whose second-order terms are summed as they
    propagate; without rules for every function, by a product for each basis vector, with a warning. Products are taken
    where the Laplacian is itself differentiated. Whether samples depend on each other is not seen under vmap.

    References
    ----------
    R. Li et al., A computational framework for neural network-based variational Monte Carlo with Forward Laplacian,
    Nature Machine Intelligence 6, 2024. https://doi.org/10.1038/s42256-024-00794-x

    Examples
    --------
    >>> import torch
    >>> from secorder_func import laplacian
    >>> laplacian(lambda x: (x**2).sum(-1) ** 2, per_sample=True)(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([16., 64.])
    """
    check_callable(f, "laplacian")

    def transformed(x: Tree, /, *args: Any, **kwargs: Any) -> Tensor:
        loss = flat_loss(f, x, args, kwargs, has_aux=False, where="laplacian")
        if per_sample:
            require_samples(loss)
            refuse_dependence(loss)
        if differentiated_outside(x, args, tuple(kwargs.values())) or in_transform():
            return _by_products(f, x, args, kwargs, per_sample)
        _, found = first_exact(
            [
                ("propagation", lambda: _by_propagation(loss, per_sample)),
                ("products", lambda: _by_products(f, x, args, kwargs, per_sample)),
            ],
            where="laplacian",
            tensors=loss.leaves,
            eager=loss.eager,
        )
        return found

    return transformed


def plan_for(loss: FlatLoss, group: int = 1) -> Plan:
    """Return how many basis vectors or probes are propagated at once, and how many of these are summed."""
    largest = max(leaf.numel() * leaf.element_size() for leaf in loss.leaves)
    device = loss.leaves[0].device
    # Nothing is drawn, so that what is left is to reuse memory: 4 MiB at a time were 1.3 times as fast as 8.
    cache = _CACHE if device.type == "cpu" else None
    return Plan("auto", None, device, 2 * largest, cache=cache, group=group)


def _by_propagation(loss: FlatLoss, per_sample: bool) -> Tensor:
    total: Tensor | None = None
    term = None
    plan = plan_for(loss)
    for index, leaf in enumerate(loss.leaves):
        shape = leaf.shape[1:] if per_sample else leaf.shape
        count, start = shape.numel(), 0
        while start < count:
            size = plan.size(count - start, term)
            draw = partial(_basis, start, size, leaf, shape)
            found, term = propagated_to_second_order(
                loss.leaves,
                [draw if place == index else None for place in range(len(loss.leaves))],
                lambda terms, at: checked_value(loss.evaluate(at), loss.where),
                count=size,
                groups=1,
            )
            total = found[0] if total is None else total + found[0]
            start += size
    return torch.zeros_like(checked_value(loss.eager(), loss.where)) if total is None else total


def _basis(start: int, size: int, leaf: Tensor, shape: torch.Size) -> Tensor:
    """Return some basis vectors of one leaf, the same for all samples if the shape is that of one."""
    rows: Tensor = tree.basis(leaf.new_zeros(shape), start, start + size)
    return rows if len(shape) == leaf.ndim else rows.unsqueeze(1).expand(size, *leaf.shape)


def require_samples(loss: FlatLoss) -> None:
    """Refuse leaves without a common leading axis."""
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in loss.leaves}
    if len(lengths) != 1 or None in lengths:
        problem = f"per_sample=True needs a leading axis of samples, got leaves of {sorted(map(str, lengths))}"
        mend = "Give every leaf one row a sample, or take per_sample=False"
        raise ArgumentError(message(loss.where, problem, mend))


def refuse_dependence(loss: FlatLoss) -> None:
    """Raise if some values have a gradient in the other samples: the values are a random half, some times.

    Under vmap and torch.compile, where no value can be looked at, it says nothing.
    """
    if torch.compiler.is_compiling() or mapping():
        return
    count = loss.leaves[0].shape[0]
    generator = torch.Generator().manual_seed(count)

    def weighted(weights: Tensor, leaves: Leaves) -> Tensor:
        found = checked_value(loss.evaluate(leaves), loss.where)
        if not found.ndim or found.shape[0] != count:
            problem = (
                f"per_sample=True needs one value a sample, {count}, got shape {tuple(found.shape)}"
            )
            raise ArgumentError(message(loss.where, problem, "Take per_sample=False"))
        return (found * weights.to(found).reshape(-1, *[1] * (found.ndim - 1))).sum()

    for _ in range(_PROOFS):
        weights = torch.randn(count, generator=generator)
        others = weights < 0
        scalar = replace(loss, evaluate=partial(weighted, weights.clamp(min=0)))
        found, _ = grad(scalar.at(forward=False, higher=False), has_aux=True)(loss.leaves)
        if any(bool((leaf[others.to(leaf.device)].abs() > 0).any()) for leaf in found):
            problem = (
                "per_sample=True needs samples that do not depend on each other, got some that do"
            )
            mend = "Put modules like BatchNorm into eval mode, or take per_sample=False"
            raise ArgumentError(message(loss.where, problem, mend))


def _by_products(
    f: Callable[..., Tensor],
    x: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    per_sample: bool,
) -> Tensor:
    """Return it by a product for each basis vector, which may be differentiated."""
    leaves, unflatten = tree.flatten(x)

    def entry(index: int, basis: Tensor) -> Tensor:
        v = unflatten([basis if i == index else torch.zeros_like(t) for i, t in enumerate(leaves)])
        if not per_sample:
            return quadratic_form(f)(x, v, *args, **kwargs)
        hv = hvp(lambda x: f(x, *args, **kwargs).sum())(x, v)
        entries: Tensor = (tree.flatten(hv)[0][index] * basis).flatten(1).sum(1)
        return entries

    total: Any = 0.0
    for index, leaf in enumerate(leaves):
        shape = leaf.shape[1:] if per_sample else leaf.shape
        basis = _basis(0, shape.numel(), leaf, shape)
        each = vmap(partial(entry, index), chunk_size=64, randomness="same")(basis)
        total = total + each.sum(0)
    return total  # type: ignore[no-any-return]
