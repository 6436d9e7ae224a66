"""Directions through the parameters along which a loss is looked at."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.probes import draw_seed, normal
from secorder_func.checks import check_like, check_params
from secorder_func.errors import ArgumentError, message
from secorder_func.typing import Tree

__all__ = ["filter_normalized", "random_direction"]

Normalize = Literal["filter", "leaf", "global"]
Vectors = Literal["zero", "scale"]


def random_direction(
    params: Tree,
    /,
    *,
    generator: torch.Generator | None = None,
    normalize: Normalize | None = "filter",
    vectors: Vectors = "zero",
) -> Tree:
    """Return a direction of independent standard normal entries, normalised.

    Parameters
    ----------
    params
        A tree of tensors.
    generator
        Its next value is the seed; torch's global generator if None. A seed gives the same direction on every device.
    normalize
        `"filter"`: as `filter_normalized` does. `"leaf"`: every leaf has norm 1. `"global"`: all
        leaves together have norm 1. None: as drawn.
    vectors
        For `"filter"`, what becomes of leaves with fewer than two axes; see `filter_normalized`.

    Returns
    -------
    Tree
        Like `params`. A leaf without entries remains so.

    Raises
    ------
    TypeError, ValueError
        `params` has no floating tensor; an option is unknown; every leaf would be zero.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import random_direction
    >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "bias": torch.ones(2)}
    >>> d = random_direction(params, generator=torch.Generator().manual_seed(0))
    >>> d["weight"].norm(dim=1).round(decimals=4), d["bias"]
    (tensor([5., 1.]), tensor([0., 0.]))
    """
    where = "random_direction"
    check_params(params, where)
    if normalize is not None and normalize not in get_args(Normalize):
        known = ", ".join(repr(name) for name in get_args(Normalize))
        problem = f"normalize must be one of {known} or None, got {normalize!r}"
        raise ArgumentError(message(where, problem))
    like = tree.map(Tensor.detach, params)
    drawn = tree.map(lambda leaf: leaf[0], normal(draw_seed(generator), range(1), like))
    if normalize == "filter":
        return _filter_normalized(drawn, like, vectors, where)
    if normalize == "leaf":
        return tree.map(lambda leaf: _rescaled(leaf, 1.0, ()), drawn)
    if normalize == "global":
        length = tree.norm(drawn)
        return tree.scale(torch.where(length > 0, 1 / length, torch.ones_like(length)), drawn)
    return drawn


def filter_normalized(direction: Tree, params: Tree, /, *, vectors: Vectors = "zero") -> Tree:
    """Return a direction whose filters have the norms of the filters of `params`.

    A filter is a slice along the first axis of a leaf: what makes one output channel of a convolution, one unit of
    a dense layer. A network whose filters are scaled up and down without changing its function then shows the same
    surface.

    Parameters
    ----------
    direction
        A tree like `params`.
    params
        The point through which the direction leads.
    vectors
        What becomes of leaves with fewer than two axes (biases, normalisation layers): `"zero"` holds them fixed, as in
        the published pictures; `"scale"` gives each leaf the norm of its leaf of `params`.

    Returns
    -------
    Tree
        Like `params`; zero in filters where `params` or `direction` is zero.

    Raises
    ------
    TypeError, ValueError
        `direction` is not like `params`; an option is unknown; with `vectors="zero"`, no leaf has two axes.

    Notes
    -----
    The authors' program either zeroes those leaves or puts the parameters themselves in their place; `"scale"` keeps
    the direction instead. For leaves with two axes and more the three agree.

    References
    ----------
    H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, Visualizing the loss landscape of neural nets, NeurIPS 2018.
    https://doi.org/10.48550/arXiv.1712.09913

    Examples
    --------
    >>> import torch
    >>> from secorder_func import filter_normalized
    >>> filter_normalized(torch.ones(2, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[3.5355, 3.5355],
            [0.0000, 0.0000]])
    """
    where = "filter_normalized"
    check_params(params, where)
    check_like(direction, params, where, name="direction")
    return _filter_normalized(direction, params, vectors, where)


def _filter_normalized(direction: Tree, params: Tree, vectors: str, where: str) -> Tree:
    if vectors not in get_args(Vectors):
        known = " or ".join(repr(name) for name in get_args(Vectors))
        raise ArgumentError(message(where, f"vectors must be {known}, got {vectors!r}"))
    if vectors == "zero" and all(leaf.ndim < 2 for leaf in tree.flatten(params)[0]):
        raise ArgumentError(
            message(
                where,
                "no leaf of params has filters (two axes or more), so that the direction would be zero",
                "Pass vectors='scale', or normalize='global' to random_direction",
            )
        )

    def normalised(leaf: Tensor, like: Tensor) -> Tensor:
        if leaf.ndim < 2:
            if vectors == "zero":
                return torch.zeros_like(leaf)
            return _rescaled(leaf, _norm(like, ()), ())
        axes = tuple(range(1, leaf.ndim))
        return _rescaled(leaf, _norm(like, axes), axes)

    return tree.map(normalised, direction, params)


def _rescaled(leaf: Tensor, target: Tensor | float, axes: tuple[int, ...]) -> Tensor:
    """Return the leaf with slices of this norm along `axes` (all if empty); slices of zeros remain."""
    length = _norm(leaf, axes)
    factor = target / torch.where(length > 0, length, torch.ones_like(length))
    return leaf * factor.to(leaf.dtype)


def _norm(leaf: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the Euclidean norm, in float32 for half precision."""
    if leaf.dtype in (torch.float16, torch.bfloat16):
        leaf = leaf.float()
    if not leaf.numel():
        return torch.ones((), dtype=leaf.real.dtype, device=leaf.device)
    norm: Tensor = torch.linalg.vector_norm(leaf, dim=axes or None, keepdim=bool(axes))
    return norm
