"""Losses that take derivatives themselves, by torch.autograd or by torch.func, through layers of every kind.

Their product is a third derivative of the layers, which torch's fused norms get wrong; the answers come from copies
of the networks with the norms written out, and from attention on the math kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from tests import oracles
from tests.situations.entries import CLOSURES, ENTRIES, Case, double_backward, every_entry

Network = Callable[[Tensor], Tensor]


class WrittenOut(nn.Module):
    """A layer or batch norm out of means, with the parameters of a fused one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.dim = -1 if isinstance(norm, nn.LayerNorm) else 0

    def forward(self, h: Tensor) -> Tensor:
        c = h - h.mean(self.dim, keepdim=True)
        scale = (c.square().mean(self.dim, keepdim=True) + 1e-5).sqrt()
        return c / scale * self.weight + self.bias


def _network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    middle: dict[str, list[nn.Module]] = {
        "mlp": [nn.Tanh()],
        "layer norm": [nn.LayerNorm(6), nn.Tanh()],
        "batch norm": [nn.BatchNorm1d(6), nn.Tanh()],
        "attention": [nn.TransformerEncoderLayer(6, 2, 5, 0.0, "gelu", batch_first=True)],
    }
    model = nn.Sequential(nn.Linear(4, 6), *middle[kind], nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def _written_out(model: nn.Sequential) -> nn.Sequential:
    """Return the network with the same parameters, in the same order, and norms without fused kernels."""

    def replaced(layer: nn.Module) -> nn.Module:
        if isinstance(layer, (nn.LayerNorm, nn.BatchNorm1d)):
            return WrittenOut(layer)
        if isinstance(layer, nn.TransformerEncoderLayer):
            return WrittenOutEncoder(layer)
        return layer

    return nn.Sequential(*[replaced(layer) for layer in model])


class WrittenOutEncoder(nn.Module):
    """A post-norm encoder layer out of matrix products and softmax."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = layer.self_attn
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = WrittenOut(layer.norm1), WrittenOut(layer.norm2)

    def forward(self, h: Tensor) -> Tensor:
        attention = self.self_attn
        projected = h @ attention.in_proj_weight.T + attention.in_proj_bias
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(-3, -2) for t in projected.chunk(3, -1))
        weights = (q @ k.mT / 3**0.5).softmax(-1)
        mixed = (weights @ v).transpose(-3, -2).flatten(-2)
        h = WrittenOut.forward(self.norm1, h + attention.out_proj(mixed))
        feed = self.linear2(torch.nn.functional.gelu(self.linear1(h)))
        return WrittenOut.forward(self.norm2, h + feed)


def _slope(network: Network, x: Tensor) -> Tensor:
    """Return the gradient in the input by plain autograd on a fresh leaf."""
    leaf = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
    return slope


def _along_ones(network: Network, x: Tensor) -> Tensor:
    """Return the derivative along ones, by the derivative of a pullback in its cotangent."""
    leaf = x.detach().clone().requires_grad_()
    output = network(leaf)
    cotangent = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, cotangent, torch.ones_like(x), create_graph=True)
    return tangent


def _pulled_ones(network: Network, x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (pulled,) = torch.autograd.grad(network(leaf).sum(), leaf, create_graph=True)
    return pulled


def _by_vjp(network: Network, x: Tensor) -> Tensor:
    output, pullback = vjp(network, x)
    return pullback(torch.ones_like(output))[0]


def _by_jacobian(network: Network, x: Tensor) -> Tensor:
    jacobian = jacrev(lambda x: network(x).sum(tuple(range(network(x).ndim - 1))))(x)
    return jacobian.sum(0)


# What the loss does, and the same by plain autograd.
WAYS: dict[str, tuple[Callable[[Network, Tensor], Tensor], Callable[[Network, Tensor], Tensor]]] = {
    "grad": (lambda network, x: grad(lambda x: network(x).square().sum())(x), _slope),
    "jvp": (lambda network, x: jvp(network, (x,), (torch.ones_like(x),))[1], _along_ones),
    "vjp": (_by_vjp, _pulled_ones),
    "jacrev": (_by_jacobian, _pulled_ones),
    "vmap of grad": (
        lambda network, x: vmap(grad(lambda row: network(row[None]).square().sum()))(x),
        _slope,
    ),
}
KINDS = ["mlp", "layer norm", "attention"]


class Penalised(nn.Module):
    """The square of a derivative of a network, plus its output."""

    def __init__(self, network: nn.Module, derivative: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.derivative = network, derivative

    def forward(self, x: Tensor) -> Tensor:
        return self.derivative(self.network, x).square().sum() + 0.1 * self.network(x).sum()


def _case(kind: str, way: Any, plainly: Any) -> Case:
    network = _network(kind)
    shape = (2, 3, 4) if kind == "attention" else (5, 4)
    truth = Penalised(_written_out(network), plainly)
    return Case(
        Penalised(network, way), lambda loss, _: loss, torch.randn(shape).double(), None, truth
    )


def _assert_exact(entry: str, case: Case) -> None:
    v = case.vector()
    by_parameter = dict(zip(map(id, case.params), v, strict=True))
    same_order = [by_parameter[id(p)] for p in case.truth.parameters()]
    answer = dict(
        zip(map(id, case.truth.parameters()), double_backward(case, same_order), strict=True)
    )
    oracles.assert_same(ENTRIES[entry](case, v), [answer[id(p)] for p in case.params], rtol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@every_entry
def test_a_penalty_by_torch_func_is_exact(entry: str, kind: str, way: str) -> None:
    _assert_exact(entry, _case(kind, *WAYS[way]))


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.parametrize("kind", [*KINDS, "batch norm"])
@pytest.mark.parametrize("entry", CLOSURES)
def test_a_penalty_by_autograd_in_a_leaf_of_its_own_is_exact_in_closures(
    entry: str, kind: str
) -> None:
    _assert_exact(entry, _case(kind, _slope, _slope))


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", CLOSURES)
def test_a_penalty_in_inputs_that_require_gradients_is_exact_in_closures(
    entry: str, kind: str
) -> None:
    def in_the_input(network: Network, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        return slope

    case = _case(kind, in_the_input, _slope)
    case.x.requires_grad_()
    _assert_exact(entry, case)


def _in_the_weights(network: Any, x: Tensor) -> Tensor:
    params = list(network.parameters())
    slopes = torch.autograd.grad(network(x).square().mean(), params, create_graph=True)
    return torch.stack([slope.square().sum() for slope in slopes]).sqrt()


@pytest.mark.parametrize("kind", [*KINDS, "batch norm"])
@every_entry
def test_a_penalty_on_the_gradient_in_the_weights_is_exact(entry: str, kind: str) -> None:
    _assert_exact(entry, _case(kind, _in_the_weights, _in_the_weights))


def test_a_penalty_on_the_weights_by_torch_func_is_exact() -> None:
    network = _network("layer norm")
    x = torch.randn(5, 4).double()
    written_out = _written_out(network)

    def penalty(model: nn.Module) -> Callable[[Any], Tensor]:
        def f(params: Any) -> Tensor:
            slopes = grad(lambda p: functional_call(model, p, (x,)).square().mean())(params)
            return sum((s.square().sum() for s in slopes.values()), torch.zeros(()).double())

        return f

    def plainly(params: Any) -> Tensor:
        loss = functional_call(written_out, params, (x,)).square().mean()
        slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return sum((s.square().sum() for s in slopes), torch.zeros(()).double())

    from secorder_func import hessian_operator, hvp

    params = {name: p.detach() for name, p in network.named_parameters()}
    v = oracles.random_like(params, 1)
    expected = oracles.hvp(plainly, params, v)
    oracles.assert_same(hvp(penalty(network))(params, v), expected, rtol=1e-9)
    oracles.assert_same(hessian_operator(penalty(network), params) @ v, expected, rtol=1e-9)
