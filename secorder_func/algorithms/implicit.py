"""The derivative of a solution by the implicit function theorem: another solve, no unrolled iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from secorder_func.errors import message

__all__ = ["implicit_solution"]


def implicit_solution(x: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `x`, differentiable.

    From `A(t) x = b(t)` follows `dx = A^-1 (db - dA x)`. That is `A^-1` of the derivative of the residual with `x`
    fixed, so that the operator's own graph of one product finds whatever `t` the operator depends on.

    Parameters
    ----------
    x
        The solution, without a graph.
    residual
        `b - A x`, with its graph; its value is not used.
    solve
        `A^-1`, symmetric, without a graph.
    """
    solution: Tensor = _Inverse.apply(residual, x, solve)  # type: ignore[no-untyped-call]
    return solution


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(residual: Tensor, x: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.solve = inputs[2]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            z: Tensor = ctx.solve(grad)
        if torch.is_grad_enabled():
            # The product was recorded at a fixed x: a second derivative would lack what x moves by.
            z = _OnceOnly.apply(z, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return z, None, None


class _OnceOnly(torch.autograd.Function):
    """The first argument; raises when differentiated."""

    @staticmethod
    def forward(z: Tensor, x: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        problem = "a solution can be differentiated once, not twice"
        mend = "Where second derivatives are needed, take torch.linalg.solve(op.dense(), b)"
        raise RuntimeError(message("cg and minres", problem, mend))
