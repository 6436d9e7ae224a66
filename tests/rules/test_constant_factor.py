"""A constant first factor: torch multiplies it with a tangent of zeros, ours does not; both give the same product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import hvp
from tests import oracles


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = _rand(4, 16, 128, seed=1)
PARAMS = {"w": 0.1 * _rand(128, 160, seed=2), "b": _rand(160, seed=3)}
VECTOR = {"w": 0.1 * _rand(128, 160, seed=4), "b": _rand(160, seed=5)}

CASES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "linear": lambda p: F.linear(X, p["w"].t(), p["b"]),
    "linear without bias": lambda p: F.linear(X, p["w"].t()) * p["b"],
    "@": lambda p: X @ p["w"] + p["b"],
    "matmul": lambda p: torch.matmul(X[0], p["w"]) + p["b"],
    "twice": lambda p: X @ p["w"] @ p["w"].t() @ p["w"] + p["b"],
    "another constant": lambda p: (2 * X.detach()) @ p["w"] + p["b"],
    "a bent weight": lambda p: X @ (p["w"] ** 2).sin() + p["b"],
    "a factor that is no constant": lambda p: (X * p["b"][:128]) @ p["w"],
    "a factor under no_grad": lambda p: _held(p) @ p["w"] + p["b"],
    "a constant weight": lambda p: (X * p["b"][:128]) @ X[0].T @ X[0] @ p["w"],
}


def _held(p: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return X * p["b"][:128]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threshold", [0, 2**62], ids=["ours", "torch's"])
def test_the_product_is_double_backwards(
    name: str, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secorder_func.rules.constant_factor._WORTH_IT", threshold)

    def f(p: dict[str, Tensor]) -> Tensor:
        return (CASES[name](p).tanh() ** 3).sum()

    found = hvp(f, mode="forward_over_reverse")(PARAMS, VECTOR)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    gradient = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)
    truth = torch.autograd.grad(gradient, list(leaves.values()), list(VECTOR.values()))
    oracles.assert_same(found, dict(zip(leaves, truth, strict=True)), 1e-10)


def test_the_constant_is_not_multiplied_with_a_tangent() -> None:
    products: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        hvp(lambda p: CASES["@"](p).tanh().sum(), mode="forward_over_reverse")(PARAMS, VECTOR)
    assert len(products) == 4  # value and tangent, forward and backward


def test_a_factor_that_the_loss_changes_afterwards_is_refused_as_by_autograd() -> None:
    def f(p: dict[str, Tensor]) -> Tensor:
        x = 2 * X
        y = x @ p["w"] + p["b"]
        x.add_(1)
        return (y**2).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hvp(f, mode="forward_over_reverse")(PARAMS, VECTOR)
