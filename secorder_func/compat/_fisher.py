"""Squared gradients of a loss, which the documentation of `torch_secorder` calls the empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.checks import check_callable
from secorder_func.compat._arguments import Leaves, model_parameters, with_frozen
from secorder_func.compat._gradient import (
    check_real,
    closure_gradient,
    closure_gradient_with_graph,
    dense,
    traceable,
)
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules import evaluation
from secorder_func.rules.cut_graphs import refuse_cut_history
from secorder_func.rules.inference import without_inference_tensors
from secorder_func.transforms.plain_autograd import gradients, recording

__all__ = ["free_parameters", "likelihood_gradient", "loss_gradient", "total"]


def free_parameters(model: Any, where: str) -> tuple[Leaves, Leaves]:
    """Return all parameters of a model, and those that require gradients."""
    leaves = model_parameters(model, where)
    check_real(leaves, where)
    free = tuple(leaf for leaf in leaves if leaf.requires_grad)
    if not free:
        problem = "no parameter of the model requires gradients"
        raise ArgumentError(message(where, problem, "Call model.requires_grad_()"))
    return leaves, free


def loss_gradient(
    model: Any, loss_fn: Any, inputs: Any, targets: Any, where: str, *, graph: bool
) -> Leaves:
    """Return the gradient of `loss_fn(model(inputs), targets)`, zeros for frozen and unused parameters."""
    leaves, free = free_parameters(model, where)
    check_callable(loss_fn, where, name="loss_fn")

    inputs, targets = without_inference_tensors((inputs, targets))

    def loss() -> Any:
        return loss_fn(model(inputs), targets)

    if graph:
        found = closure_gradient_with_graph(loss, free, where)
    else:
        found = closure_gradient(loss, free, where, create_graph=False)
    return with_frozen(found, leaves)


def likelihood_gradient(
    model: Any, outputs: Any, targets: Any, loss_type: Any, where: str, *, create_graph: bool
) -> Leaves:
    """Return the gradient of the summed log-likelihood of class labels, through the graph of `outputs`."""
    leaves, free = free_parameters(model, where)
    _check_likelihood(outputs, targets, loss_type, where)
    with (
        recording(),
        evaluation(forward=False, higher=create_graph, protect=free),
    ):
        value = -F.nll_loss(F.log_softmax(outputs, dim=-1), targets, reduction="sum")
        if create_graph:
            refuse_cut_history([value.grad_fn])
        found = gradients([value], free, retain_graph=True, create_graph=create_graph)
        if all(g is None for g in found):
            problem = "outputs do not depend on any parameter of the model"
            raise ArgumentError(message(where, problem, "Pass outputs = model(inputs)"))
        gradient = dense(found, free)
        if create_graph:
            refuse_cut_history([g.grad_fn for g in gradient if g.requires_grad])
            gradient = tuple(traceable(g, p) for g, p in zip(gradient, free, strict=True))
    return with_frozen(gradient, leaves)


def total(gradient: Leaves) -> Tensor:
    """Return the sum of all squares, in float32 or wider."""
    dtype = torch.float32
    for g in gradient:
        dtype = torch.promote_types(dtype, g.dtype)
    flat = [g.reshape(-1).to(dtype) for g in gradient]
    sums = [torch.dot(g, g) for g in flat]
    return torch.stack([s.to(sums[0].device) for s in sums]).sum()


def _check_likelihood(outputs: Any, targets: Any, loss_type: Any, where: str) -> None:
    if not isinstance(loss_type, str):
        problem = f"loss_type must be a string, got {type(loss_type).__name__}"
        raise ArgumentTypeError(message(where, problem, "Pass 'nll'"))
    mend = "For another loss use the empirical function, with loss_fn of reduction 'sum'"
    if loss_type.lower() != "nll":
        problem = f"loss_type must be 'nll', got {loss_type!r}"
        raise NotImplementedError(message(where, problem, mend))
    for name, tensor in (("outputs", outputs), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            problem = f"{name} must be a tensor, got {type(tensor).__name__}"
            raise ArgumentTypeError(message(where, problem))
    if (outputs.ndim, targets.ndim) != (2, 1):
        raise NotImplementedError(
            message(
                where,
                "outputs must be logits of shape (N, C) and targets class labels of shape (N,), "
                f"got {tuple(outputs.shape)} and {tuple(targets.shape)}",
                mend,
            )
        )
    if not outputs.requires_grad:
        raise ArgumentError(
            message(
                where,
                "outputs carry no graph",
                "Compute outputs = model(inputs) with gradients enabled and do not detach them",
            )
        )
