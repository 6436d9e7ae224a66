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
    LinearOperator,
    exact_trace,
    ggn_operator,
    ggnvp,
    hessian_operator,
    hvp,
)
from tests import oracles, problems

MODES = ["auto", "forward_over_reverse", "reverse_over_reverse"]
REAL = [n for n in problems.BUILDERS if problems.load(n).rtol <= 1e-10 and n != "complex_parameters"]
MODELS = [n for n in problems.model_names() if n in REAL]
SOME = ["quadratic", "mlp_gelu", "tied_embeddings", "nested_tree", "encoder_train"]


def _hessian(problem: problems.Problem, mode: Any = "auto") -> LinearOperator:
    return hessian_operator(problem.f, problem.params, *problem.args, mode=mode)


def _ggn(problem: problems.Problem, mode: Any = "auto") -> LinearOperator:
    return ggn_operator(
        problem.model_fn, problem.loss_fn, problem.params, *problem.args, mode=mode
    )


def _dense(name: str, kind: str) -> Tensor:
    problem = problems.load(name)
    torch.manual_seed(5)
    if kind == "hessian":
        return oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    return oracles.ggn(
        problem.model_fn, problem.loss_fn, problem.params, *problem.args, model=problem.model
    )


KINDS = {"hessian": _hessian, "ggn": _ggn}
CASES = [(name, "hessian") for name in REAL] + [(name, "ggn") for name in MODELS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_dense_equals_the_oracle(name: str, kind: str, mode: Any) -> None:
    torch.manual_seed(5)
    op = KINDS[kind](problems.load(name), mode)
    oracles.assert_same(op.dense(chunk_size=64), _dense(name, kind))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SOME)
