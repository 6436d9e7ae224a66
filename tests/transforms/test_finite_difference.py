"""`finite_difference_hvp` against exact products."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import finite_difference_hvp
from tests import oracles, problems


def _case(activation: Any, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Return a loss, its parameters and v in `dtype`, and the product exact in float64."""
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Linear(10, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(20, 4)
    ).to(dtype)
    x, y = torch.randn(32, 10, dtype=dtype), torch.randint(4, (32,))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params: Any) -> Tensor:
        outputs = torch.func.functional_call(model, params, (x.to(params["0.weight"].dtype),))
        return F.cross_entropy(outputs, y)

    v = oracles.random_like(params, 3)
    wide = optree.tree_map(Tensor.double, params)
    exact = oracles.hvp(f, wide, optree.tree_map(Tensor.double, v))
    return f, params, v, exact


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Mish])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_it_is_close_to_the_exact_product(activation: Any, dtype: torch.dtype, rtol: float) -> None:
    f, params, v, exact = _case(activation, dtype)
    assert oracles.relative_error(finite_difference_hvp(f)(params, v), exact) < rtol


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Mish])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 10])
def test_more_steps_are_not_worse_than_one(
    activation: Any, dtype: torch.dtype, num_steps: int
) -> None:
    f, params, v, exact = _case(activation, dtype)
    one = oracles.relative_error(finite_difference_hvp(f)(params, v), exact)
    several = oracles.relative_error(
        finite_difference_hvp(f, num_steps=num_steps)(params, v), exact
    )
    assert several <= 1.5 * one


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_the_length_of_v_does_not_change_the_relative_error(scale: float) -> None:
    f, params, v, exact = _case(nn.Tanh, torch.float64)
    estimate = finite_difference_hvp(f)(params, optree.tree_map(lambda x: scale * x, v))
    assert oracles.relative_error(estimate, optree.tree_map(lambda x: scale * x, exact)) < 1e-7


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_quadratic_is_exact_up_to_rounding(num_steps: int) -> None:
    problem = problems.load("quadratic")
    v = oracles.random_like(problem.params, 1)
    estimate = finite_difference_hvp(problem.f, num_steps=num_steps)(problem.params, v)
    oracles.assert_same(estimate, problem.hessian @ v, 1e-9)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_v_of_zeros_gives_zeros(num_steps: int) -> None:
    f, params, v, _ = _case(nn.Tanh, torch.float64)
    zero = optree.tree_map(torch.zeros_like, v)
    estimate = finite_difference_hvp(f, num_steps=num_steps)(params, zero)
    assert all(torch.equal(estimate[name], zero[name]) for name in params)


def test_the_tree_of_the_result_is_that_of_params() -> None:
    problem = problems.load("nested_tree")
    v = oracles.random_like(problem.params, 1)
    estimate = finite_difference_hvp(problem.f)(problem.params, v, *problem.args, shift=0.2)
    expected = oracles.hvp(
        lambda p, s: problem.f(p, s, shift=0.2), problem.params, v, *problem.args
    )
    oracles.assert_same(estimate, expected, 1e-7)


@pytest.mark.parametrize("name", ["complex_parameters", "encoder_train", "cnn_batchnorm_train"])
def test_it_is_close_on_other_problems(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    estimate = finite_difference_hvp(problem.f)(problem.params, v, *problem.args)
    exact = oracles.hvp(problem.f, problem.params, v, *problem.args, model=problem.model)
    assert oracles.relative_error(estimate, exact) < 1e-6


def test_it_works_where_no_exact_route_exists() -> None:
    p = torch.tensor([0.3, -0.2, 0.9]).double()
    x = torch.randn(3, 3).double()
    f = lambda p: F.multi_margin_loss((x * p) ** 2, torch.tensor([0, 1, 2]))  # noqa: E731
    v = torch.ones(3).double()
    gradient = lambda q: oracles.gradient(f, q)  # noqa: E731
    truth = (gradient(p + 1e-5 * v) - gradient(p - 1e-5 * v)) / 2e-5
    assert oracles.relative_error(finite_difference_hvp(f)(p, v), truth) < 1e-6


# ---------------------------------------------------------------------------------------- damping


def test_damping_adds_a_multiple_of_v() -> None:
    problem = problems.load("quadratic")
    v = oracles.random_like(problem.params, 1)
    estimate = finite_difference_hvp(problem.f, damping=2.5)(problem.params, v)
    oracles.assert_same(estimate, problem.hessian @ v + 2.5 * v, 1e-9)


# ------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("num_steps", [1, 4])
def test_all_points_of_the_difference_share_one_dropout_mask(num_steps: int) -> None:
    problem = problems.load("dropout")
    v = oracles.random_like(problem.params, 1)
    torch.manual_seed(5)
    estimate = finite_difference_hvp(problem.f, num_steps=num_steps)(
        problem.params, v, *problem.args
    )
    torch.manual_seed(5)
    exact = oracles.hvp(problem.f, problem.params, v, *problem.args)
    assert oracles.relative_error(estimate, exact) < 1e-7


def test_the_random_state_afterwards_is_that_of_one_evaluation() -> None:
    problem = problems.load("dropout")
    torch.manual_seed(5)
    problem.f(problem.params, *problem.args)
    once = torch.get_rng_state()
    torch.manual_seed(5)
    finite_difference_hvp(problem.f, num_steps=3)(
        problem.params, oracles.random_like(problem.params, 1), *problem.args
    )
    assert torch.equal(torch.get_rng_state(), once)


# ------------------------------------------------------------------------- the parameters' safety


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_parameters_are_bit_identical_after_an_exception_in_the_loss(failing_call: int) -> None:
    calls = 0

    def f(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise ArithmeticError("the user's own")
        return (p**3).sum()

    p = torch.tensor([0.1, 1 / 3, 1e-8])
    before, version = p.clone(), p._version
    with pytest.raises(ArithmeticError, match="the user's own"):
        finite_difference_hvp(f, num_steps=2)(p, torch.ones(3))
    assert torch.equal(p, before)
    assert p._version == version


def test_running_statistics_do_not_move() -> None:
    problem = problems.load("cnn_batchnorm_train")
    before = [b.clone() for b in problem.model.buffers()]
    v = oracles.random_like(problem.params, 1)
    finite_difference_hvp(problem.f, num_steps=2)(problem.params, v, *problem.args)
    assert all(torch.equal(b, a) for b, a in zip(problem.model.buffers(), before, strict=True))


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("num_steps", [0, -1])
def test_fewer_than_one_step_is_refused(num_steps: int) -> None:
    with pytest.raises(
        ValueError, match=f"^finite_difference_hvp: num_steps must be at least 1, got {num_steps}"
    ):
        finite_difference_hvp(lambda p: p.sum(), num_steps=num_steps)


def test_a_wrong_v_is_refused_with_its_place() -> None:
    with pytest.raises(
        ValueError, match=r"^finite_difference_hvp: .*At \['a'\] expected shape \(2,\), got \(3,\)"
    ):
        finite_difference_hvp(lambda p: p["a"].sum())({"a": torch.ones(2)}, {"a": torch.ones(3)})


def test_a_v_of_another_structure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^finite_difference_hvp: v must have the structure"):
        finite_difference_hvp(lambda p: p.sum())(torch.ones(2), [torch.ones(2)])


def test_a_loss_of_several_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^finite_difference_hvp: .*got shape \(2,\)"):
        finite_difference_hvp(lambda p: p**2)(torch.ones(2), torch.ones(2))
