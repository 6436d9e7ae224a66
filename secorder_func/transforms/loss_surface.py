"""The loss over a plane, or over any affine set, through the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.checks import check_callable, check_count, check_like
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import without_vmap_warnings
from secorder_func.transforms.loss import Leaves, flat_loss
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import LossFn, Tree

__all__ = ["default_chunk_size", "loss_surface", "swept"]


def loss_surface(f: LossFn, *, chunk_size: int | None = None) -> Callable[..., Tensor]:
    r"""Transform `f` into its values at `params + sum_i c_i directions[i]`, for many points `c` in one sweep.

    Parameters
    ----------
    f
        `f(params, *args, **kwargs) -> loss` with one element.
    chunk_size
        How many points to evaluate at once, by `vmap`; 1 evaluates them one by one, without it. By default up to 64
        where parameters and arguments are small, and 1 where they are large, which is faster.

    Returns
    -------
    Callable
        `(params, directions, coordinates, *args, **kwargs) -> losses`. `directions` is a list or tuple of `k`
        trees like `params`; `coordinates` is real, of shape `(..., k)`, and `losses` of shape `(...)`: a curve takes
        `(points, 1)`, a plane `(rows, columns, 2)`. Losses have the unit, the dtype and the device of `f`'s. Without
        any point they have the dtype of `params`.

    Raises
    ------
    TypeError
        A direction is structured differently from `params`; `directions` is no list or tuple; the loss is no tensor.
    ValueError
        A leaf of a direction has another shape, dtype or device; there is no direction; the last axis of `coordinates`
        is not `k` long; the loss has several elements.

    Notes
    -----
    Costs one evaluation of the loss a point, and the memory of `chunk_size` of them. Where `vmap` cannot evaluate the
    loss (control flow that depends on its numbers) the points follow one by one, with the same result.

    Every point sees the same random numbers, so that the surface of a loss with dropout is that of one function; the
    random state is left as one evaluation leaves it. Batch norm in training mode takes the statistics of the batch
    at every point. Parameters, buffers and module attributes are left as they were. NaN and infinite losses are
    returned as they are.

    The losses are differentiable in `params`, `directions`, `coordinates` and the arguments; no graph is kept where
    none of them is differentiated. In a tensor that `f` merely captures they are constants.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import loss_surface
    >>> f = lambda p: (p["x"] ** 2).sum() + p["y"]
    >>> params = {"x": torch.zeros(2), "y": torch.tensor(1.0)}
    >>> direction = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor(0.5)}
    >>> loss_surface(f)(params, [direction], torch.tensor([[-2.0], [0.0], [2.0]]))
    tensor([4., 1., 6.])
    """
    where = "loss_surface"
    check_callable(f, where)
    if chunk_size is not None:
        check_count(chunk_size, where, name="chunk_size")

    def surface(
        params: Tree,
        directions: Sequence[Tree],
        coordinates: Tensor,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        loss = flat_loss(f, params, args, kwargs, has_aux=False, where=where)
        rows = _checked_directions(directions, params)
        points = _checked_coordinates(coordinates, len(rows))
        rows, points = without_inference_tensors((rows, points))
        outside = differentiated_outside(params, rows, points, args, tuple(kwargs.values()))
        leaves = loss.leaves if outside else tuple(leaf.detach() for leaf in loss.leaves)
        at = loss.at(forward=False, higher=outside)

        with out_of_inference_mode():
            losses = swept(
                lambda leaves: at(leaves)[0],
                leaves,
                rows if outside else [tuple(leaf.detach() for leaf in row) for row in rows],
                points.reshape(-1, len(rows)),
                chunk_size=default_chunk_size(leaves, args, tuple(kwargs.values()))
                if chunk_size is None
                else chunk_size,
                exact=outside,
            )
        return (losses if outside else losses.detach()).reshape(points.shape[:-1])

    return surface


def swept(
    value: Callable[[Leaves], Tensor],
    leaves: Leaves,
    directions: Sequence[Leaves],
    points: Tensor,
    *,
    chunk_size: int,
    exact: bool = True,
) -> Tensor:
    """Return the values at `leaves + sum_i points[:, i] directions[i]`, `(len(points),)`.

    Parameters
    ----------
    value
        Leaves -> 0-dim tensor.
    exact
        Whether someone differentiates the points, which must then remain tensors.
    """
    if not len(points):
        kinds = [leaf.real if leaf.is_complex() else leaf for leaf in leaves]
        return torch.empty(0, dtype=tree.common_dtype(kinds), device=leaves[0].device)
    points = points.to(leaves[0].device)

    def at(point: Tensor) -> Tensor:
        return value(_moved_by_tensors(leaves, directions, point))

    def at_numbers(point: list[float]) -> Tensor:
        return value(_moved_by_numbers(leaves, directions, point))

    def one_by_one() -> Tensor:
        if exact or in_transform():
            return _replayed([partial(at, row) for row in points.unbind(0)], leaves)
        rows: list[list[float]] = points.tolist()
        return _replayed([partial(at_numbers, row) for row in rows], leaves)

    batched = vmap(at, randomness="same")
    if torch.compiler.is_compiling():
        return torch.cat([batched(rows) for rows in points.split(chunk_size)])
    if chunk_size == 1:
        return one_by_one()
    state = RandomState.now(leaves)
    try:
        with without_vmap_warnings():
            return _replayed([partial(batched, rows) for rows in points.split(chunk_size)], leaves)
    except (ArgumentError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        state.restore()
    return one_by_one()


def default_chunk_size(leaves: Leaves, *data: Any) -> int:
    """Return how many points to evaluate at once: up to 64, of 262,144 entries in parameters and data together.

    `vmap` saves the overhead of small problems, and makes slower kernels (batched products, grouped convolutions) and
    activations that leave the cache of larger ones. Measured on one thread, alone and in chunks of 16: 0.54 and 0.08 ms
    a point with 3,400 entries, 1.4 and 0.6 ms of a small convolutional network with 11,000, but 1.5 and 2.6 ms with
    71,000, 13 and 42 ms of a convolutional network with 155,000. So fewer than 8 become one.
    """
    entries = sum(tensor.numel() for tensor in (*leaves, *tree.tensors_in(data)))
    size = min(64, 2**18 // max(1, entries))
    return size if size >= 8 else 1


def _replayed(evaluations: Sequence[Callable[[], Tensor]], leaves: Leaves) -> Tensor:
    """Return the results in one tensor; all evaluations draw the same random numbers."""
    state = RandomState.now(leaves)
    after: RandomState | None = None
    parts = []
    for evaluate in evaluations:
        if after is not None:
            state.restore()
        parts.append(torch.atleast_1d(evaluate()))
        after = after or RandomState.now(leaves)
    assert after is not None
    after.restore()
    return torch.cat(parts)


def _moved_by_tensors(leaves: Leaves, directions: Sequence[Leaves], point: Tensor) -> Leaves:
    for direction, number in zip(directions, point.unbind(-1), strict=True):
        leaves = tuple(
            leaf + number.to(leaf) * along for leaf, along in zip(leaves, direction, strict=True)
        )
    return leaves


def _moved_by_numbers(leaves: Leaves, directions: Sequence[Leaves], point: list[float]) -> Leaves:
    for direction, number in zip(directions, point, strict=True):
        leaves = tuple(
            torch.add(leaf, along, alpha=number)
            for leaf, along in zip(leaves, direction, strict=True)
        )
    return leaves


def _checked_directions(directions: Any, params: Tree) -> list[Leaves]:
    where = "loss_surface"
    if not isinstance(directions, (list, tuple)):
        raise ArgumentTypeError(
            message(
                where,
                f"directions must be a list or a tuple of trees like params, got {type(directions).__name__}",
                "Put a single direction into a list",
            )
        )
    if not directions:
        raise ArgumentError(message(where, "directions is empty", "Give at least one direction"))
    for index, direction in enumerate(directions):
        check_like(direction, params, where, name=f"directions[{index}]")
    return [tuple(tree.flatten(direction)[0]) for direction in directions]


def _checked_coordinates(coordinates: Any, count: int) -> Tensor:
    where = "loss_surface"
    if not isinstance(coordinates, Tensor):
        problem = f"coordinates must be a tensor, got {type(coordinates).__name__}"
        raise ArgumentTypeError(message(where, problem))
    if coordinates.is_complex() or coordinates.dtype == torch.bool:
        raise ArgumentError(
            message(where, f"coordinates must be real numbers, got {coordinates.dtype}")
        )
    if coordinates.ndim == 0 or coordinates.shape[-1] != count:
        raise ArgumentError(
            message(
                where,
                "coordinates must have one number for each direction along the last axis. "
                f"Expected shape (..., {count}), got {tuple(coordinates.shape)}",
                "Make them with torch.stack(torch.meshgrid(..., indexing='ij'), -1), for one direction with x[:, None]",
            )
        )
    return coordinates
