"""Attention: torch's fused kernels have no second derivative, the rules use one that has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import functional_loss, hvp
from tests import oracles

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
torch.manual_seed(3)
S = torch.randn(1, 2, 5, 4, dtype=torch.float64)
MASK = torch.rand(5, 5) > 0.3
MASK.fill_diagonal_(True)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.7},
    "boolean mask": {"attn_mask": MASK},
    "boolean mask with a row of nothing": {"attn_mask": MASK & (torch.arange(5) != 2)[:, None]},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5).double()},
}


def _attention(p: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(S * p, S + p, S * p**2, **options).sin().sum()


P, V = torch.tensor([0.5, -1.0, 2.0, 0.3]).double(), torch.tensor([1.0, 2.0, -1.0, 0.5]).double()


def test_raw_forward_over_reverse_raises_on_attention() -> None:
    with pytest.raises(NotImplementedError, match="scaled_dot_product"):
        torch.func.jvp(torch.func.grad(_attention), (P,), (V,))


def test_raw_reverse_over_reverse_raises_on_attention() -> None:
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        torch.func.vjp(torch.func.grad(_attention), P)[1](V)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_exact(options: dict[str, Any], mode: Any) -> None:
    f = lambda p: _attention(p, **options)  # noqa: E731
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
def test_grouped_query_attention_is_exact(mode: Any) -> None:
    q, k = torch.randn(1, 4, 3, 4).double(), torch.randn(1, 2, 3, 4).double()
    f = lambda p: (  # noqa: E731
        F.scaled_dot_product_attention(q * p, k + p, k * p, enable_gqa=True).sin().sum()
    )
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize("mode", MODES)
def test_attention_with_dropout_uses_the_mask_of_one_plain_evaluation(mode: Any) -> None:
    f = lambda p: _attention(p, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(7)
    hv = hvp(f, mode=mode)(P, V)
    torch.manual_seed(7)
    oracles.assert_same(hv, oracles.hvp(f, P, V))


class Block(nn.Module):
    """Self-attention with the options under test."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"bias": False}])
def test_multihead_attention_is_exact(
    options: dict[str, Any], need_weights: bool, training: bool, mode: Any
) -> None:
    model = Block(need_weights, **options).double().train(training)
    f, params = functional_loss(model, F.mse_loss)
    v, x, y = oracles.random_like(params, 1), torch.randn(2, 3, 4).double(), torch.zeros(2, 3, 4)
    oracles.assert_same(
        hvp(f, mode=mode)(params, v, x, y.double()), oracles.hvp(f, params, v, x, y.double())
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer_is_exact(training: bool) -> None:
    model = nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True).double().train(training)
    f, params = functional_loss(model, F.mse_loss)
    v = oracles.random_like(params, 1)
    inputs = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    y = torch.zeros(2, 3, 4).double()
    oracles.assert_same(hvp(f)(params, v, inputs, y), oracles.hvp(f, params, v, inputs, y))


def test_a_transformer_encoder_in_evaluation_mode_is_exact_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    f, params = functional_loss(model, F.mse_loss)
    v, x, y = (
        oracles.random_like(params, 1),
        torch.randn(2, 3, 4).double(),
        torch.zeros(2, 3, 4).double(),
    )
    expected = oracles.hvp(f, params, v, x, y)
    with torch.no_grad():
        oracles.assert_same(hvp(f)(params, v, x, y), expected)
