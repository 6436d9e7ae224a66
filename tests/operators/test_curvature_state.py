"""What operators keep, detect and refuse; derivatives through their products; dropout."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

from secorder_func import (
    exact_trace,
    ggn_operator,
    hessian_operator,
)
from tests import oracles, problems
from tests.operators.kinds import KINDS, dense_of, hessian_of

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]


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
    with pytest.raises(RuntimeError, match=r"parameter was changed in place.*new operator"):
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
    oracles.assert_same(dense.clone(), dense_of("mlp_tanh", kind))


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
    oracles.assert_same(KINDS[kind](live).dense().detach(), dense_of("mlp_tanh", kind))


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_quadratic_form_in_v_is_twice_the_product(kind: str, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    op = KINDS[kind](problem, mode)
    v = oracles.random_like(problem.params, 1)
    slope = torch.func.grad(lambda v: oracles.dot(v, op @ v))(v)
    oracles.assert_same(slope, optree.tree_map(lambda leaf: 2 * leaf, op @ v), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_autograd_through_a_product_reaches_v(kind: str, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    op = KINDS[kind](problem, mode)
    v = oracles.random_like(problem.params, 1)
    w = {name: leaf.clone().requires_grad_() for name, leaf in v.items()}
    slopes = torch.autograd.grad(oracles.dot(w, op @ w), list(w.values()))
    expected = optree.tree_map(lambda leaf: 2 * leaf, op @ v)
    oracles.assert_same(dict(zip(w, slopes, strict=True)), expected, 1e-12)


# -------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_all_products_are_with_one_matrix(kind: str, mode: Any) -> None:
    problem = problems.load("dropout")
    op = KINDS[kind](problem, mode)
    dense = op.dense(chunk_size=10)
    oracles.assert_same(dense, dense.T, 1e-12)
    oracles.assert_acts(dense, torch.eye(len(dense)).double())
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
        matrices.append(hessian_of(problem, mode).dense())
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
