"""`hvp` and `hvp_and_grad` against double backward, closed forms and their own identities."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import hvp, hvp_and_grad
from tests import oracles, problems

MODES = ["auto", "forward_over_reverse", "reverse_over_reverse"]
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
    oracles.assert_same(hv, hvp(problem.f)(problem.params, v, *problem.args), 0.0)


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


# ---------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_product_is_symmetric(name: str) -> None:
    problem = problems.load(name)
    u, v = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    product = hvp(problem.f)
    hu, hv = (product(problem.params, w, *problem.args) for w in (u, v))
    scale = oracles.dot(u, u).sqrt() * oracles.dot(hv, hv).sqrt()
    assert abs(oracles.dot(u, hv) - oracles.dot(v, hu)) <= 1e-12 * scale
    assert scale > 0


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_product_is_linear_in_v(name: str) -> None:
    problem = problems.load(name)
    u, v = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    product = hvp(problem.f)
    hu, hv = (product(problem.params, w, *problem.args) for w in (u, v))
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


@pytest.mark.parametrize("name", ["mlp_tanh", "layer_norm", "cnn_batchnorm_train", "linear_algebra"])
def test_jvp_of_the_product_is_the_third_derivative(name: str) -> None:
    problem = problems.load(name)
    v, u, w = (oracles.random_like(problem.params, seed) for seed in (1, 2, 3))

    def product(p: Any) -> Any:
        return hvp(problem.f)(p, v, *problem.args)

    _, tangent = torch.func.jvp(product, (problem.params,), (u,))
    truth = oracles.directional_derivative(
        lambda p: oracles.dot(
            w, oracles.hvp(problem.f, p, v, *problem.args, model=problem.model)
        ),
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


def test_the_hessian_of_a_quadratic_form_of_the_product_is_the_fourth_derivative() -> None:
    p, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
    form = lambda p: (v * hvp(lambda q: (q**5).sum())(p, v)).sum()  # noqa: E731
    hv = hvp(form)(p, v)
    oracles.assert_same(hv, 120 * p)


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
    oracles.relative_error(first, second)


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


# --------------------------------------------------------------------------------------- compile


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_gelu", "encoder_train", "encoder_eval"])
def test_compiled_without_graph_breaks_it_equals_eager(name: str, backend: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    eager = hvp(problem.f)(problem.params, v, *problem.args)
    torch._dynamo.reset()
    compiled = torch.compile(hvp(problem.f), fullgraph=True, backend=backend)
    oracles.assert_same(compiled(problem.params, v, *problem.args), eager, 1e-10)


# ------------------------------------------------------------------------------------- bad input

P = {"a": [torch.zeros(2, 3), torch.zeros(())]}


def _cubes(p: Any) -> Tensor:
    return (p["a"][0] ** 3).sum() + p["a"][1] ** 3


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
@pytest.mark.parametrize(
    ("v", "error", "words"),
    [
        (
            {"a": [torch.zeros(3, 2), torch.zeros(())]},
            ValueError,
            r"v must match params\. At \['a'\]\[0\] expected shape \(2, 3\), got \(3, 2\)",
        ),
        (
            {"a": [torch.zeros(2, 3), torch.zeros((), dtype=torch.float64)]},
            ValueError,
            r"At \['a'\]\[1\] expected dtype torch\.float32, got torch\.float64",
        ),
        (
            {"a": [torch.zeros(2, 3, device="meta"), torch.zeros(())]},
            ValueError,
            r"At \['a'\]\[0\] expected device cpu, got meta",
        ),
        (
            {"a": [torch.zeros(2, 3), 0.0]},
            TypeError,
            r"At \['a'\]\[1\] expected a tensor, got float",
        ),
        ({"b": [torch.zeros(2, 3), torch.zeros(())]}, TypeError, r"structure of params.*'a'.*'b'"),
        ({"a": (torch.zeros(2, 3), torch.zeros(()))}, TypeError, r"structure of params"),
        (torch.zeros(7), TypeError, r"structure of params"),
    ],
)
def test_a_wrong_v_is_refused_with_its_place(
    transform: Any, v: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{transform.__name__}: .*{words}") as caught:
        transform(_cubes)(P, v)
    assert "secorder_func.tree.random_like" in str(caught.value)


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"a": 1.0}, TypeError, r"At \['a'\] got float"),
        (torch.nn.Linear(2, 2), TypeError, r"At the root got Linear.*named_parameters"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, ValueError, r"At \['a'\] got torch\.int64"),
        ({"a": None}, ValueError, r"params has no tensor in it"),
    ],
)
def test_wrong_params_are_refused_with_their_place(
    transform: Any, params: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{transform.__name__}: .*{words}"):
        transform(lambda p: torch.zeros(()))(params, params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda p: p**2, ValueError, r"have one element, got shape \(3,\)"),
        (lambda p: 3.0, TypeError, r"be a tensor with one element, got float"),
        (lambda p: None, TypeError, r"got NoneType"),
        (lambda p: (p**2).sum() * 1j, ValueError, r"be real and floating, got torch\.complex"),
        (lambda p: (p > 0).sum(), ValueError, r"be real and floating, got torch\.int64"),
        (lambda p: ((p**2).sum(), "aux"), TypeError, r"got tuple"),
    ],
)
def test_a_loss_that_is_not_one_real_number_is_refused(
    loss: Any, error: type[Exception], words: str, mode: Any
) -> None:
    with pytest.raises(error, match=f"^hvp: the loss must .*{words}"):
        hvp(loss, mode=mode)(torch.ones(3), torch.ones(3))


def test_has_aux_without_a_pair_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^hvp: with has_aux=True .* \(loss, aux\), got Tensor"):
        hvp(lambda p: (p**2).sum(), has_aux=True)(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
def test_an_unknown_mode_is_refused_when_the_transform_is_made(transform: Any) -> None:
    with pytest.raises(ValueError, match=f"^{transform.__name__}: mode must be .*'auto'.*got 'fast'"):
        transform(_cubes, mode="fast")
