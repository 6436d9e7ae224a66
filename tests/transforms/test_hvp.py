"""`hvp` and `hvp_and_grad` against double backward, closed forms and their own identities."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from secorder_func import hvp, hvp_and_grad
from tests import oracles, problems

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
ALL = list(problems.BUILDERS)
DOUBLE = [n for n in ALL if problems.load(n).rtol <= 1e-10]
CLOSED = [n for n in ALL if problems.load(n).hessian is not None]
DETERMINISTIC = [n for n in DOUBLE if not problems.load(n).random]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_hvp_equals_double_backward(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    torch.manual_seed(5)
    hv = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    torch.manual_seed(5)
    expected = oracles.hvp(problem.f, problem.params, v, *problem.args, model=problem.model)
    oracles.assert_same(hv, expected, problem.rtol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLOSED)
def test_hvp_equals_the_hessian_by_formula_times_v(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 2)
    hv = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    expected = oracles.like(problem.hessian @ oracles.flat(v), problem.params)
    oracles.assert_same(hv, expected, 1e-12)


@pytest.mark.parametrize("name", CLOSED)
def test_the_oracle_itself_equals_the_hessian_by_formula(name: str) -> None:
    problem = problems.load(name)
    H = oracles.hessian(problem.f, problem.params, *problem.args)
    assert oracles.relative_error(H, problem.hessian) < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_hvp_and_grad_returns_the_gradient_of_autograd(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    torch.manual_seed(5)
    _, gradient = hvp_and_grad(problem.f, mode=mode)(problem.params, v, *problem.args)
    torch.manual_seed(5)
    expected = oracles.gradient(problem.f, problem.params, *problem.args, model=problem.model)
    oracles.assert_same(gradient, expected, problem.rtol)


@pytest.mark.parametrize("name", ["mlp_tanh", "nested_tree", "complex_parameters"])
def test_hvp_and_grad_returns_the_product_of_hvp(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    hv, _ = hvp_and_grad(problem.f)(problem.params, v, *problem.args)
    oracles.assert_same(hv, hvp(problem.f)(problem.params, v, *problem.args), 1e-13)


# ------------------------------------------------------------------------------- calling conventions


def test_keyword_arguments_reach_the_function() -> None:
    problem = problems.load("nested_tree")
    v = oracles.random_like(problem.params, 1)
    hv = hvp(problem.f)(problem.params, v, *problem.args, shift=-0.3)
    expected = oracles.hvp(
        lambda p, s: problem.f(p, s, shift=-0.3), problem.params, v, *problem.args
    )
    oracles.assert_same(hv, expected)


def test_the_result_keeps_the_key_order_and_node_types_of_params() -> None:
    problem = problems.load("nested_tree")
    hv = hvp(problem.f)(problem.params, oracles.random_like(problem.params, 1), *problem.args)
    assert list(hv) == list(problem.params)
    assert type(hv["a"]) is problems.Pair
    assert hv["z"][1] is None


def test_v_may_have_its_keys_in_another_order() -> None:
    params = {"b": torch.tensor(2.0), "a": torch.tensor(3.0)}
    v = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
    hv = hvp(lambda p: p["a"] ** 3 * p["b"])(params, v)
    assert (float(hv["a"]), float(hv["b"])) == (36.0, 27.0)


def test_an_unused_parameter_gets_zeros() -> None:
    problem = problems.load("frozen_and_unused")
    hv = hvp(problem.f)(problem.params, oracles.random_like(problem.params, 1), *problem.args)
    assert torch.equal(hv["unused"], torch.zeros(3, dtype=torch.float64))


def test_a_loss_of_shape_one_by_one_is_accepted() -> None:
    hv = hvp(lambda p: (p**3).sum().reshape(1, 1))(torch.tensor([2.0]), torch.tensor([1.0]))
    assert torch.equal(hv, torch.tensor([12.0]))


def test_aux_comes_back_with_tensors_and_anything_else_in_it() -> None:
    marker = object()

    def f(p: Tensor) -> tuple[Tensor, Any]:
        return (p**3).sum(), {"twice": 2 * p, "name": "run", "n": 7, "none": None, "it": [marker]}

    p = torch.tensor([1.0, 2.0])
    hv, aux = hvp(f, has_aux=True)(p, torch.ones(2))
    assert torch.equal(hv, torch.tensor([6.0, 12.0]))
    assert torch.equal(aux["twice"], 2 * p)
    assert (aux["name"], aux["n"], aux["none"], aux["it"][0] is marker) == ("run", 7, None, True)


def test_aux_carries_no_derivatives() -> None:
    p = torch.tensor([1.0, 2.0])
    _, aux = hvp(lambda p: ((p**3).sum(), 2 * p), has_aux=True)(p, torch.ones(2))
    assert not aux.requires_grad
    assert not torch._C._functorch.is_functorch_wrapped_tensor(aux)


@pytest.mark.parametrize("mode", MODES)
def test_hvp_and_grad_with_aux_returns_the_pair_and_the_aux(mode: Any) -> None:
    p = torch.tensor([1.0, 2.0])
    (hv, g), aux = hvp_and_grad(lambda p: ((p**3).sum(), "aux"), has_aux=True, mode=mode)(p, p)
    assert (hv.tolist(), g.tolist(), aux) == ([6.0, 24.0], [3.0, 12.0], "aux")


# ------------------------------------------------------------------------- the caller's surroundings


def _mlp_case() -> tuple[problems.Problem, Any, Any]:
    problem = problems.load("mlp_tanh")
    v = oracles.random_like(problem.params, 1)
    return problem, v, oracles.hvp(problem.f, problem.params, v, *problem.args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_change_the_product(context: Any, mode: Any) -> None:
    problem, v, expected = _mlp_case()
    with context():
        hv = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    oracles.assert_same(hv, expected)


def test_tensors_made_in_inference_mode_are_accepted() -> None:
    problem, _, _ = _mlp_case()
    with torch.inference_mode():
        params = optree.tree_map(torch.clone, problem.params)
        v = oracles.random_like(params, 1)
        hv = hvp(problem.f)(params, v, *problem.args)
    oracles.assert_same(hv, _mlp_case()[2])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    first, second = (hvp(problem.f)(problem.params, v, *problem.args) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(oracles.leaves_of(first), oracles.leaves_of(second), strict=True)
    )
    oracles.assert_acts(first, v)


def test_parameters_that_require_gradients_keep_values_and_grad() -> None:
    problem, v, expected = _mlp_case()
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    hv = hvp(problem.f)(params, v, *problem.args)
    oracles.assert_same(hv, expected)
    assert all(p.grad is None and torch.equal(p, problem.params[k]) for k, p in params.items())


def test_the_product_carries_no_graph_without_anyone_to_differentiate_it() -> None:
    problem, v, _ = _mlp_case()
    for mode in MODES:
        hv = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
        assert not any(leaf.requires_grad for leaf in hv.values())


def test_second_order_attention_leaves_the_callers_kernel_choice_alone() -> None:
    problem = problems.load("multihead_attention")
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    hvp(problem.f)(problem.params, oracles.random_like(problem.params, 1), *problem.args)
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
