"""Exact Hessian traces, by the diagonal, with the signatures of `torch_secorder.core.hessian_trace`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from secorder_func.compat._arguments import model_parameters
from secorder_func.compat.core.hessian_diagonal import diagonal
from secorder_func.transforms.plain_autograd import recording

__all__ = ["hessian_trace", "model_hessian_trace"]


def hessian_trace(
    func: Callable[[], Tensor],
    params: list[Tensor],
    num_samples: int = 1,
    create_graph: bool = False,
    strict: bool = False,
) -> Tensor:
    """Return the exact trace of the Hessian of `func()` as the sum of its diagonal, a 0-dim tensor.

    `num_samples` has no effect, here as in the original. Everything else is as for `hessian_diagonal`; the
    estimate by random probes is `secorder_func.compat.core.hvp.hessian_trace`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hessian_trace import hessian_trace
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_trace(lambda: (w**3).sum(), [w])
    tensor(18.)
    """
    entries = diagonal(func, params, None, create_graph, strict, "hessian_trace")
    return _total(entries, create_graph)


def model_hessian_trace(
    model: Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    num_samples: int = 1,
    create_graph: bool = False,
    strict: bool = False,
) -> Tensor:
    """Return the exact trace of the Hessian of `loss_fn(model(inputs), targets)`, a 0-dim tensor.

    Everything else is as for `hessian_trace`, with `list(model.parameters())`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func.compat.core.hessian_trace import model_hessian_trace
    >>> model, x, y = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> model_hessian_trace(model, torch.nn.MSELoss(), x, y)
    tensor(12.)
    """
    params = list(model_parameters(model, "model_hessian_trace"))
    entries = diagonal(
        lambda: loss_fn(model(inputs), targets),
        params,
        None,
        create_graph,
        strict,
        "model_hessian_trace",
    )
    return _total(entries, create_graph)


def _total(entries: list[Tensor], create_graph: bool) -> Tensor:
    with recording(create_graph):
        return torch.stack([entry.sum().to(entries[0]) for entry in entries]).sum()
