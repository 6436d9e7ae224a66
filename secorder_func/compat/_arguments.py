"""The documented forms of `params` and `v`, and the form of the result that goes with each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from secorder_func.checks import check_callable
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.inference import without_inference_tensors

__all__ = [
    "Leaves",
    "Vector",
    "check_func",
    "check_model",
    "checked_cotangent",
    "checked_cotangents",
    "checked_params",
    "checked_stack",
    "checked_vector",
    "model_parameters",
    "require_gradients",
    "with_frozen",
]

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class Vector:
    """A vector as one tensor for each parameter, and how to return a result of its form."""

    leaves: Leaves
    restore: Callable[[Leaves], Tensor | list[Tensor]]


def checked_params(params: Any, where: str) -> Leaves:
    """Return the parameters as a tuple; refuse what is no list of distinct floating tensors."""
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, dict) or not isinstance(params, Iterable):
        given = type(params).__name__
        _refuse_type(
            where, f"params must be a list of tensors, got {given}", "Pass list(model.parameters())"
        )
    leaves = tuple(params)
    if not leaves:
        _refuse(where, "params is empty", "Pass list(model.parameters())")
    places: dict[int, int] = {}
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            _refuse_type(where, f"params[{index}] must be a tensor, got {type(leaf).__name__}")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            _refuse(where, f"params[{index}] must be floating or complex, got {leaf.dtype}")
        if id(leaf) in places:
            _refuse(
                where,
                f"params[{index}] is the same tensor as params[{places[id(leaf)]}]",
                "List each parameter once; model.parameters() yields tied parameters once",
            )
        places[id(leaf)] = index
    return leaves


def check_func(func: Any, where: str) -> None:
    """Refuse what is no closure."""
    check_callable(
        func, where, name="func", mend="Pass the closure that computes the loss, not its value"
    )


def check_model(model: Any, where: str) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        _refuse_type(where, f"model must be a torch.nn.Module, got {type(model).__name__}")


def model_parameters(model: Any, where: str) -> Leaves:
    """Return the parameters of a module; refuse what is no module."""
    check_model(model, where)
    return checked_params(model.parameters(), where)


def require_gradients(params: Leaves, where: str) -> None:
    """Refuse parameters that are constants to autograd."""
    for index, leaf in enumerate(params):
        if not leaf.requires_grad:
            _refuse(
                where,
                f"params[{index}] has requires_grad=False",
                "Leave it out of params, or call requires_grad_() on it",
            )


def with_frozen(found: Iterable[Tensor], params: Leaves) -> Leaves:
    """Return what was found for the parameters that require gradients, with zeros for the frozen ones between."""
    rest = iter(found)
    return tuple(next(rest) if p.requires_grad else torch.zeros_like(p) for p in params)


def checked_vector(v: Any, params: Leaves, where: str, name: str = "v") -> Vector:
    """Return `v`, a tensor, a flat tensor or a list, as one tensor for each parameter."""
    v = without_inference_tensors(v)
    if isinstance(v, Tensor):
        if len(params) == 1 and v.shape == params[0].shape:
            _check_leaf(v, params[0], f"{name}", where)
            return Vector((v,), lambda leaves: leaves[0])
        return _flat_vector(v, params, where, name)
    if isinstance(v, dict) or not isinstance(v, Iterable):
        given = type(v).__name__
        _refuse_type(
            where, f"{name} must be a tensor or a list of tensors, got {given}", _mend(name)
        )
    leaves = tuple(v)
    if len(leaves) != len(params):
        _refuse(
            where,
            f"{name} must have one tensor for each parameter. Expected {len(params)}, got {len(leaves)}",
            _mend(name),
        )
    for index, (leaf, param) in enumerate(zip(leaves, params, strict=True)):
        if not isinstance(leaf, Tensor):
            _refuse_type(
                where, f"{name}[{index}] must be a tensor, got {type(leaf).__name__}", _mend(name)
            )
        _check_leaf(leaf, param, f"{name}[{index}]", where)
    return Vector(leaves, list)


def checked_stack(vs: Any, params: Leaves, where: str) -> Leaves:
    """Return a batch of vectors, in any of the documented forms, as `(batch, *p.shape)` for each parameter."""
    tensors = [vs] if isinstance(vs, Tensor) else vs
    if isinstance(tensors, dict) or not isinstance(tensors, Iterable):
        given = type(vs).__name__
        _refuse_type(where, f"vs must be a tensor or a list of tensors, got {given}", _BATCH)
    tensors = list(tensors)
    counts = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            _refuse_type(
                where, f"vs[{index}] must be a tensor, got {type(tensor).__name__}", _BATCH
            )
        if tensor.ndim == 0:
            _refuse(where, f"vs[{index}] must have a leading axis, the batch, got a scalar", _BATCH)
        counts.append(tensor.shape[0])
    if len(set(counts)) > 1:
        _refuse(where, f"vs must have one batch size. Got {counts}", _BATCH)
    count = counts[0] if counts else 0

    # Every row is checked as one vector: the first, or zeros where the batch is empty.
    rows = [t[0] if count else t.new_zeros(t.shape[1:]) for t in tensors]
    checked_vector(rows[0] if isinstance(vs, Tensor) else rows, params, where, _EACH)
    if isinstance(vs, Tensor) and not (len(params) == 1 and rows[0].shape == params[0].shape):
        tensors = list(vs.split([p.numel() for p in params], dim=1))
    return tuple(
        tensor.reshape(count, *p.shape).to(p) for tensor, p in zip(tensors, params, strict=True)
    )


def checked_cotangent(v: Any, output: Tensor, where: str) -> Tensor:
    """Return `v` in the shape of the output; refuse what has not as many entries."""
    return _checked_cotangents(v, output, (), "v", where)


def checked_cotangents(vs: Any, output: Tensor, where: str) -> Tensor:
    """Return `vs` as `(batch, *output.shape)`; refuse rows that have not as many entries as the output."""
    if isinstance(vs, Tensor) and vs.ndim == 0:
        _refuse(where, "vs must have a leading axis, the batch, got a scalar", _COTANGENTS)
    batch = tuple(vs.shape[:1]) if isinstance(vs, Tensor) else ()
    return _checked_cotangents(vs, output, batch, "vs", where)


def _checked_cotangents(
    v: Any, output: Tensor, batch: tuple[int, ...], name: str, where: str
) -> Tensor:
    mend = _COTANGENTS if batch else "Build it with torch.randn_like(output)"
    if not isinstance(v, Tensor):
        _refuse_type(where, f"{name} must be a tensor, got {type(v).__name__}", mend)
    shape = (*batch, *output.shape)
    if v.numel() != torch.Size(shape).numel():
        problem = f"{name} must match the output. Expected shape {shape}, got {tuple(v.shape)}"
        _refuse(where, problem, mend)
    if v.is_complex() and not output.is_complex():
        problem = f"{name} must be real like the output, got {v.dtype}"
        _refuse(where, problem, "Pass its real part")
    _check_device(v, output.device, name, where, like="the output")
    return without_inference_tensors(v).reshape(shape).to(output.dtype)  # type: ignore[no-any-return]


_EACH = "each of vs"
_BATCH = "Build vs with [torch.randn(batch, *p.shape) for p in params], or flat, (batch, n)"
_COTANGENTS = "Build vs with torch.randn(batch, *output.shape)"


def _flat_vector(v: Tensor, params: Leaves, where: str, name: str) -> Vector:
    sizes = [param.numel() for param in params]
    if v.ndim != 1 or v.numel() != sum(sizes):
        shapes = [tuple(param.shape) for param in params]
        expected = (
            f"shape {shapes[0]} or ({sizes[0]},)" if len(params) == 1 else f"shape ({sum(sizes)},)"
        )
        _refuse(
            where,
            f"{name} is one tensor and must match params of shapes {shapes}. "
            f"Expected {expected}, got {tuple(v.shape)}",
            _mend(name),
        )
    dtype = params[0].dtype
    for param in params[1:]:
        dtype = torch.promote_types(dtype, param.dtype)
    _check_kind(v, dtype, params[0].device, name, where)
    if v.is_complex() and not all(param.is_complex() for param in params):
        problem = f"{name} is one complex tensor, and some of params are real"
        _refuse(where, problem, "Pass a list with one tensor for each parameter")
    leaves = tuple(
        piece.reshape(param.shape).to(param)
        for piece, param in zip(v.split(sizes), params, strict=True)
    )

    def restore(leaves: Leaves) -> Tensor:
        return torch.cat([leaf.reshape(-1).to(v) for leaf in leaves])

    return Vector(leaves, restore)


def _check_leaf(leaf: Tensor, param: Tensor, name: str, where: str) -> None:
    if leaf.shape != param.shape:
        problem = f"{name} must match its parameter. Expected shape {tuple(param.shape)}, got {tuple(leaf.shape)}"
        _refuse(where, problem, _mend(name.partition("[")[0]))
    _check_kind(leaf, param.dtype, param.device, name, where)


def _check_kind(
    leaf: Tensor, dtype: torch.dtype, device: torch.device, name: str, where: str
) -> None:
    if leaf.dtype != dtype:
        problem = f"{name} must match params. Expected dtype {dtype}, got {leaf.dtype}"
        _refuse(where, problem, f"Convert it with {name}.to({dtype})")
    _check_device(leaf, device, name, where)


def _check_device(
    tensor: Tensor, device: torch.device, name: str, where: str, like: str = "params"
) -> None:
    if tensor.device != device:
        problem = f"{name} must match {like}. Expected device {device}, got {tensor.device}"
        _refuse(where, problem, f"Move it with {name}.to({str(device)!r})")


def _mend(name: str) -> str:
    if name.startswith(_EACH):
        return _BATCH
    return f"Build {name} with [torch.randn_like(p) for p in params], or flat with parameters_to_vector"


def _refuse(where: str, problem: str, mend: str = "") -> NoReturn:
    raise ArgumentError(message(where, problem, mend))


def _refuse_type(where: str, problem: str, mend: str = "") -> NoReturn:
    raise ArgumentTypeError(message(where, problem, mend))
