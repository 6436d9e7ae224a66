"""`ggnvp` against the dense `J^T H_L J`."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import ggnvp, hvp
from tests import oracles, problems
from tests.versions import needs_traceable_trees

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
MODELS = problems.model_names()
DETERMINISTIC = [n for n in MODELS if not problems.load(n).random]
LINEAR = [n for n in MODELS if problems.load(n).linear]
CONVEX = [n for n in DETERMINISTIC if problems.load(n).convex and problems.load(n).rtol <= 1e-10]


def _product(problem: problems.Problem, v: Any, mode: Any = "auto") -> Any:
    return ggnvp(problem.model_fn, problem.loss_fn, mode=mode)(problem.params, v, *problem.args)


def _dense(problem: problems.Problem) -> Tensor:
    return oracles.ggn(
        problem.model_fn, problem.loss_fn, problem.params, *problem.args, model=problem.model
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_ggnvp_equals_the_dense_product(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    torch.manual_seed(5)
    gv = _product(problem, v, mode)
    torch.manual_seed(5)
    expected = oracles.like(_dense(problem) @ oracles.flat(v), problem.params)
    oracles.assert_same(gv, expected, problem.rtol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LINEAR)
def test_it_is_the_hessian_of_a_model_linear_in_its_parameters(name: str, mode: Any) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    oracles.assert_same(
        _product(problem, v, mode), hvp(problem.f)(problem.params, v, *problem.args), 1e-12
    )


def test_it_is_not_the_hessian_of_a_model_that_is_not_linear() -> None:
    problem = problems.load("mlp_tanh")
    v = oracles.random_like(problem.params, 1)
    hv = hvp(problem.f)(problem.params, v, *problem.args)
    assert oracles.relative_error(_product(problem, v), hv) > 1e-2


@pytest.mark.parametrize("name", CONVEX)
def test_it_is_positive_semidefinite_where_the_loss_is_convex(name: str) -> None:
    problem = problems.load(name)
    for seed in range(5):
        v = oracles.random_like(problem.params, seed)
        gv = _product(problem, v)
        scale = (oracles.dot(v, v) * oracles.dot(gv, gv)).sqrt()
        assert scale > 0
        assert oracles.dot(v, gv) >= -1e-13 * scale


def test_it_is_indefinite_where_the_loss_is_not_convex() -> None:
    problem = problems.load("mlp_nonconvex")
    eigenvalues = torch.linalg.eigvalsh(_dense(problem))
    v = oracles.like(torch.linalg.eigh(_dense(problem))[1][:, 0], problem.params)
    assert oracles.dot(v, _product(problem, v)) == pytest.approx(float(eigenvalues[0]), rel=1e-10)
    assert eigenvalues[0] < 0


@pytest.mark.parametrize("name", ["mlp_tanh", "tree_outputs", "encoder_train", "mlp_nonconvex"])
def test_the_product_is_symmetric(name: str) -> None:
    problem = problems.load(name)
    u, v = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    gu, gv = _product(problem, u), _product(problem, v)
    scale = (oracles.dot(u, u) * oracles.dot(gv, gv)).sqrt()
    assert abs(oracles.dot(u, gv) - oracles.dot(v, gu)) <= 1e-13 * scale


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp_tanh", "tree_outputs", "encoder_train", "layer_norm"])
def test_vmap_over_v_equals_a_loop(name: str, mode: Any) -> None:
    problem = problems.load(name)
    vs = [oracles.random_like(problem.params, seed) for seed in range(3)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vs)
    together = vmap(lambda v: _product(problem, v, mode))(stacked)
    loop = [_product(problem, v, mode) for v in vs]
    oracles.assert_same(together, optree.tree_map(lambda *rows: torch.stack(rows), *loop), 1e-12)


def test_vmap_over_samples_equals_a_loop() -> None:
    problem = problems.load("mlp_gelu")
    v = oracles.random_like(problem.params, 1)
    x, y = problem.args
    product = ggnvp(
        lambda p, x: problem.model_fn(p, x[None]), lambda z, y: problem.loss_fn(z, y[None])
    )
    together = vmap(product, in_dims=(None, None, 0, 0))(problem.params, v, x, y)
    loop = [product(problem.params, v, *sample) for sample in zip(x, y, strict=True)]
    oracles.assert_same(together, optree.tree_map(lambda *rows: torch.stack(rows), *loop), 1e-12)


@pytest.mark.parametrize(
    "name",
    ["mlp_tanh", "mlp_gelu", "layer_norm", "cnn_batchnorm_train", "encoder_train", "mlp_nonconvex"],
)
def test_the_gradient_of_a_quadratic_form_is_right(name: str) -> None:
    problem = problems.load(name)
    v, u = (oracles.random_like(problem.params, seed) for seed in (1, 2))

    def form(p: Any) -> Tensor:
        return oracles.dot(v, ggnvp(problem.model_fn, problem.loss_fn)(p, v, *problem.args))

    def expected(p: Any) -> Tensor:
        w = oracles.flat(v)
        G = oracles.ggn(problem.model_fn, problem.loss_fn, p, *problem.args, model=problem.model)
        return w @ G @ w

    third = torch.func.grad(form)(problem.params)
    truth = oracles.directional_derivative(expected, problem.params, u)
    scale = (oracles.dot(u, u) * oracles.dot(third, third)).sqrt()
    assert abs(oracles.dot(u, third) - truth) <= 1e-6 * scale
    assert abs(truth) > 1e-6


def test_the_callers_gradient_mode_does_not_change_the_product() -> None:
    problem = problems.load("mlp_tanh")
    v = oracles.random_like(problem.params, 1)
    expected = oracles.like(_dense(problem) @ oracles.flat(v), problem.params)
    for context in (torch.no_grad, torch.inference_mode):
        for mode in MODES:
            with context():
                oracles.assert_same(_product(problem, v, mode), expected)


def test_parameters_that_require_gradients_are_accepted() -> None:
    problem = problems.load("mlp_tanh")
    v = oracles.random_like(problem.params, 1)
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    gv = ggnvp(problem.model_fn, problem.loss_fn)(params, v, *problem.args)
    oracles.assert_same(gv, oracles.like(_dense(problem) @ oracles.flat(v), problem.params))


@needs_traceable_trees
@pytest.mark.parametrize("name", ["mlp_tanh", "encoder_train"])
def test_compiled_without_graph_breaks_it_equals_eager(name: str) -> None:
    problem = problems.load(name)
    v = oracles.random_like(problem.params, 1)
    torch._dynamo.reset()
    compiled = torch.compile(
        ggnvp(problem.model_fn, problem.loss_fn), fullgraph=True, backend="aot_eager"
    )
    oracles.assert_same(compiled(problem.params, v, *problem.args), _product(problem, v), 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_integer_outputs_reach_the_loss_without_being_differentiated(mode: Any) -> None:
    w, x = torch.tensor([1.0, -2.0, 3.0]).double(), torch.eye(3).double()

    def model(w: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"z": x @ w, "count": torch.arange(3)}

    def loss(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
        return (outputs["z"] ** 2 * outputs["count"]).sum()

    gv = ggnvp(model, loss, mode=mode)(w, torch.ones_like(w), x, None)
    oracles.assert_same(gv, torch.tensor([0.0, 2.0, 4.0]).double())


# ------------------------------------------------------------------------------------- bad input

W, X, Y = torch.ones(3), torch.eye(3), torch.zeros(3)


def _squares(z: Tensor, y: Tensor) -> Tensor:
    return ((z - y) ** 2).sum()


def _linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


def test_a_wrong_v_is_refused_with_its_place() -> None:
    with pytest.raises(
        ValueError, match=r"^ggnvp: .*At the root expected shape \(3,\), got \(4,\)"
    ):
        ggnvp(_linear, _squares)(W, torch.ones(4), X, Y)


def test_a_v_of_another_structure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^ggnvp: v must have the structure of params"):
        ggnvp(_linear, _squares)(W, {"w": W}, X, Y)


def test_params_that_are_not_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^ggnvp: every leaf of params .*At \['w'\] got int"):
        ggnvp(_linear, _squares)({"w": 3}, {"w": 3}, X, Y)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_floating_outputs_is_refused(mode: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^ggnvp: model_fn must return .*floating tensor, got float"
    ):
        ggnvp(lambda w, x: 1.0, _squares, mode=mode)(W, W, X, Y)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_several_elements_is_refused(mode: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^ggnvp: the loss must have one element, got shape \(3,\)"
    ):
        ggnvp(_linear, lambda z, y: z - y, mode=mode)(W, W, X, Y)


def test_an_unknown_mode_is_refused_when_the_transform_is_made() -> None:
    with pytest.raises(ValueError, match=r"^ggnvp: mode must be .*got 'exact'"):
        ggnvp(_linear, _squares, mode="exact")
