"""Hessian and Gauss-Newton operators against dense oracles and their transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from secorder_func import (
    ggn_operator,
    ggnvp,
    hessian_operator,
    hvp,
)
from tests import oracles, problems
from tests.operators.kinds import KINDS, dense_of, ggn_of, hessian_of

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
REAL = [
    n for n in problems.BUILDERS if problems.load(n).rtol <= 1e-10 and n != "complex_parameters"
]
MODELS = [n for n in problems.model_names() if n in REAL]
SOME = ["quadratic", "mlp_gelu", "tied_embeddings", "nested_tree", "encoder_train"]


CASES = [(name, "hessian") for name in REAL] + [(name, "ggn") for name in MODELS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_dense_equals_the_oracle(name: str, kind: str, mode: Any) -> None:
    torch.manual_seed(5)
    op = KINDS[kind](problems.load(name), mode)
    oracles.assert_same(op.dense(chunk_size=64), dense_of(name, kind))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SOME)
def test_a_product_equals_the_transform(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    expected = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    oracles.assert_same(hessian_of(problem, mode) @ v, expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp_gelu", "tree_outputs", "encoder_train"])
def test_a_ggn_product_equals_the_transform(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    expected = ggnvp(problem.model_fn, problem.loss_fn, mode=mode)(problem.params, v, *problem.args)
    oracles.assert_same(ggn_of(problem, mode) @ v, expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_mm_equals_a_loop_whatever_the_chunk(kind: str, chunk_size: int | None, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    op = KINDS[kind](problem, mode)
    vectors = [oracles.random_like(problem.params, seed) for seed in range(5)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vectors)
    loop = optree.tree_map(lambda *rows: torch.stack(rows), *(op @ v for v in vectors))
    oracles.assert_acts(loop, stacked)
    oracles.assert_same(op.mm(stacked, chunk_size=chunk_size), loop, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_equals_that_of_the_dense_matrices(kind: str) -> None:
    problem = problems.load("mlp_gelu")
    H, other = dense_of("mlp_gelu", "hessian"), dense_of("mlp_gelu", kind)
    op = (hessian_of(problem) - 2 * KINDS[kind](problem)).damped(0.1)
    oracles.assert_same(op.dense(), H - 2 * other + 0.1 * torch.eye(len(H)).double())


@pytest.mark.parametrize("kind", KINDS)
def test_scipy_finds_the_top_eigenvalue(kind: str) -> None:
    op = KINDS[kind](problems.load("mlp_tanh")).scipy()
    start = np.random.default_rng(0).normal(size=op.shape[0])
    (top,) = scipy.sparse.linalg.eigsh(op, k=1, which="LA", return_eigenvectors=False, v0=start)
    assert top == pytest.approx(
        np.linalg.eigvalsh(dense_of("mlp_tanh", kind).numpy())[-1], rel=1e-9
    )


def test_keyword_arguments_reach_the_function() -> None:
    problem = problems.load("nested_tree")
    op = hessian_operator(problem.f, problem.params, *problem.args, shift=-0.3)
    expected = oracles.hessian(
        lambda p, s: problem.f(p, s, shift=-0.3), problem.params, *problem.args
    )
    oracles.assert_same(op.dense(), expected)


def test_auto_takes_reverse_over_reverse_and_says_so() -> None:
    problem = problems.load("mlp_tanh")
    assert hessian_of(problem).mode == ggn_of(problem).mode == "reverse_over_reverse"


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_a_named_mode_is_the_one_used(kind: str, mode: Any) -> None:
    assert KINDS[kind](problems.load("mlp_tanh"), mode).mode == mode


def test_auto_evaluates_the_loss_once_for_all_products() -> None:
    problem = problems.load("mlp_tanh")
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return problem.f(*args)

    op = hessian_operator(counted, problem.params, *problem.args)
    for seed in range(3):
        op @ oracles.random_like(problem.params, seed)
    op.dense()
    assert len(calls) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters_are_multiplied_as_by_double_backward(kind: str, mode: Any) -> None:
    problem = problems.load("complex_parameters")
    v = oracles.random_like(problem.params, 1)
    if kind == "hessian":
        product = hessian_of(problem, mode) @ v
        expected = oracles.hvp(problem.f, problem.params, v)
    else:
        model = lambda p, x: p["z"] * torch.exp(1j * p["phase"])  # noqa: E731
        loss = lambda z, y: (z.abs() ** 2).sum()  # noqa: E731
        product = ggn_operator(model, loss, problem.params, None, None, mode=mode) @ v
        _, tangent = torch.func.jvp(lambda p: model(p, None), (problem.params,), (v,))
        _, pullback = torch.func.vjp(lambda p: model(p, None), problem.params)
        (expected,) = pullback(2 * tangent)
    oracles.assert_same(product, expected)


# ------------------------------------------------------------------------------------------ peers


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_curvlinops_has_the_same_matrix(kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    problem = problems.load("mlp_tanh")
    model = problem.model
    x, y = problem.args
    params = [p for p in model.parameters() if p.requires_grad]
    make = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
    }[kind]
    peer = make(model, torch.nn.MSELoss(), params, [(x, y)], check_deterministic=False)
    v = oracles.random_like(problem.params, 1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    in_order = lambda tree: torch.cat([tree[name].flatten() for name in names])  # noqa: E731
    product = peer @ in_order(v)
    assert oracles.relative_error(in_order(KINDS[kind](problem) @ v), product) < 1e-10
