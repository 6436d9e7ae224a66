"""Forms of arguments, kinks and poles at which a first version of the rules was wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import hvp
from tests import oracles

MODE: Any = "reverse_over_forward"
M = torch.tensor([[1.0, 2.0, 0.5], [3.0, 5.0, -1.0]], dtype=torch.float64)
V = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.0, -1.0]], dtype=torch.float64)
W = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def _imaginary_part(p: Tensor) -> Tensor:
    y = torch.complex(p, p * p)
    y.imag = p**3
    return (y.abs() ** 2).sum()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "var axis": lambda p: (p.var(axis=0) ** 2).sum(),
    "var keepdims": lambda p: (p.var(1, keepdims=True) * p).sum(),
    "std axis": lambda p: (p.std(axis=1) ** 3).sum(),
    "var_mean axis": lambda p: (torch.var_mean(p, axis=1)[0] ** 2).sum(),
    "sum axis": lambda p: (p.sum(axis=0, keepdims=True) ** 3).sum(),
    "sort axis": lambda p: (p.sort(axis=0, descending=True)[0] ** 3 * W).sum(),
    "topk axis": lambda p: (p.topk(1, axis=0)[0] ** 3 * W).sum(),
    "cummax axis": lambda p: (p.flip(0).cummax(axis=0)[0] ** 3).sum(),
    "max axis": lambda p: (torch.max(p, axis=0)[0] ** 3).sum(),
    "min axis": lambda p: (p.min(axis=1)[0] ** 3).sum(),
    "where by name": lambda p: torch.where(p > 1, other=p * 2, input=p**3).sum(),
    "where as a method by name": lambda p: (p**3).where(condition=p > 1, other=p**2).sum(),
    "imag": _imaginary_part,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_the_arguments_is_right_or_left_to_another_mode(name: str) -> None:
    f = FORMS[name]
    expected = oracles.hvp(f, M, V)
    oracles.assert_same(hvp(f)(M, V), expected)
    if name != "imag":
        oracles.assert_same(hvp(f, mode=MODE)(M, V), expected)


KINKS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "hardswish": (F.hardswish, [-3.0, 3.0]),
    "elu": (F.elu, [0.0]),
    "elu of a half": (lambda x: F.elu(x, alpha=0.5), [0.0]),
    "celu": (F.celu, [0.0]),
    "selu": (F.selu, [0.0]),
    "leaky_relu": (F.leaky_relu, [0.0]),
    "smooth_l1": (
        lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
        [1.0, -1.0],
    ),
    "rrelu": (lambda x: F.rrelu(x, 0.2, 0.2, True), [0.0, 1.0]),
}


@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink_it_is_what_torch_takes(name: str) -> None:
    g, points = KINKS[name]
    p = torch.tensor(points, dtype=torch.float64)
    f = lambda p: (g(p) ** 2 + g(p)).sum()  # noqa: E731
    v = torch.linspace(1, 2, len(points), dtype=torch.float64)
    oracles.assert_same(hvp(f, mode=MODE)(p, v), oracles.hvp(f, p, v), 1e-12)


def test_where_torch_has_a_gradient_of_zero_there_are_no_nans() -> None:
    """At a pole of a logarithm that a share of zero multiplies, and at a root of zero."""
    ends = torch.tensor([0.0, 1.0]).double()
    f = lambda p: F.binary_cross_entropy(p, ends) + p.std(unbiased=False) ** 2  # noqa: E731
    v = torch.tensor([1.0, 0.0]).double()
    # The second derivative of -log(1 - x) is one at zero, halved by the mean; that of a variance is 2/n (I - 11'/n).
    oracles.assert_same(hvp(f, mode=MODE)(ends, v), torch.tensor([1.0, -0.5]).double())
    same = torch.ones(3).double()
    steep = lambda p: p.std() + p.pow(2).sum()  # noqa: E731
    oracles.assert_same(hvp(steep, mode=MODE)(same, same), 2 * same)


def test_a_query_that_attends_to_nothing() -> None:
    mask = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]).double()
    q = torch.tensor([[1.0, 2.0], [0.5, 1.0]]).double()
    f = lambda p: F.scaled_dot_product_attention(p, p, p, attn_mask=mask).pow(2).sum()  # noqa: E731
    rows = lambda p: (torch.softmax(p[0] @ p.T / 2**0.5, -1) @ p).pow(2).sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode=MODE)(q, q), oracles.hvp(rows, q, q), 1e-10)


def test_the_bias_of_a_transposed_convolution_of_one_sample() -> None:
    x, w = torch.randn(3, 4).double(), torch.randn(3, 2, 3).double()
    f = lambda b: F.conv_transpose1d(x, w, b).pow(3).sum()  # noqa: E731
    b, v = torch.randn(2).double(), torch.randn(2).double()
    oracles.assert_same(hvp(f, mode=MODE)(b, v), oracles.hvp(f, b, v))


def test_a_packed_sequence_goes_through_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, bidirectional=True).double()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3).double(), torch.tensor([5, 3, 2]))

    def f(params: Any) -> Tensor:
        out, last = torch.func.functional_call(layer, params, (x,))
        return out.data.pow(2).sum() + last.pow(3).sum()

    v = oracles.random_like(params, 1)
    oracles.assert_same(hvp(f)(params, v), oracles.hvp(f, params, v))
