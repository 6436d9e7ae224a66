"""How products compose: linearity, vmap, derivatives of products, compilation."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import hvp
from tests import oracles, problems
from tests.versions import needs_traceable_trees

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
DETERMINISTIC = [
    n for n in problems.BUILDERS if problems.load(n).rtol <= 1e-10 and not problems.load(n).random
]


# ---------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_product_is_symmetric(name: str) -> None:
    problem = problems.load(name)
    u, v = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    product = hvp(problem.f)
    hu, hv = (product(problem.params, w, *problem.args) for w in (u, v))
    scale = oracles.dot(u, u).sqrt() * oracles.dot(hv, hv).sqrt()
    assert abs(oracles.dot(u, hv) - oracles.dot(v, hu)) <= 1e-12 * scale
    oracles.assert_acts(hv, v)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_product_is_linear_in_v(name: str) -> None:
    problem = problems.load(name)
    u, v = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    product = hvp(problem.f)
    hu, hv = (product(problem.params, w, *problem.args) for w in (u, v))
    oracles.assert_acts(hv, v)
    both = product(problem.params, oracles.shifted(u, -2.5, v), *problem.args)
    oracles.assert_same(both, oracles.shifted(hu, -2.5, hv), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_vmap_over_v_equals_a_loop(name: str, mode: Any) -> None:
    problem = problems.load(name)
    vs = [oracles.random_like(problem.params, seed) for seed in range(3)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vs)
    leaves, spec = optree.tree_flatten(stacked)
    product = hvp(problem.f, mode=mode)

    def of_leaves(rows: list[Tensor]) -> list[Tensor]:
        return optree.tree_leaves(product(problem.params, spec.unflatten(rows), *problem.args))

    together = spec.unflatten(vmap(of_leaves)(leaves))
    loop = [product(problem.params, v, *problem.args) for v in vs]
    oracles.assert_acts(loop[0], vs[0])
    oracles.assert_same(together, optree.tree_map(lambda *rows: torch.stack(rows), *loop), 1e-12)


@pytest.mark.parametrize("name", ["quadratic", "rosenbrock", "softmax_regression", "mlp_gelu"])
def test_vmap_over_params_equals_a_loop(name: str) -> None:
    problem = problems.load(name)
    points = [oracles.random_like(problem.params, seed) for seed in range(3)]
    v = oracles.random_like(problem.params, 9)
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *points)
    product = hvp(problem.f)
    together = vmap(lambda p: product(p, v, *problem.args))(stacked)
    loop = [product(p, v, *problem.args) for p in points]
    oracles.assert_acts(loop[0], v)
    oracles.assert_same(together, optree.tree_map(lambda *rows: torch.stack(rows), *loop), 1e-12)


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "mlp_gelu", "encoder_train", "encoder_eval", "layer_norm"]
)
def test_vmap_over_samples_equals_a_loop(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    x, y = problem.args
    product = hvp(lambda p, x, y: problem.f(p, x[None], y[None]))
    together = vmap(product, in_dims=(None, None, 0, 0))(problem.params, v, x, y)
    loop = [product(problem.params, v, *sample) for sample in zip(x, y, strict=True)]
    oracles.assert_acts(loop[0], v)
    oracles.assert_same(together, optree.tree_map(lambda *rows: torch.stack(rows), *loop), 1e-12)


# ----------------------------------------------------------------------------- third derivatives

THIRD = [
    "rosenbrock",
    "mlp_tanh",
    "mlp_gelu",
    "cnn_batchnorm_train",
    "cnn_batchnorm_eval",
    "layer_norm",
    "instance_norm",
    "group_norm",
    "multihead_attention",
    "encoder_train",
    "encoder_eval",
    "lstm",
    "tied_embeddings",
    "linear_algebra",
    "nested_tree",
]


@pytest.mark.parametrize("name", THIRD)
def test_the_gradient_of_a_quadratic_form_is_the_third_derivative(name: str) -> None:
    problem = problems.load(name)
    v, u = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    leaves, spec = optree.tree_flatten(problem.params)

    def form(leaves: list[Tensor]) -> Tensor:
        return oracles.dot(v, hvp(problem.f)(spec.unflatten(leaves), v, *problem.args))

    def expected(p: Any) -> Tensor:
        return oracles.dot(v, oracles.hvp(problem.f, p, v, *problem.args, model=problem.model))

    third = spec.unflatten(torch.func.grad(form)(leaves))
    truth = oracles.directional_derivative(expected, problem.params, u)
    scale = (oracles.dot(u, u) * oracles.dot(third, third)).sqrt()
    assert abs(oracles.dot(u, third) - truth) <= 1e-6 * max(scale, abs(truth))
    assert abs(truth) > 1e-6


@pytest.mark.parametrize("name", THIRD)
def test_autograd_through_the_product_agrees_with_the_functional_gradient(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    leaves, spec = optree.tree_flatten(problem.params)

    def form(leaves: list[Tensor]) -> Tensor:
        return oracles.dot(v, hvp(problem.f)(spec.unflatten(leaves), v, *problem.args))

    functional = torch.func.grad(form)(leaves)
    variables = [leaf.clone().requires_grad_() for leaf in leaves]
    plain = torch.autograd.grad(form(variables), variables, materialize_grads=True)
    oracles.assert_same(list(plain), functional, 1e-10)


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "layer_norm", "cnn_batchnorm_train", "linear_algebra"]
)
def test_jvp_of_the_product_is_the_third_derivative(name: str) -> None:
    problem = problems.load(name)
    v, u, w = (oracles.random_like(problem.params, seed) for seed in (1, 2, 3))

    def product(p: Any) -> Any:
        return hvp(problem.f)(p, v, *problem.args)

    _, tangent = torch.func.jvp(product, (problem.params,), (u,))
    truth = oracles.directional_derivative(
        lambda p: oracles.dot(w, oracles.hvp(problem.f, p, v, *problem.args, model=problem.model)),
        problem.params,
        u,
    )
    scale = (oracles.dot(w, w) * oracles.dot(tangent, tangent)).sqrt()
    assert abs(oracles.dot(w, tangent) - truth) <= 1e-6 * scale


def test_the_derivative_in_v_is_the_hessian() -> None:
    problem = problems.load("quadratic")
    J = torch.func.jacrev(lambda v: hvp(problem.f)(problem.params, v))(torch.ones(7).double())
    oracles.assert_same(J, problem.hessian)


def test_the_derivative_in_an_argument_of_the_function_is_right() -> None:
    p, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    f = lambda p, scale: scale**2 * (p**3).sum()  # noqa: E731
    slope = torch.func.grad(lambda s: hvp(f)(p, v, s).sum())(torch.tensor(3.0))
    assert float(slope) == pytest.approx(2 * 3 * 6 * 3)


def test_differentiating_in_a_captured_tensor_is_refused_with_the_way_out() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    p = torch.tensor([3.0, 4.0])
    with pytest.raises(RuntimeError, match=r"^hvp: .*captures.*as an argument"):
        torch.autograd.grad(hvp(lambda p: (w * p**3).sum())(p, torch.ones(2)).sum(), w)


def test_the_hessian_of_a_quadratic_form_of_the_product_is_the_fourth_derivative() -> None:
    p, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
    form = lambda p: (v * hvp(lambda q: (q**5).sum())(p, v)).sum()  # noqa: E731
    hv = hvp(form)(p, v)
    oracles.assert_same(hv, 120 * p)


# --------------------------------------------------------------------------------------- compile


@needs_traceable_trees
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_gelu", "encoder_train", "encoder_eval"])
def test_compiled_without_graph_breaks_it_equals_eager(name: str, backend: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    eager = hvp(problem.f)(problem.params, v, *problem.args)
    torch._dynamo.reset()
    compiled = torch.compile(hvp(problem.f), fullgraph=True, backend=backend)
    oracles.assert_same(compiled(problem.params, v, *problem.args), eager, 1e-10)
