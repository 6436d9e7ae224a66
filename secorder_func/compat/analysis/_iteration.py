"""The user's product for an iteration on flat vectors: of what dtype and on what device, and what to say at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.checks import check_count, check_number
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    message,
    warn_user,
)

__all__ = ["check_iteration", "check_pairs", "checked_device", "solved", "warn_if_unfinished"]

Product = Callable[[Tensor], Any]
Solver = Callable[[Product, Tensor], Eigenpairs]


def check_iteration(num_iterations: Any, tol: Any, where: str) -> None:
    """Refuse bad limits of an iteration."""
    check_count(num_iterations, where, name="num_iterations")
    check_number(tol, where, name="tol")
    if not tol >= 0:
        raise ArgumentError(message(where, f"tol must be at least 0, got {tol}"))


def check_pairs(
    count: Any, dim: int, where: str, *, name: str, steps: int | None = None, of: str = "dim"
) -> None:
    """Refuse more pairs than rows, or than steps of an iteration that finds one pair a step."""
    check_count(count, where, name=name)
    if count > dim:
        raise ArgumentError(message(where, f"{name} must be at most {of}, {dim}, got {count}"))
    if steps is not None and steps < count:
        problem = f"num_iterations must be at least {name}, got {steps} and {count}"
        raise ArgumentError(message(where, problem))


def checked_device(device: Any, where: str) -> torch.device | None:
    """Return the device of a device, a name or a number; None for None."""
    if device is None:
        return None
    if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
        problem = f"device must be a torch.device or its name, got {device!r}"
        raise ArgumentTypeError(message(where, problem))
    return torch.device(device)


def solved(product: Product, shape: tuple[int, ...], device: Any, solve: Solver) -> Eigenpairs:
    """Solve with the first dtype and device with which the product can be made.

    The start is drawn once, as `torch.randn(shape)` draws it, and no product that works is made twice.
    """
    kinds = _kinds(device)
    drawn = torch.randn(shape, dtype=kinds[0][0], device=kinds[0][1])
    first_error: Exception | None = None
    for dtype, place in kinds:
        tried = _Tried(product)
        try:
            return solve(tried, drawn.to(dtype=dtype, device=place))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            if tried.works:
                raise
            first_error = first_error or error
    assert first_error is not None
    raise first_error


class _Tried:
    """A product that remembers whether it ever worked, on the device of its vectors."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.works = False

    def __call__(self, vector: Tensor) -> Any:
        result = self.product(vector)
        self.works = not isinstance(result, Tensor) or result.device == vector.device
        return result


def _kinds(device: torch.device | None) -> list[tuple[torch.dtype, torch.device]]:
    """Return the dtypes and devices to try in order: the usual ones, the other dtype, the other device."""
    default = torch.get_default_dtype()
    others = [d for d in (torch.float64, torch.float32) if d != default]
    places = [torch.device("cpu")] if device is None else [device]
    if device is None and torch.cuda.is_available():
        places.insert(0, torch.device("cuda"))
    return [(dtype, place) for place in places for dtype in (default, *others[:1])]


def warn_if_unfinished(
    found: Eigenpairs, num_iterations: int, tol: float, where: str, mend: str
) -> None:
    """Warn if a residual is above the tolerance."""
    if found.converged:
        return
    worst, largest = float(found.residual_norms.max()), float(found.eigenvalues.abs().max())
    warn_user(
        message(
            where,
            f"not converged in {num_iterations} iterations: a residual |A x - theta x| is {worst:.2g} where the "
            f"largest eigenvalue is {largest:.2g} and tol {float(tol):.2g}",
            mend,
        ),
        ConvergenceWarning,
    )
