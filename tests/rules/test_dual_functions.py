"""Layer norm, batch norm, SiLU, softmax of dual numbers: closed forms against double backward, right in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import hvp
from tests import oracles


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = _rand(4, 3, seed=1)
PARAMS = {"w": _rand(3, 5, seed=2), "scale": _rand(5, seed=3), "shift": _rand(5, seed=4)}
VECTOR = {"w": _rand(3, 5, seed=5), "scale": _rand(5, seed=6), "shift": _rand(5, seed=7)}
MEAN = _rand(5, seed=8)

CASES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "scale and shift": lambda p: F.layer_norm(X @ p["w"], (5,), p["scale"], p["shift"]),
    "neither": lambda p: F.layer_norm(X @ p["w"], (5,)) * p["scale"],
    "a constant scale": lambda p: F.layer_norm(X @ p["w"], (5,), X[0].repeat(2)[:5]) + p["shift"],
    "two axes": lambda p: F.layer_norm(X @ p["w"], (4, 5)) * p["scale"],
    "a large eps": lambda p: F.layer_norm(X @ p["w"], (5,), p["scale"], None, 0.5),
    "twice": lambda p: F.layer_norm(
        F.layer_norm(X @ p["w"], (5,), p["scale"], p["shift"]).sin(), (5,), p["scale"]
    ),
    "transposed": lambda p: F.layer_norm((p["w"].T @ X.T).T, (5,), p["scale"], p["shift"]),
    "batch norm in evaluation": lambda p: F.batch_norm(
        (X @ p["w"]).sin(), MEAN, MEAN.exp(), p["scale"], p["shift"]
    ),
    "batch norm of images": lambda p: F.batch_norm(
        torch.einsum("ni,ik,j->nkij", X, p["w"].sin(), p["shift"]), MEAN, MEAN.exp(), p["scale"]
    ),
    "silu": lambda p: F.silu(X @ p["w"] * 2) * p["scale"],
    "softmax": lambda p: F.softmax(X @ p["w"], -1) * p["scale"],
    "softmax, rows": lambda p: torch.softmax((X @ p["w"]) ** 2, 0) * p["scale"],
    "softmax, method": lambda p: (X @ p["w"]).sin().softmax(dim=1).exp() + p["shift"],
    "softmax of half a mask": lambda p: (
        (X @ p["w"]).masked_fill(torch.arange(5) > 2, -torch.inf).softmax(-1) * p["scale"]
    ),
    "log_softmax": lambda p: F.log_softmax(X @ p["w"], 1) * p["scale"],
    "cross_entropy": lambda p: F.cross_entropy((X @ p["w"]).sin(), torch.tensor([0, 4, 2, 2])),
    "of a constant": lambda p: F.layer_norm(X, (3,)) @ p["w"] * p["scale"],
    "three axes in": lambda p: F.layer_norm(
        torch.stack([X @ p["w"], p["w"][:1] * X[:, :1]]), (5,), p["scale"], p["shift"]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_double_backwards(name: str) -> None:
    weights = torch.linspace(0.5, 1.5, 400, dtype=torch.float64)

    def f(p: dict[str, Tensor]) -> Tensor:
        entries = CASES[name](p).reshape(-1)
        return (weights[: len(entries)] * (entries.sin() + 0.2 * entries**2)).sum()

    found = hvp(f, mode="forward_over_reverse")(PARAMS, VECTOR)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    values = list(leaves.values())
    gradient = torch.autograd.grad(f(leaves), values, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(gradient, VECTOR.values(), strict=True) if g is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    truth = torch.autograd.grad(outputs, values, cotangents, allow_unused=True)
    expected = {
        n: torch.zeros_like(p) if t is None else t
        for (n, p), t in zip(leaves.items(), truth, strict=True)
    }
    oracles.assert_same(found, expected, 1e-9)