def test_a_product_equals_the_transform(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    expected = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    oracles.assert_same(_hessian(problem, mode) @ v, expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp_gelu", "tree_outputs", "encoder_train"])
def test_a_ggn_product_equals_the_transform(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    expected = ggnvp(problem.model_fn, problem.loss_fn, mode=mode)(
        problem.params, v, *problem.args
    )
    oracles.assert_same(_ggn(problem, mode) @ v, expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_mm_equals_a_loop_whatever_the_chunk(kind: str, chunk_size: int | None, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    op = KINDS[kind](problem, mode)
    vectors = [oracles.random_like(problem.params, seed) for seed in range(5)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vectors)
    loop = optree.tree_map(lambda *rows: torch.stack(rows), *(op @ v for v in vectors))
    oracles.assert_same(op.mm(stacked, chunk_size=chunk_size), loop, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_equals_that_of_the_dense_matrices(kind: str) -> None:
    problem = problems.load("mlp_gelu")
    H, other = _dense("mlp_gelu", "hessian"), _dense("mlp_gelu", kind)
    op = (_hessian(problem) - 2 * KINDS[kind](problem)).damped(0.1)
    oracles.assert_same(op.dense(), H - 2 * other + 0.1 * torch.eye(len(H)).double())


@pytest.mark.parametrize("kind", KINDS)
def test_scipy_finds_the_top_eigenvalue(kind: str) -> None:
    op = KINDS[kind](problems.load("mlp_tanh")).scipy()
    start = np.random.default_rng(0).normal(size=op.shape[0])
    (top,) = scipy.sparse.linalg.eigsh(op, k=1, which="LA", return_eigenvectors=False, v0=start)
    assert top == pytest.approx(np.linalg.eigvalsh(_dense("mlp_tanh", kind).numpy())[-1], rel=1e-9)


def test_keyword_arguments_reach_the_function() -> None:
    problem = problems.load("nested_tree")
    op = hessian_operator(problem.f, problem.params, *problem.args, shift=-0.3)
    expected = oracles.hessian(lambda p, s: problem.f(p, s, shift=-0.3), problem.params, *problem.args)
    oracles.assert_same(op.dense(), expected)


def test_auto_takes_reverse_over_reverse_and_says_so() -> None:
    problem = problems.load("mlp_tanh")
    assert _hessian(problem).mode == _ggn(problem).mode == "reverse_over_reverse"


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
        product = _hessian(problem, mode) @ v
        expected = oracles.hvp(problem.f, problem.params, v)
    else:
        model = lambda p, x: p["z"] * torch.exp(1j * p["phase"])  # noqa: E731
        loss = lambda z, y: (z.abs() ** 2).sum()  # noqa: E731
        product = ggn_operator(model, loss, problem.params, None, None, mode=mode) @ v
        _, tangent = torch.func.jvp(lambda p: model(p, None), (problem.params,), (v,))
        _, pullback = torch.func.vjp(lambda p: model(p, None), problem.params)
        (expected,) = pullback(2 * tangent)
    oracles.assert_same(product, expected)


# -------------------------------------------------------------------------------- safety and state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_changed_in_place_are_detected(kind: str, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    params = {k: p.clone() for k, p in problem.params.items()}
    moved = problems.Problem(
        "moved", problem.f, params, problem.args, problem.model_fn, problem.loss_fn
    )
    op = KINDS[kind](moved, mode)
    v = oracles.random_like(params, 1)
    op @ v
    params["0.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="parameter was changed in place.*new operator"):
        op @ v
    with pytest.raises(RuntimeError, match="parameter was changed in place"):
        op.dense()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_gradient_mode_does_not_change_the_matrix(
    kind: str, mode: Any, context: Any
) -> None:
    problem = problems.load("mlp_tanh")
    with context():
        dense = KINDS[kind](problem, mode).dense()
    oracles.assert_same(dense.clone(), _dense("mlp_tanh", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_products_carry_no_graph_without_anyone_to_differentiate_them(kind: str) -> None:
    problem = problems.load("mlp_tanh")
    for mode in MODES:
        hv = KINDS[kind](problem, mode) @ oracles.random_like(problem.params, 1)
        assert not any(leaf.requires_grad for leaf in hv.values())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_require_gradients_give_the_same_matrix(kind: str) -> None:
    problem = problems.load("mlp_tanh")
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    live = problems.Problem(
        "live", problem.f, params, problem.args, problem.model_fn, problem.loss_fn
    )
    oracles.assert_same(KINDS[kind](live).dense().detach(), _dense("mlp_tanh", kind))


def test_autograd_through_an_operators_trace_is_the_third_derivative() -> None:
    p = torch.tensor([1.0, 2.0]).double().requires_grad_()
    trace = exact_trace(hessian_operator(lambda p: (p**4).sum() + p.prod() ** 3, p))
    (slope,) = torch.autograd.grad(trace, p)
    q = torch.tensor([1.0, 2.0]).double().requires_grad_()
    expected = (12 * q**2).sum() + 6 * q[0] * q[1] ** 3 + 6 * q[1] * q[0] ** 3
    oracles.assert_same(slope, torch.autograd.grad(expected, q)[0])


@pytest.mark.parametrize("mode", MODES)
def test_vmap_of_an_exact_trace_over_params_equals_a_loop(mode: Any) -> None:
    f = lambda p: torch.tanh(p).prod() + (p**4).sum()  # noqa: E731
    points = torch.randn(3, 4).double()
    together = torch.func.vmap(lambda p: exact_trace(hessian_operator(f, p, mode=mode)))(points)
    oracles.assert_same(together, torch.stack([oracles.hessian(f, p).trace() for p in points]))


def test_the_functional_gradient_of_an_exact_trace_equals_that_of_autograd() -> None:
    f = lambda p: torch.tanh(p).prod() + (p**4).sum()  # noqa: E731
    p = torch.tensor([0.3, -0.5, 0.9]).double()
    functional = torch.func.grad(lambda p: exact_trace(hessian_operator(f, p)))(p)
    q = p.clone().requires_grad_()
    (plain,) = torch.autograd.grad(exact_trace(hessian_operator(f, q)), q)
    truth = oracles.directional_derivative(lambda p: oracles.hessian(f, p).trace(), p, p)
    oracles.assert_same(functional, plain)
    assert float(functional @ p) == pytest.approx(float(truth), rel=1e-7)


# -------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_all_products_are_with_one_matrix(kind: str, mode: Any) -> None:
    problem = problems.load("dropout")
    op = KINDS[kind](problem, mode)
    dense = op.dense(chunk_size=10)
    oracles.assert_same(dense, dense.T, 1e-12)
    v = oracles.random_like(problem.params, 1)
    expected = oracles.like(dense @ oracles.flat(v), problem.params)
    oracles.assert_same(op @ v, expected, 1e-12)
    stacked = {k: torch.stack([leaf, 2 * leaf]) for k, leaf in v.items()}
    oracles.assert_same({k: leaf[0] for k, leaf in op.mm(stacked).items()}, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_two_operators_with_dropout_are_two_matrices(kind: str) -> None:
    problem = problems.load("dropout")
    assert oracles.relative_error(KINDS[kind](problem).dense(), KINDS[kind](problem).dense()) > 1e-2


def test_modes_agree_on_the_dropout_mask_of_a_seed() -> None:
    problem = problems.load("dropout")
    matrices = []
    for mode in MODES:
        torch.manual_seed(5)
        matrices.append(_hessian(problem, mode).dense())
    oracles.assert_same(matrices[1], matrices[0], 1e-12)
    oracles.assert_same(matrices[2], matrices[0], 1e-12)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"a": 1.0}, TypeError, r"At \['a'\] got float"),
        ({}, ValueError, "params has no tensor"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, ValueError, r"At \['a'\] got torch\.int64"),
    ],
)
def test_wrong_params_are_refused_with_their_place(
    params: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^hessian_operator: .*{words}"):
        hessian_operator(lambda p: p, params)
    with pytest.raises(error, match=f"^ggn_operator: .*{words}"):
        ggn_operator(lambda p, x: p, lambda z, y: z, params, None, None)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hessian_operator: mode must be one of 'auto'.*got 'x'"):
        hessian_operator(lambda p: p.sum(), torch.ones(2), mode="x")
    with pytest.raises(ValueError, match=r"^ggn_operator: mode must be one of 'auto'.*got 'x'"):
        ggn_operator(lambda p, x: p, lambda z, y: z.sum(), torch.ones(2), None, None, mode="x")


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_several_elements_is_refused_when_the_operator_is_made(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"^hessian_operator: .*one element, got shape \(2,\)"):
        hessian_operator(lambda p: p**2, torch.ones(2), mode=mode)
    with pytest.raises(ValueError, match=r"^ggn_operator: .*one element, got shape \(2,\)"):
        ggn_operator(lambda p, x: p, lambda z, y: z, torch.ones(2), None, None, mode=mode)


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
    product = peer @ torch.cat([v[name].flatten() for name in names])
    ours = KINDS[kind](problem) @ v
    assert oracles.relative_error(torch.cat([ours[name].flatten() for name in names]), product) < 1e-10
