"""Refusals of trees that are not what a function needs: where, expected, given, mend."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.typing import Tree

__all__ = [
    "check_callable",
    "check_count",
    "check_like",
    "check_number",
    "check_params",
    "check_positive",
    "check_tolerance",
    "refuse_sharded",
]


def check_callable(function: Any, where: str, *, name: str = "f", mend: str = "") -> None:
    """Refuse what cannot be called.

    >>> check_callable(3, "hvp")
    Traceback (most recent call last):
        ...
    secorder_func.errors.ArgumentTypeError: hvp: f must be a function, got int.
    """
    if not callable(function):
        problem = f"{name} must be a function, got {type(function).__name__}"
        raise ArgumentTypeError(message(where, problem, mend))


def check_count(count: Any, where: str, *, name: str) -> None:
    """Refuse what is no whole number from one on.

    >>> check_count(0, "hutchinson_trace", name="num_matvecs")
    Traceback (most recent call last):
        ...
    secorder_func.errors.ArgumentError: hutchinson_trace: num_matvecs must be at least 1, got 0.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        problem = f"{name} must be a whole number, got {count!r}"
        raise ArgumentTypeError(message(where, problem))
    if count < 1:
        raise ArgumentError(message(where, f"{name} must be at least 1, got {count}"))


def check_number(number: Any, where: str, *, name: str) -> None:
    """Refuse what is neither a real number nor a tensor with one.

    >>> check_number("1", "op.damped", name="damping")
    Traceback (most recent call last):
        ...
    secorder_func.errors.ArgumentTypeError: op.damped: damping must be a real number or a 0-dim tensor, got '1'.
    """
    one_real = isinstance(number, Tensor) and number.ndim == 0 and not number.is_complex()
    if not one_real and (isinstance(number, bool) or not isinstance(number, (int, float))):
        given = tuple(number.shape) if isinstance(number, Tensor) else repr(number)
        problem = f"{name} must be a real number or a 0-dim tensor, got {given}"
        raise ArgumentTypeError(message(where, problem))


def check_positive(number: Any, where: str, *, name: str) -> None:
    """Refuse what is no positive, finite number.

    >>> check_positive(0.0, "nystrom_preconditioner", name="damping")
    Traceback (most recent call last):
        ...
    secorder_func.errors.ArgumentError: nystrom_preconditioner: damping must be positive and finite, got 0.0.
    """
    check_number(number, where, name=name)
    if not 0 < float(number) < float("inf"):
        raise ArgumentError(message(where, f"{name} must be positive and finite, got {number}"))


def check_tolerance(number: Any, where: str, *, name: str) -> None:
    """Refuse what is no finite number from zero on.

    >>> check_tolerance(-1.0, "cg", name="rtol")
    Traceback (most recent call last):
        ...
    secorder_func.errors.ArgumentError: cg: rtol must be a number from 0 on, got -1.0.
    """
    check_number(number, where, name=name)
    if not 0 <= float(number) < float("inf"):
        raise ArgumentError(message(where, f"{name} must be a number from 0 on, got {number}"))


def check_params(params: Tree, /, where: str, *, name: str = "params") -> None:
    """Refuse a tree that cannot be differentiated with respect to.

    Raises
    ------
    TypeError
        A leaf is not a tensor.
    ValueError
        There is no leaf, or a leaf is neither of a floating nor of a complex dtype.
    """
    leaves, _ = tree.flatten(params)
    if not leaves:
        raise ValueError(message(where, f"{name} has no tensor in it", "Give it at least one leaf"))
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                message(
                    where,
                    f"every leaf of {name} must be a tensor. At {_place(params, index)} got "
                    f"{type(leaf).__name__}",
                    _mend_for_non_tensor(leaf, name),
                )
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(
                message(
                    where,
                    f"every leaf of {name} must be of a floating or complex dtype. "
                    f"At {_place(params, index)} got {leaf.dtype}",
                    "Pass what is not differentiated as a further argument of the function",
                )
            )


def refuse_sharded(params: Tree, where: str, *, name: str = "params") -> None:
    """Refuse DTensors: single products multiply them as they are, sums and probes of several processes do not."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return
    for index, leaf in enumerate(tree.flatten(params)[0]):
        if isinstance(leaf, module.DTensor):
            problem = (
                f"a leaf of {name} is a DTensor, sharded over processes. At {_place(params, index)}"
            )
            mend = (
                "Products take it (hvp, ggnvp, op @ v, inside implicit_replication()); for anything else gather it, "
                "leaf.full_tensor()"
            )
            raise ArgumentTypeError(message(where, problem, mend))


def check_like(
    v: Tree, params: Tree, /, where: str, *, name: str = "v", batched: bool = False
) -> None:
    """Refuse a `v` that is not a vector of the space of `params`.

    With `batched`, every leaf of `v` has one more leading axis, of one length for all leaves.

    Raises
    ------
    TypeError
        The structures differ or a leaf is not a tensor.
    ValueError
        A leaf has another shape, dtype or device.
    """
    mend = f"Build {name} with secorder_func.tree.random_like(params)"
    if batched:
        mend = f"Stack vectors with secorder_func.tree.stack([...]) to build {name}"
    v_leaves, leaves = tree.flatten(v)[0], tree.flatten(params)[0]
    v_spec, spec = tree.structure(v), tree.structure(params)
    if v_spec != spec:
        raise TypeError(
            message(
                where,
                f"{name} must have the structure of params. Expected {spec}, got {v_spec}",
                mend,
            )
        )
    rows = None
    for index, (got, like) in enumerate(zip(v_leaves, leaves, strict=True)):
        if got is like and not batched:
            continue
        if not isinstance(got, Tensor):
            problem = f"expected a tensor, got {type(got).__name__}"
            raise TypeError(_mismatch(where, name, params, index, problem, mend))
        shape = got.shape[1:] if batched and got.ndim else got.shape
        if shape != like.shape or (batched and not got.ndim):
            expected = (
                f"(k, {', '.join(str(n) for n in like.shape)})" if batched else tuple(like.shape)
            )
            problem = f"expected shape {expected}, got {tuple(got.shape)}"
            raise ValueError(_mismatch(where, name, params, index, problem, mend))
        if batched:
            rows = got.shape[0] if rows is None else rows
            if got.shape[0] != rows:
                problem = (
                    f"expected {rows} stacked vectors as in the leaf before, got {got.shape[0]}"
                )
                raise ValueError(_mismatch(where, name, params, index, problem, mend))
        for what in ("dtype", "device"):
            if getattr(got, what) != getattr(like, what):
                problem = f"expected {what} {getattr(like, what)}, got {getattr(got, what)}"
                target = like.dtype if what == "dtype" else repr(str(like.device))
                convert = f"Convert the leaf with .to({target})"
                raise ValueError(_mismatch(where, name, params, index, problem, convert))


def _mismatch(where: str, name: str, params: Tree, index: int, problem: str, mend: str) -> str:
    return message(where, f"{name} must match params. At {_place(params, index)} {problem}", mend)


def _place(where_in: Tree, index: int) -> str:
    return tree.paths(where_in)[index] or "the root"


def _mend_for_non_tensor(leaf: Any, name: str) -> str:
    if isinstance(leaf, torch.nn.Module):
        return "Take a module's parameters with dict(module.named_parameters()) or functional_loss"
    if isinstance(leaf, (bool, int, float, complex)):
        return f"Make it a tensor, or pass it as a further argument beside {name}"
    return "Register the class with optree.register_pytree_node if it holds tensors"
