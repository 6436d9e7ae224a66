"""Parameters as one vector and back, and choices of them, with the signatures of `torch_secorder.core.utils`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from secorder_func.compat._arguments import check_model
from secorder_func.errors import ArgumentError, ArgumentTypeError, message

__all__ = [
    "flatten_params",
    "get_param_shapes",
    "get_params_by_module_type",
    "get_params_by_name_pattern",
    "unflatten_params",
]


def flatten_params(params: Iterable[Tensor]) -> Tensor:
    """Return all entries as one new 1-D tensor, parameter after parameter.

    Parameters
    ----------
    params
        One tensor or more, of any shapes and strides. Different dtypes are promoted as `torch.cat` does.

    Returns
    -------
    Tensor
        Carries the history of `params`.

    Raises
    ------
    ArgumentError
        There is no tensor.
    ArgumentTypeError
        Not an iterable of tensors.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.utils import flatten_params
    >>> flatten_params([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)])
    tensor([1., 2., 3.])
    """
    leaves = _tensors(params, "flatten_params")
    if not leaves:
        raise ArgumentError(
            message("flatten_params", "params is empty", "Pass list(model.parameters())")
        )
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def unflatten_params(flat_params: Tensor, param_shapes: list[torch.Size]) -> list[Tensor]:
    """Return the pieces of a 1-D tensor as views of these shapes; the inverse of `flatten_params`.

    Parameters
    ----------
    flat_params
        As many entries as the shapes have together.
    param_shapes
        `torch.Size` or tuples or lists of numbers.

    Returns
    -------
    list of Tensor
        Views: they share memory and history with `flat_params`.

    Raises
    ------
    ArgumentError
        Not 1-D, too few or too many entries, a negative size.
    ArgumentTypeError
        Not a tensor; not a list of shapes.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.utils import unflatten_params
    >>> unflatten_params(torch.tensor([1.0, 2.0, 3.0]), [(1, 2), ()])
    [tensor([[1., 2.]]), tensor(3.)]
    """
    where = "unflatten_params"
    if not isinstance(flat_params, Tensor):
        raise ArgumentTypeError(
            message(where, f"flat_params must be a tensor, got {type(flat_params).__name__}")
        )
    shapes = _shapes(param_shapes, where)
    sizes = [math.prod(shape) for shape in shapes]
    if flat_params.ndim != 1 or flat_params.numel() != sum(sizes):
        raise ArgumentError(
            message(
                where,
                f"flat_params must have shape ({sum(sizes)},) for {len(shapes)} shapes, "
                f"got {tuple(flat_params.shape)}",
                "Take both from the same parameters: flatten_params(params), get_param_shapes(params)",
            )
        )
    pieces, offset = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        pieces.append(flat_params[offset : offset + size].view(shape))
        offset += size
    return pieces


def get_param_shapes(params: Iterable[Tensor]) -> list[torch.Size]:
    """Return the shape of each parameter.

    Raises
    ------
    ArgumentTypeError
        Not an iterable of tensors.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.utils import get_param_shapes
    >>> get_param_shapes(torch.nn.Linear(2, 3).parameters())
    [torch.Size([3, 2]), torch.Size([3])]
    """
    return [leaf.shape for leaf in _tensors(params, "get_param_shapes")]


def get_params_by_module_type(
    model: Module, module_type: type | list[type] | tuple[type, ...]
) -> dict[str, list[Tensor]]:
    """Return the parameters of every module of some types, by the module's name.

    Parameters
    ----------
    model
        It is looked through as by `named_modules`: itself too, under the name `""`.
    module_type
        A class of modules, or a list or tuple of classes.

    Returns
    -------
    dict of str to list of Tensor
        All parameters of a module, with those of the modules inside it. Where both are asked for, a parameter is in
        both lists.

    Raises
    ------
    ArgumentTypeError
        `model` is no module, `module_type` no class.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.utils import get_params_by_module_type
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> {name: len(params) for name, params in get_params_by_module_type(model, torch.nn.Linear).items()}
    {'0': 2, '2': 2}
    """
    return modules_params(model, module_type, "get_params_by_module_type", "module_type")


def get_params_by_name_pattern(model: Module, pattern: str) -> list[Tensor]:
    """Return the parameters in whose name a regular expression is found.

    Raises
    ------
    ArgumentError
        The pattern is no regular expression.
    ArgumentTypeError
        `model` is no module, `pattern` no string.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.utils import get_params_by_name_pattern
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> [tuple(p.shape) for p in get_params_by_name_pattern(model, "weight$")]
    [(3, 2), (1, 3)]
    """
    where = "get_params_by_name_pattern"
    check_model(model, where)
    try:
        search = re.compile(pattern).search
    except re.error as error:
        problem = f"pattern {pattern!r} is no regular expression: {error}"
        raise ArgumentError(message(where, problem, "Escape names with re.escape")) from error
    except TypeError as error:
        problem = f"pattern must be a string, got {type(pattern).__name__}"
        raise ArgumentTypeError(message(where, problem)) from error
    return [param for name, param in model.named_parameters() if search(name)]


def modules_params(model: Any, types: Any, where: str, name: str) -> dict[str, list[Tensor]]:
    """Return the parameters by module for the public function `where`, whose argument `name` the types are."""
    check_model(model, where)
    kinds = tuple(types) if isinstance(types, list) else types
    try:
        return {
            module_name: list(module.parameters())
            for module_name, module in model.named_modules()
            if isinstance(module, kinds)
        }
    except TypeError as error:
        problem = f"{name} must be a class or a list of classes, got {types!r}"
        raise ArgumentTypeError(message(where, problem, "Pass [torch.nn.Linear], say")) from error


def _tensors(params: Any, where: str) -> list[Tensor]:
    mend = "Pass list(model.parameters())"
    scalar = isinstance(params, Tensor) and params.ndim == 0
    if scalar or isinstance(params, (dict, str)) or not isinstance(params, Iterable):
        given = "a 0-dim tensor" if scalar else type(params).__name__
        raise ArgumentTypeError(
            message(where, f"params must be a list of tensors, got {given}", mend)
        )
    leaves = list(params)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            problem = f"params[{index}] must be a tensor, got {type(leaf).__name__}"
            raise ArgumentTypeError(message(where, problem, mend))
    return leaves


def _shapes(shapes: Any, where: str) -> list[tuple[int, ...]]:
    try:
        found = [tuple(int(size) for size in shape) for shape in shapes]
    except TypeError as error:
        raise ArgumentTypeError(
            message(
                where,
                f"param_shapes must be a list of shapes, got {shapes!r}",
                "Pass get_param_shapes(params)",
            )
        ) from error
    for index, shape in enumerate(found):
        if any(size < 0 for size in shape):
            raise ArgumentError(
                message(where, f"param_shapes[{index}] has a negative size: {shape}")
            )
    return found
