"""Loss surfaces along directions, with the signatures of `torch_secorder.analysis.landscape`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from secorder_func.checks import check_callable, check_number
from secorder_func.compat._arguments import checked_vector, model_parameters
from secorder_func.compat._surface import closure_surface
from secorder_func.errors import ArgumentError, ArgumentTypeError, message

__all__ = ["compute_loss_surface_1d", "compute_loss_surface_2d", "create_random_direction"]


def compute_loss_surface_1d(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction: list[Tensor],
    alpha_range: tuple[float, float] = (-1.0, 1.0),
    num_points: int = 50,
) -> tuple[Tensor, Tensor]:
    """Return `(alphas, losses)`: the loss `loss_fn(model(inputs), targets)` at parameters + alpha * direction.

    Parameters
    ----------
    model
        Any module. All of its parameters move, frozen ones too.
    loss_fn
        `loss_fn(output, targets) -> loss` with one element.
    inputs, targets
        Arguments of the model and of the loss.
    direction
        A list like `model.parameters()`.
    alpha_range, num_points
        First and last alpha, and how many.

    Returns
    -------
    alphas : Tensor
        `(num_points,)`, evenly spaced, in torch's default dtype, on the CPU.
    losses : Tensor
        `(num_points,)`, on the CPU, in the dtype of the loss, or the default dtype if that is wider.

    Raises
    ------
    ArgumentError
        A bad argument or a loss that is not one real number; both a `ValueError` and a `RuntimeError`.

    Notes
    -----
    The model is not changed, also when the loss raises: parameters are exchanged, buffers (running
    statistics) are written to in copies. All points see the same dropout mask. Small models on small
    data are evaluated up to 64 points at once. A parameter that cannot be exchanged (in a ScriptModule, say)
    holds other data during an evaluation, with a `CurvatureFallbackWarning`. See `secorder_func.loss_surface`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.landscape import compute_loss_surface_1d
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
    >>> compute_loss_surface_1d(model, torch.nn.MSELoss(), x, y, [torch.ones(1, 1)], (0.0, 2.0), 3)
    (tensor([0., 1., 2.]), tensor([0., 1., 4.]))
    """
    where = "compute_loss_surface_1d"
    alphas = _spaced(alpha_range, num_points, "alpha_range", where)
    losses = _surface(
        model, loss_fn, inputs, targets, {"direction": direction}, alphas[:, None], where
    )
    return alphas, losses


def compute_loss_surface_2d(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    direction1: list[Tensor],
    direction2: list[Tensor],
    alpha_range: tuple[float, float] = (-1.0, 1.0),
    beta_range: tuple[float, float] = (-1.0, 1.0),
    num_points: int = 25,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(alphas, betas, losses)`: the loss at parameters + alpha * direction1 + beta * direction2.

    Parameters
    ----------
    model, loss_fn, inputs, targets
        As for `compute_loss_surface_1d`.
    direction1, direction2
        Lists like `model.parameters()`.
    alpha_range, beta_range, num_points
        First and last alpha and beta, and how many of each.

    Returns
    -------
    alphas, betas : Tensor
        `(num_points,)` each, as for `compute_loss_surface_1d`.
    losses : Tensor
        `(num_points, num_points)`; `losses[i, j]` belongs to `alphas[i]` and `betas[j]`.

    Raises
    ------
    ArgumentError
        As for `compute_loss_surface_1d`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.landscape import compute_loss_surface_2d
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> first, second = [torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]
    >>> compute_loss_surface_2d(model, torch.nn.MSELoss(), x, y, first, second, num_points=3)[2]
    tensor([[9., 1., 1.],
            [4., 0., 4.],
            [1., 1., 9.]])
    """
    where = "compute_loss_surface_2d"
    alphas = _spaced(alpha_range, num_points, "alpha_range", where)
    betas = _spaced(beta_range, num_points, "beta_range", where)
    points = torch.stack(torch.meshgrid(alphas, betas, indexing="ij"), -1).reshape(-1, 2)
    directions = {"direction1": direction1, "direction2": direction2}
    losses = _surface(model, loss_fn, inputs, targets, directions, points, where)
    return alphas, betas, losses.reshape(num_points, num_points)


def create_random_direction(model: Module) -> list[Tensor]:
    """Return a random direction: for each parameter standard normal entries, scaled to norm 1.

    It is drawn from torch's global generator, and a seed gives the package's numbers. Filter-normalised directions are
    `secorder_func.random_direction`'s.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.analysis.landscape import create_random_direction
    >>> [d.shape for d in create_random_direction(torch.nn.Linear(3, 2))]
    [torch.Size([2, 3]), torch.Size([2])]
    """
    direction = []
    for p in model_parameters(model, "create_random_direction"):
        d = torch.randn_like(p, requires_grad=False)
        length = torch.linalg.vector_norm(d)
        direction.append(d / torch.where(length > 0, length, torch.ones_like(length)))
    return direction


def _surface(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    directions: dict[str, Any],
    points: Tensor,
    where: str,
) -> Tensor:
    params = model_parameters(model, where)
    model = getattr(
        model, "_orig_mod", model
    )  # a compiled module's parameters are constants of its code
    check_callable(loss_fn, where, name="loss_fn")
    along = [
        checked_vector(direction, params, where, name).leaves
        for name, direction in directions.items()
    ]
    losses = closure_surface(
        lambda: loss_fn(model(inputs), targets),
        params,
        along,
        points,
        where,
        data=(inputs, targets),
        aside=_scripted(model, params),
    )
    return losses.to("cpu", torch.promote_types(losses.dtype, torch.get_default_dtype()))


def _scripted(model: Module, params: Sequence[Tensor]) -> list[int]:
    """Return which parameters are in a ScriptModule, whose functions no exchange reaches."""
    inside = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.jit.ScriptModule)
        for p in module.parameters()
    }
    return [index for index, p in enumerate(params) if id(p) in inside]


def _spaced(ends: Any, count: Any, name: str, where: str) -> Tensor:
    if isinstance(count, bool) or not isinstance(count, int):
        problem = f"num_points must be a whole number, got {count!r}"
        raise ArgumentTypeError(message(where, problem))
    if count < 0:
        raise ArgumentError(message(where, f"num_points must not be negative, got {count}"))
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        problem = f"{name} must be a pair of numbers, got {ends!r}"
        raise ArgumentTypeError(message(where, problem, "Pass (first, last)"))
    for index, end in enumerate(ends):
        check_number(end, where, name=f"{name}[{index}]")
    return torch.linspace(float(ends[0]), float(ends[1]), count)
