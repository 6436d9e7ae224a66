"""Functions that a sweep of torch's operator database found wrong or missing at second order.

Where torch is silently wrong, a test shows it without the rule, so that a mended torch is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    NoExactRouteError,
    functional_loss,
    hessian_operator,
    hvp,
)
from secorder_func.compat.core.hvp import exact_hvp
from tests import oracles

MODES = ["reverse_over_forward", "forward_over_reverse", "reverse_over_reverse", "double_backward"]
P = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2, -0.7], dtype=torch.float64)
V = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3, -2.0], dtype=torch.float64)
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Fn = Callable[[Tensor], Tensor]

needs_chunks = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13 lacks linear_cross_entropy"
)


def _rows(p: Tensor) -> Tensor:
    return torch.outer(torch.ones(2).double(), p.tanh()) * torch.tensor([[1.0], [-0.5]]).double()


# Each function as torch has it, and the same written out of functions that are right.
SAME: dict[str, tuple[Fn, Fn]] = {
    "segment_reduce sum": (
        lambda p: torch.segment_reduce(p.sin(), "sum", lengths=torch.tensor([2, 0, 4])),
        lambda p: torch.stack([p[:2].sin().sum(), 0 * p[0], p[2:].sin().sum()]),
    ),
    "segment_reduce mean": (
        lambda p: torch.segment_reduce(p.sin(), "mean", offsets=torch.tensor([0, 1, 6])),
        lambda p: torch.stack([p[0].sin(), p[1:].sin().mean()]),
    ),
    "segment_reduce mean with a start": (
        lambda p: torch.segment_reduce(
            p.sin(), "mean", lengths=torch.tensor([2, 0, 4]), initial=1.0
        ),
        lambda p: torch.stack(
            [(1 + p[:2].sin().sum()) / 2, 1 + 0 * p[0], (1 + p[2:].sin().sum()) / 4]
        ),
    ),
    "segment_reduce prod": (
        lambda p: torch.segment_reduce(p.sin(), "prod", lengths=torch.tensor([2, 4])),
        lambda p: torch.stack([p[:2].sin().prod(), p[2:].sin().prod()]),
    ),
    "segment_reduce max of rows": (
        lambda p: torch.segment_reduce(_rows(p).T, "max", lengths=torch.tensor([2, 4])),
        lambda p: torch.stack([_rows(p).T[:2].amax(0), _rows(p).T[2:].amax(0)]),
    ),
    "embedding_bag max": (
        lambda p: F.embedding_bag(torch.tensor([[0, 1, 1], [2, 0, 1]]), _table(p), mode="max"),
        lambda p: torch.stack([_table(p)[[0, 1]].amax(0), _table(p)[[2, 0, 1]].amax(0)]),
    ),
    "embedding_bag max with offsets and padding": (
        lambda p: F.embedding_bag(
            torch.tensor([0, 1, 2, 1]),
            _table(p),
            torch.tensor([0, 2, 2]),
            mode="max",
            padding_idx=1,
        ),
        lambda p: torch.stack([_table(p)[0], 0 * _table(p)[0], _table(p)[2]]),
    ),
    "tensor_split": (
        lambda p: torch.tensor_split(p.sin(), torch.tensor([1, 4]))[1],
        lambda p: p[1:4].sin(),
    ),
    "logaddexp at -inf": (
        lambda p: torch.logaddexp(p, torch.where(p > 0, p * p, -torch.inf)),
        lambda p: torch.where(p > 0, p + torch.log1p((p * p - p).exp()), p),
    ),
    "logaddexp2 of equals": (
        lambda p: torch.logaddexp2(p, p.detach() + 0 * p),
        lambda p: torch.log2(2**p + 2 ** p.detach()),
    ),
    "native_layer_norm without weight": (
        lambda p: torch.native_layer_norm(p.reshape(2, 3), [3], None, None, 0.1)[0],
        lambda p: _normalised(p.reshape(2, 3), 0.1),
    ),
    "max_unpool1d": (
        lambda p: F.max_unpool1d(p.sin().reshape(1, 1, 6), 2 * torch.arange(6).reshape(1, 1, 6), 2),
        lambda p: torch.stack([p.sin(), 0 * p], 1).reshape(12),
    ),
    "as_strided_scatter": (
        lambda p: torch.as_strided_scatter(p.sin(), p[:2].exp(), (2,), (3,), 1),
        lambda p: torch.stack(
            [p[0].sin(), p[0].exp(), p[2].sin(), p[3].sin(), p[1].exp(), p[5].sin()]
        ),
    ),
    "multi_margin_loss of one sample": (
        lambda p: F.multi_margin_loss(p.sin(), torch.tensor(1), p=2),
        lambda p: _margins(p.sin(), 1),
    ),
}


def _table(p: Tensor) -> Tensor:
    return p.reshape(3, 2).sin()


def _normalised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _margins(x: Tensor, target: int) -> Tensor:
    terms = [(1 - x[target] + x[i]).clamp(min=0) ** 2 for i in range(len(x)) if i != target]
    return torch.stack(terms).sum() / len(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAME)
def test_a_function_is_exact_in_every_mode(name: str, mode: Any) -> None:
    ours, plain = SAME[name]
    expected = oracles.hvp(lambda p: plain(p).square().sum(), P, V)
    oracles.assert_same(hvp(lambda p: ours(p).square().sum(), mode=mode)(P, V), expected, 1e-9)


@pytest.mark.parametrize("name", SAME)
def test_so_is_the_operator_for_many_vectors_and_the_drop_in(name: str) -> None:
    ours, plain = SAME[name]
    op = hessian_operator(lambda p: ours(p).square().sum(), P)
    oracles.assert_same(op.dense(), oracles.hessian(lambda p: plain(p).square().sum(), P), 1e-9)
    p = P.clone().requires_grad_()
    expected = oracles.hvp(lambda p: plain(p).square().sum(), P, V)
    oracles.assert_same(exact_hvp(lambda: ours(p).square().sum(), [p], V), expected, 1e-9)


WRONG_BY_TORCH = ["logaddexp at -inf", "as_strided_scatter"]


@pytest.mark.parametrize("name", WRONG_BY_TORCH)
def test_without_the_rule_double_backward_is_silently_wrong(name: str) -> None:
    raw, plain = SAME[name]
    wrong = oracles.hvp(lambda p: raw(p).square().sum(), P, V)
    right = oracles.hvp(lambda p: plain(p).square().sum(), P, V)
    assert not bool((wrong - right).norm() < 1e-2 * right.norm())


# ------------------------------------------------------------------------ linear cross-entropy


def _chunked(options: bool) -> Fn:
    chunks = nn.LinearCrossEntropyOptions() if options else None
    targets = torch.tensor([0, 1, 1, 0])
    return lambda p: F.linear_cross_entropy(X, p.reshape(2, 3), targets, options=chunks)


@needs_chunks
@pytest.mark.parametrize("mode", MODES)
def test_linear_cross_entropy_in_chunks_is_exact(mode: Any) -> None:
    plain = lambda p: F.cross_entropy(X @ p.reshape(2, 3).T, torch.tensor([0, 1, 1, 0]))  # noqa: E731
    oracles.assert_same(hvp(_chunked(True), mode=mode)(P, V), oracles.hvp(plain, P, V))


@needs_chunks
def test_without_the_rule_its_double_backward_is_silently_wrong() -> None:
    targets = torch.tensor([0, 1, 1, 0])
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    in_chunks = lambda p: F.linear_cross_entropy(X, p.reshape(2, 3), targets, options=options)  # noqa: E731
    wrong = oracles.hvp(lambda p: in_chunks(p).square(), P, V)
    right = oracles.hvp(lambda p: _chunked(False)(p).square(), P, V)
    assert oracles.relative_error(wrong, right) > 1e-2


# ------------------------------------------------------------------------------ refused or slow


def _unpooled_twice(p: Tensor) -> Tensor:
    places = torch.tensor([0, 2, 2, 5, 7, 8]).reshape(1, 1, 6)
    return F.max_unpool1d(p.sin().reshape(1, 1, 6), places, 2).pow(3).sum()


@pytest.mark.parametrize("make", [lambda f: hvp(f)(P, V), lambda f: hessian_operator(f, P)])
def test_unpooling_with_a_repeated_index_is_refused(make: Any) -> None:
    with pytest.raises(NoExactRouteError, match="max_unpool1d got an index twice"):
        make(_unpooled_twice)


def test_without_the_rule_its_gradient_is_not_that_of_the_loss() -> None:
    (gradient,) = torch.autograd.grad(_unpooled_twice(q := P.clone().requires_grad_()), q)
    step = 1e-6
    slope = (_unpooled_twice(P + step * V) - _unpooled_twice(P - step * V)) / (2 * step)
    assert abs(float(slope - gradient @ V)) > 1e-2 * abs(float(slope))


@pytest.mark.parametrize("mode", MODES)
def test_logcumsumexp_keeps_all_digits(mode: Any) -> None:
    f = lambda p: torch.logcumsumexp(p, 0).square().sum()  # noqa: E731
    plain = lambda p: torch.stack([p[: i + 1].exp().sum().log() for i in range(6)]).square().sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode=mode)(P, V), oracles.hvp(plain, P, V), 1e-12)


# -------------------------------------------------------------------------------- under a vmap

MAPPED: dict[str, tuple[Fn, Fn]] = {
    "index_fill with a value": (
        lambda p: p.new_ones(6).index_fill(0, torch.tensor([1, 4]), p[0].exp()),
        lambda p: torch.cat([torch.ones(4).double(), p[:1].exp(), p[:1].exp()]),
    ),
    "index_fill_ with a value": (
        lambda p: p.sin().index_fill_(0, torch.tensor([1, 4]), p[0].exp()),
        lambda p: torch.cat([p[[0, 2, 3, 5]].sin(), p[:1].exp(), p[:1].exp()]),
    ),
    "index_copy with one number": (
        lambda p: torch.zeros(3).double().index_copy(0, torch.tensor(1), p[:1].sin()),
        lambda p: p[:1].sin(),
    ),
    "index_add_ with one number": (
        lambda p: torch.ones(3, 2).double().index_add_(0, torch.tensor(1), p[None, :2].sin()),
        lambda p: torch.cat([torch.ones(4).double(), 1 + p[:2].sin()]),
    ),
    "index_select of one row": (
        lambda p: p.reshape(3, 2).index_select(0, torch.tensor(1)).sin(),
        lambda p: p[2:4].sin(),
    ),
    "rrelu in evaluation": (
        lambda p: F.rrelu(p, 0.2, 0.4),
        lambda p: torch.where(p > 0, p, 0.3 * p),
    ),
}


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("name", MAPPED)
def test_mapped_over_vectors_it_is_exact(name: str, mode: Any) -> None:
    ours, plain = MAPPED[name]
    f = lambda p: ours(p).pow(3).sum()  # noqa: E731
    vectors = torch.stack([V, V.flip(0)])
    products = torch.func.vmap(lambda v: hvp(f, mode=mode)(P, v))(vectors)
    expected = [oracles.hvp(lambda p: plain(p).pow(3).sum(), P, v) for v in vectors]
    oracles.assert_same(products, torch.stack(expected))


def test_without_the_rule_index_fill_is_silently_wrong_under_vmap() -> None:
    f = lambda p: MAPPED["index_fill with a value"][0](p).pow(3).sum()  # noqa: E731
    vectors = torch.stack([V, V.flip(0)])
    raw = torch.func.vmap(lambda v: torch.func.jvp(torch.func.grad(f), (P,), (v,))[1])(vectors)
    right = torch.stack([oracles.hvp(f, P, v) for v in vectors])
    assert oracles.relative_error(raw, right) > 1e-2


@pytest.mark.parametrize("count", [1, 2, 6])
def test_masked_select_with_a_wider_mask_is_exact_for_several_vectors(count: int) -> None:
    # torch's own backward pass has a row too many or raises, depending on how many are mapped
    mask = torch.arange(36).reshape(6, 6) % 5 != 0
    f = lambda p: torch.masked_select(p.sin(), mask).pow(3).sum()  # noqa: E731
    vectors = torch.stack([V.roll(k) for k in range(count)])
    expected = [oracles.hvp(lambda p: (mask.sum(0) * p.sin() ** 3).sum(), P, v) for v in vectors]
    oracles.assert_same(hessian_operator(f, P).mm(vectors), torch.stack(expected))


def test_writes_to_what_vmap_does_not_map_are_all_kept() -> None:
    seen: list[Tensor] = []

    def f(p: Tensor) -> Tensor:
        places = torch.arange(4)
        places[2], places[1], places[0] = 7, 5, 6
        seen.append(places.clone())
        return p.pow(3).sum()

    def only_mapped(p: Tensor) -> Tensor:
        from secorder_func.rules import evaluation

        with evaluation(forward=False, higher=False):
            return f(p)

    torch.func.vmap(only_mapped)(P[None])
    assert seen[-1].tolist() == [6, 5, 7, 3]


# ---------------------------------------------------------------------- recurrence and dropout


@pytest.mark.parametrize("mode", MODES)
def test_an_lstm_in_single_precision_works_in_every_mode(mode: Any) -> None:
    torch.manual_seed(0)
    f, params = functional_loss(nn.LSTM(3, 4), lambda outputs, _: outputs[0].square().sum())
    x, v = torch.randn(5, 2, 3), oracles.random_like(params, 1)
    wide = {name: p.double() for name, p in params.items()}
    g, _ = functional_loss(nn.LSTM(3, 4).double(), lambda outputs, _: outputs[0].square().sum())
    expected = oracles.hvp(
        lambda p: g(p, x.double(), None), wide, {name: u.double() for name, u in v.items()}
    )
    assert oracles.relative_error(hvp(f, mode=mode)(params, v, x, None), expected) < 1e-5
    assert torch.backends.mkldnn.enabled == torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_what_is_not_contiguous_has_the_mask_of_a_plain_evaluation(mode: Any) -> None:
    def f(p: Tensor) -> Tensor:
        return F.dropout(p.reshape(2, 3).T.exp(), 0.4).square().sum()

    torch.manual_seed(5)
    expected = oracles.hvp(f, P, V)
    torch.manual_seed(5)
    oracles.assert_same(hvp(f, mode=mode)(P, V), expected)


# ------------------------------------------------------------------- found by trying to break it


quiet_sparse = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own


def _graph(values: Tensor) -> Tensor:
    edges = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 3, 1]])
    return torch.tanh(torch.sparse_coo_tensor(edges, values, (4, 4)) @ X).pow(2).sum()


def _dense_graph(values: Tensor) -> Tensor:
    places = torch.tensor([1, 6, 11, 12, 3, 9])
    dense = torch.zeros(16, dtype=values.dtype).index_put((places,), values).reshape(4, 4)
    return torch.tanh(dense @ X).pow(2).sum()


@quiet_sparse
def test_learned_values_of_a_sparse_tensor_are_refused() -> None:
    for make in (lambda: hvp(_graph)(P, V), lambda: hessian_operator(_graph, P)):
        with pytest.raises(NoExactRouteError, match="sparse_coo_tensor in its values"):
            make()


@quiet_sparse
def test_constant_values_of_a_sparse_tensor_are_exact() -> None:
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])

    def f(p: Tensor) -> Tensor:
        weights = torch.sparse_coo_tensor(edges, torch.ones(3).double(), (4, 4))
        return (weights @ (X * p[:3])).sin().sum()

    oracles.assert_same(hvp(f, mode="reverse_over_reverse")(P, V), oracles.hvp(f, P, V))


@quiet_sparse
def test_without_the_rule_learned_values_are_silently_wrong() -> None:
    right = oracles.hvp(_dense_graph, P, V)
    assert oracles.relative_error(oracles.hvp(_graph, P, V), right) > 1e-2


@pytest.mark.parametrize("make", [lambda f: hvp(f)(P, V), lambda f: hessian_operator(f, P)])
def test_a_loss_that_torch_cannot_differentiate_raises_its_own_error(make: Any) -> None:
    def f(p: Tensor) -> Tensor:
        q = p.clone()
        q[0:2].mul_(q[2:4])
        return (q**2).sum()

    with pytest.raises(RuntimeError, match="inplace operation"):
        make(f)


def test_an_except_clause_of_the_loss_does_not_swallow_the_rules() -> None:
    def inner(p: Tensor) -> Tensor:
        return F.layer_norm(p.reshape(2, 3), (3,)).exp().square().sum()

    def f(p: Tensor) -> Tensor:
        try:
            (g,) = torch.autograd.grad(inner(p), p, create_graph=True)
        except Exception:
            g = torch.zeros_like(p)
        return g.square().sum()

    def plain(p: Tensor) -> Tensor:
        x = _normalised(p.reshape(2, 3), 1e-5)
        (g,) = torch.autograd.grad(x.exp().square().sum(), p, create_graph=True)
        return g.square().sum()

    p = P.clone().requires_grad_()
    oracles.assert_same(exact_hvp(lambda: f(p), [p], V), oracles.hvp(plain, P, V), 1e-9)
