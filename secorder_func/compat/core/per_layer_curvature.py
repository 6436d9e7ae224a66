"""Curvature layer by layer, with the signatures of `torch_secorder.core.per_layer_curvature`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d, Linear, Module

from secorder_func.checks import check_callable
from secorder_func.compat._arguments import checked_params
from secorder_func.compat._closure import hessian_diagonal_of
from secorder_func.compat._gradient import (
    check_real,
    closure_gradient,
    freed,
    traceable,
)
from secorder_func.compat._visibility import NoDependenceError
from secorder_func.compat.core.utils import modules_params
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.transforms.plain_autograd import recording

__all__ = ["get_layer_curvature_stats", "per_layer_fisher_diagonal", "per_layer_hessian_diagonal"]


def per_layer_hessian_diagonal(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    layer_types: list[type] | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    r"""Return the exact diagonal of the Hessian of `loss_fn(model(inputs), targets)` for each layer.

    Parameters
    ----------
    model
        Any module.
    loss_fn
        `loss_fn(output, targets) -> loss` with one element; sum or mean is its choice.
    inputs, targets
        Input and target.
    layer_types
        Which modules are layers; `Linear` and `Conv2d` if None. A layer may contain others.
    create_graph
        Whether the diagonals can be differentiated again.

    Returns
    -------
    dict of str to Tensor
        For each layer, by its name in `model.named_modules()`, one 1-D tensor: the entries for its parameters, frozen
        ones too, in their order. Zeros for what the loss does not use; an empty tensor for a layer without parameters.

    Raises
    ------
    ArgumentError, NoExactRouteError
        As for `exact_hvp`.

    Notes
    -----
    Costs one product for every entry of the layers, with the block of its parameter alone, in vectorised chunks; the
    loss is evaluated once. Frozen parameters of a layer require gradients while the function runs, also for other
    threads.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.per_layer_curvature import per_layer_hessian_diagonal
    >>> model, x, y = torch.nn.Sequential(torch.nn.Linear(2, 1)), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> per_layer_hessian_diagonal(model, torch.nn.MSELoss(), x, y)
    {'0': tensor([2., 8., 2.])}
    """
    where = "per_layer_hessian_diagonal"
    layers = _layers(model, loss_fn, layer_types, where)
    inputs, targets = without_inference_tensors((inputs, targets))
    params = _distinct(layers)
    if not params:
        return {name: _nothing(model) for name in layers}
    with freed(params), recording():
        try:
            found = hessian_diagonal_of(
                lambda: loss_fn(model(inputs), targets),
                params,
                create_graph=create_graph,
                where=where,
            )
        except NoDependenceError:
            found = tuple(_zeros(p, create_graph) for p in params)
        return _by_layer(layers, params, found, model)


def per_layer_fisher_diagonal(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    layer_types: list[type] | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    r"""Return the squared gradient of `loss_fn(model(inputs), targets)` for each layer.

    Arguments, results and errors are as for `per_layer_hessian_diagonal`.

    Notes
    -----
    For a mean loss it is the square of the mean gradient, not the mean of the squares of the gradients of the samples;
    see `empirical_fisher_diagonal`. Costs one gradient for all layers together.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.per_layer_curvature import per_layer_fisher_diagonal
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = torch.nn.init.ones_(model[0].weight)
    >>> per_layer_fisher_diagonal(model, torch.nn.MSELoss(), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
    {'0': tensor([ 36., 144.])}
    """
    where = "per_layer_fisher_diagonal"
    layers = _layers(model, loss_fn, layer_types, where)
    inputs, targets = without_inference_tensors((inputs, targets))
    params = _distinct(layers)
    if not params:
        return {name: _nothing(model) for name in layers}
    with freed(params), recording():
        try:
            gradient = closure_gradient(
                lambda: loss_fn(model(inputs), targets), params, where, create_graph=create_graph
            )
        except NoDependenceError:
            gradient = tuple(_zeros(p, create_graph) for p in params)
        return _by_layer(layers, params, tuple(g.square() for g in gradient), model)


def get_layer_curvature_stats(layer_curvatures: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return mean, standard deviation, maximum and minimum of each layer's entries.

    Parameters
    ----------
    layer_curvatures
        Layer names to floating tensors of any shape, as the other functions of this module return them.

    Returns
    -------
    dict of str to dict of str to float
        `mean`, `std` (with divisor n - 1), `max` and `min`. `std` of one entry is NaN, and so are all four of none.

    Raises
    ------
    ArgumentError
        A tensor is not real and floating.
    ArgumentTypeError
        Not a dict of tensors.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.per_layer_curvature import get_layer_curvature_stats
    >>> get_layer_curvature_stats({"layer": torch.tensor([1.0, 2.0, 3.0])})
    {'layer': {'mean': 2.0, 'std': 1.0, 'max': 3.0, 'min': 1.0}}
    """
    where = "get_layer_curvature_stats"
    layers: Any = layer_curvatures
    if not isinstance(layers, Mapping):
        given = type(layers).__name__
        problem = f"layer_curvatures must be a dict of names to tensors, got {given}"
        raise ArgumentTypeError(message(where, problem))
    return {name: _statistics(name, entries, where) for name, entries in layers.items()}


def _statistics(name: str, entries: Any, where: str) -> dict[str, float]:
    if not isinstance(entries, Tensor):
        problem = f"layer {name!r} must have a tensor, got {type(entries).__name__}"
        raise ArgumentTypeError(message(where, problem))
    if not entries.is_floating_point():
        problem = f"the entries of layer {name!r} must be real and floating, got {entries.dtype}"
        raise ArgumentError(message(where, problem))
    if not entries.numel():
        return dict.fromkeys(("mean", "std", "max", "min"), math.nan)
    entries = entries.detach()
    entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
    low, high = torch.aminmax(entries)
    # Not torch.std_mean, which is ten times as slow on the CPU; std of one entry warns.
    std = entries.std() if entries.numel() > 1 else torch.full_like(low, math.nan)
    values = torch.stack([entries.mean(), std, high, low]).tolist()  # the one wait for the device
    return dict(zip(("mean", "std", "max", "min"), values, strict=True))


def _layers(
    model: Module, loss_fn: object, layer_types: list[type] | None, where: str
) -> dict[str, list[Tensor]]:
    check_callable(loss_fn, where, name="loss_fn")
    types = [Linear, Conv2d] if layer_types is None else layer_types
    layers = modules_params(model, types, where, "layer_types")
    params = _distinct(layers)
    if params:
        check_real(checked_params(params, where), where)
    return layers


def _distinct(layers: dict[str, list[Tensor]]) -> tuple[Tensor, ...]:
    return tuple({id(p): p for found in layers.values() for p in found}.values())


def _zeros(param: Tensor, create_graph: bool) -> Tensor:
    zeros = torch.zeros_like(param)
    return traceable(zeros, param) if create_graph else zeros


def _by_layer(
    layers: dict[str, list[Tensor]],
    params: tuple[Tensor, ...],
    entries: tuple[Tensor, ...],
    model: Module,
) -> dict[str, Tensor]:
    """Return for each layer the entries of its parameters, in one flat tensor."""
    of = {id(p): e.reshape(-1) for p, e in zip(params, entries, strict=True)}
    return {
        name: torch.cat([of[id(p)] for p in found]) if found else _nothing(model)
        for name, found in layers.items()
    }


def _nothing(model: Module) -> Tensor:
    like = next(model.parameters(), torch.empty(0))
    return torch.empty(0, dtype=like.dtype, device=like.device)
