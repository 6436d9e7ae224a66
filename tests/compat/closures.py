"""Models of tests/problems.py as the stateful code of a torch_secorder user sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import oracles, problems

MODELS = [
    "mlp_tanh",
    "mlp_gelu",
    "mlp_relu",
    "cnn_batchnorm_train",
    "cnn_batchnorm_eval",
    "lstm",
    "encoder_train",
    "encoder_eval",
    "multihead_attention",
    "tied_embeddings",
    "layer_norm",
    "instance_norm",
]


@dataclass(frozen=True)
class Stateful:
    """A module, its data and its loss."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    x: Any
    y: Any

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def func(self) -> Tensor:
        return self.loss_fn(self.model(self.x), self.y)

    def vector(self, seed: int = 0) -> list[Tensor]:
        return oracles.random_like(self.params, seed)


def stateful(name: str) -> Stateful:
    problem = problems.load(name)
    assert problem.model is not None
    assert problem.loss_fn is not None
    x, y = problem.args
    return Stateful(problem.model, problem.loss_fn, x, y)


def double_backward(
    func: Callable[[], Tensor],
    params: list[Tensor],
    v: list[Tensor],
    model: nn.Module | None = None,
) -> list[Tensor]:
    """Return H v by two calls of torch.autograd.grad on the parameters themselves."""
    with oracles.untouched(model), torch.enable_grad():
        first = torch.autograd.grad(func(), params, create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(first, v, strict=True) if g is not None and g.requires_grad]
        second = torch.autograd.grad(
            [g for g, _ in pairs], params, [t for _, t in pairs], allow_unused=True
        )
    return [torch.zeros_like(p) if h is None else h for h, p in zip(second, params, strict=True)]


def snapshot(*models: nn.Module) -> list[tuple[str, Any]]:
    """Return everything that a product must leave bit-identical: values, gradients, attributes."""
    state: list[tuple[str, Any]] = []
    for model in models:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            state.append((name, tensor.detach().clone()))
            state.append((name + ".grad", None if tensor.grad is None else tensor.grad.clone()))
        for name, module in model.named_modules():
            state += [(f"{name}.{key}", id(value)) for key, value in vars(module).items()]
    return state


def same(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return (
            torch.equal(a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a is b or a == b
        )

    return len(before) == len(after) and all(
        name == other and equal(a, b) for (name, a), (other, b) in zip(before, after, strict=True)
    )
