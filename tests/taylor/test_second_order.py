"""Second-order propagation: every rule against double backward, whole models against dense Hessians, and its edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    CurvatureFallbackWarning,
    NoExactRouteError,
    bilinear_form,
    exact_diagonal,
    exact_trace,
    functional_loss,
    ggn_operator,
    hessian_operator,
    hutchinson_laplacian,
    hutchinson_trace,
    laplacian,
    quadratic_form,
    tree,
)
from secorder_func.taylor.second_order.registry import CLOSED, WRITTEN, closed, rewritten
from secorder_func.transforms.forms import forms_of_loss
from secorder_func.transforms.loss import flat_loss
from tests import oracles, problems
from tests.taylor.functions import BINARY, PRODUCTS, UNARY
from tests.taylor.test_rules import _loss

Fn = Callable[..., Any]


def forms(f: Fn, params: Any, vectors: list[Any], groups: int, *args: Any) -> Tensor:
    """Return the sums of `v . Hv` over groups of vectors."""
    loss = flat_loss(f, params, args, {}, has_aux=False, where="forms")
    stacks = [
        torch.stack(list(rows)) for rows in zip(*map(oracles.leaves_of, vectors), strict=True)
    ]
    draws = [lambda stack=stack: stack for stack in stacks]
    return forms_of_loss(loss, draws, len(vectors), groups)[0]


def assert_forms(f: Fn, params: Any, *args: Any, rtol: float = 1e-10, model: Any = None) -> None:
    """Compare forms of six vectors, alone and in groups, with products by double backward."""
    vectors = [oracles.random_like(params, seed) for seed in range(6)]
    products = [oracles.hvp(f, params, v, *args, model=model) for v in vectors]
    pairs = list(zip(vectors, products, strict=True))
    exact = torch.stack(
        [oracles.real_flat(v).double() @ oracles.real_flat(p).double() for v, p in pairs]
    )
    size = max(float(oracles.real_flat(v).norm() * oracles.real_flat(p).norm()) for v, p in pairs)
    for groups in (6, 3, 1):
        found = forms(f, params, vectors, groups, *args).double()
        gap = (found - exact.unflatten(0, (groups, -1)).sum(1)).abs().max()
        assert float(gap) <= 6 // groups * rtol * size, (groups, float(gap), size)


CASES = {
    **{name: (f, [(2, 3)]) for name, f in UNARY.items()},
    **{name: (f, [(2, 3), (3,)]) for name, f in BINARY.items()},
    **PRODUCTS,
}


@pytest.mark.parametrize("name", CASES)
def test_a_function(name: str) -> None:
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(2)
    p = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    if name == "as_strided":  # reads terms in memory of their own as if they were one
        with pytest.raises(NoExactRouteError, match="as_strided"):
            forms(_loss(function), p, [p, p], 1)
        return
    assert_forms(_loss(function), p, rtol=1e-5 if name == "dtypes" else 1e-10)


def test_the_losses_above_bend() -> None:
    """A wrong second derivative of these functions would be seen: the forms are far from zero."""
    for name in ("gelu", "softmax", "layer_norm", "linear", "conv2d", "log_softmax"):
        function, shapes = CASES[name]
        p = [torch.randn(shape).double() for shape in shapes]
        v = [torch.randn(shape).double() for shape in shapes]
        assert abs(float(forms(_loss(function), p, [v], 1))) > 1e-4


@pytest.mark.parametrize("name", sorted(set(problems.BUILDERS) - {"dropout", "encoder_train"}))
def test_whole_models(name: str) -> None:
    problem = problems.load(name)
    if problem.random:
        pytest.skip("two evaluations draw different numbers")
    assert_forms(
        problem.f,
        problem.params,
        *problem.args,
        rtol=max(10 * problem.rtol, 1e-10),
        model=problem.model,
    )


@pytest.mark.parametrize(
    "name", ["mlp_gelu", "cnn_batchnorm_eval", "tied_embeddings", "nested_tree"]
)
def test_trace_and_diagonal_are_those_of_the_dense_hessian(name: str) -> None:
    problem = problems.load(name)
    H = oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    op = hessian_operator(problem.f, problem.params, *problem.args)
    oracles.assert_same(oracles.flat(exact_diagonal(op)), H.diagonal(), 1e-10)
    assert float(exact_trace(op)) == pytest.approx(float(H.trace()), rel=1e-10)
    found = hutchinson_trace(op, 400, generator=torch.Generator().manual_seed(0))
    assert found.by_propagation
    assert found.degrees_of_freedom == 399 // 16 or found.degrees_of_freedom > 7
    low, high = found.interval(0.9999)
    assert low < H.trace() < high
    off = H - H.diagonal().diag()
    exact_error = math.sqrt(2 * float(off.square().sum()) / 400)
    assert 0.5 * exact_error < float(found.standard_error) < 2 * exact_error


@pytest.mark.parametrize("count", [1, 2, 7, 8, 16, 33, 100])
def test_any_number_of_probes_gives_the_numbers_of_the_products(count: int) -> None:
    problem = problems.load("mlp_gelu")
    H = oracles.hessian(problem.f, problem.params, *problem.args, model=problem.model)
    op = hessian_operator(problem.f, problem.params, *problem.args)
    from secorder_func.algorithms.probes import rademacher

    generator = torch.Generator().manual_seed(4)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(4)))
    V = tree.ravel(rademacher(seed, range(count), op.like), batch_dims=1)[0]
    expected = ((V @ H) * V).sum(1).mean()
    for chunk in ("auto", 1, 3, None):
        generator.manual_seed(4)
        found = hutchinson_trace(op, count, generator=generator, chunk_size=chunk)
        assert float(found.value) == pytest.approx(float(expected), rel=1e-9)
        assert math.isinf(float(found.standard_error)) == (count == 1)


def test_no_probe_is_an_error() -> None:
    op = hessian_operator(lambda p: (p**3).sum(), torch.ones(2))
    with pytest.raises(ValueError, match="num_matvecs"):
        hutchinson_trace(op, 0)


def test_the_gauss_newton_forms_are_those_of_the_dense_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))

    def outputs(params: Any, x: Tensor) -> Any:
        return torch.func.functional_call(model, params, (x,))

    G = oracles.ggn(outputs, F.cross_entropy, params, x, y)
    op = ggn_operator(outputs, F.cross_entropy, params, x, y)
    assert float(exact_trace(op)) == pytest.approx(float(G.trace()), rel=1e-10)
    found = hutchinson_trace(op, 200, generator=torch.Generator().manual_seed(1))
    assert found.by_propagation
    low, high = found.interval(0.9999)
    assert low < G.trace() < high


def test_the_forms_of_every_sample_are_those_of_their_own_hessians() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    u, v = oracles.random_like(params, 1), oracles.random_like(params, 2)
    one, _ = functional_loss(model, nn.CrossEntropyLoss())
    for i in range(7):
        hv = oracles.hvp(one, params, v, x[i : i + 1], y[i : i + 1])
        for found, w in (
            (quadratic_form(f)(params, v, x, y), v),
            (bilinear_form(f)(params, u, v, x, y), u),
        ):
            assert found.shape == (7,)
            assert float(found[i]) == pytest.approx(float(oracles.dot(w, hv)), rel=1e-10)


def test_a_bilinear_form_is_symmetric_and_right_for_vectors_of_unlike_sizes() -> None:
    problem = problems.load("mlp_gelu")
    u, v = oracles.random_like(problem.params, 1), oracles.random_like(problem.params, 2)
    u = tree.scale(1e6, u)
    exact = oracles.dot(
        u, oracles.hvp(problem.f, problem.params, v, *problem.args, model=problem.model)
    )
    for a, b in ((u, v), (v, u)):
        found = bilinear_form(problem.f)(problem.params, a, b, *problem.args)
        assert float(found) == pytest.approx(float(exact), rel=1e-9)


# ---------------------------------------------------------------------------------- Laplacian


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    ).double()


def test_the_laplacian_is_the_trace_of_the_dense_hessian() -> None:
    model, x = _network(), torch.randn(6, 5).double()

    def f(x: Tensor) -> Tensor:
        return model(x).squeeze(-1)

    exact = torch.stack([torch.autograd.functional.hessian(f, row).trace() for row in x])
    oracles.assert_same(laplacian(f, per_sample=True)(x), exact, 1e-10)
    assert float(laplacian(f)(x[0]).detach()) == pytest.approx(float(exact[0]), rel=1e-10)
    whole = torch.autograd.functional.hessian(lambda x: f(x).sum() ** 2, x).reshape(30, 30).trace()
    assert float(laplacian(lambda x: f(x).sum() ** 2)(x).detach()) == pytest.approx(
        float(whole), rel=1e-10
    )
    found = hutchinson_laplacian(
        f, 2000, per_sample=True, generator=torch.Generator().manual_seed(0)
    )(x)
    low, high = found.interval(0.99999)
    assert found.by_propagation
    assert bool(((low < exact) & (exact < high)).all())


def test_the_laplacian_of_harmonic_functions_is_zero_and_of_a_gaussian_known() -> None:
    x = torch.randn(4, 3).double()
    harmonic = laplacian(lambda x: x[:, 0].exp() * x[:, 1].sin(), per_sample=True)(x)
    assert float(harmonic.abs().max()) < 1e-12
    squares = (x**2).sum(-1)
    gaussian = laplacian(lambda x: (-(x**2).sum(-1) / 2).exp(), per_sample=True)(x)
    oracles.assert_same(gaussian, (squares - 3) * (-squares / 2).exp(), 1e-10)


def test_a_differentiated_laplacian_takes_products() -> None:
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    found = laplacian(lambda x: (x**4).sum(-1), per_sample=True)(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    oracles.assert_same(gradient, 24 * x.detach(), 1e-10)


def test_samples_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="do not depend on each other"):
        laplacian(lambda x: (x * x.mean(0)).sum(-1), per_sample=True)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="do not depend on each other"):  # by products, too
        laplacian(lambda x: (x * x.mean(0)).sum(-1), per_sample=True)(
            torch.randn(4, 3, requires_grad=True)
        )
    with pytest.raises(ValueError, match="one value a sample"):
        laplacian(lambda x: x.sum(), per_sample=True)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="leading axis"):
        laplacian(lambda x: x, per_sample=True)(torch.randn(()))


# -------------------------------------------------------------------------------------- edges


def test_without_a_rule_products_follow_with_a_warning() -> None:
    torch.manual_seed(0)
    p, v = torch.eye(3).double() + 0.1 * torch.randn(3, 3).double(), torch.randn(3, 3).double()
    f = lambda p: torch.linalg.eigvalsh(p @ p.T).pow(2).sum()  # noqa: E731
    exact = oracles.dot(v, oracles.hvp(f, p, v))
    with pytest.warns(CurvatureFallbackWarning, match="no second-order rule for linalg_eigvalsh"):
        found = quadratic_form(f)(p, v)
    assert float(found) == pytest.approx(float(exact), rel=1e-9)
    with pytest.warns(CurvatureFallbackWarning):
        both = quadratic_form(lambda p: torch.stack([f(p), 2 * f(p)]))(p, v)
    oracles.assert_same(both, torch.stack([exact, 2 * exact]), 1e-9)
    trace = hutchinson_trace(hessian_operator(f, p), 4)
    assert not trace.by_propagation
    assert "products" in str(trace)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_what_hides_its_tensors_is_never_taken_for_a_constant() -> None:
    p, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    for f in (lambda p: _Hidden.apply(p).sum(), lambda p: (_Hidden.apply(p) * p).sum()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureFallbackWarning)
            found = quadratic_form(f)(p, v)
        assert float(found) == pytest.approx(float(oracles.dot(v, oracles.hvp(f, p, v))), rel=1e-5)


def test_gradients_that_a_loss_stops_stay_stopped() -> None:
    p, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, -3.0]).double()

    def quietly(p: Tensor) -> Tensor:
        with torch.no_grad():
            factor = p.exp()
        return (factor * p**2 + p.detach() * p**3 + p.data * p**2).sum()

    assert_forms(quietly, p)
    assert float(quadratic_form(quietly)(p, v)) != 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_any_grad_mode_and_nothing_is_left_changed(context: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    v = tree.map(torch.randn_like, params)
    exact = oracles.dot(v, oracles.hvp(f, params, v, x, y))
    with context():
        found = quadratic_form(f)(params, v, x, y)
    assert float(found) == pytest.approx(float(exact), rel=1e-3)
    assert not found.requires_grad
    assert all(bool((before[name] == t).all()) for name, t in model.state_dict().items())
    assert all(
        t.requires_grad == (name in dict(model.named_parameters()))
        for name, t in [(n, p) for n, p in model.named_parameters()]
    )
    assert not any(t.requires_grad for t in tree.flatten(params)[0])
    assert not x.requires_grad


def test_writes_inside_the_loss() -> None:
    buffer = torch.zeros(3, dtype=torch.float64)

    def f(p: Tensor) -> Tensor:
        y = p * 2
        y += p**2
        y.mul_(p).relu_()
        z = torch.zeros(3, dtype=torch.float64)
        z.copy_(y.sin())
        buffer.add_(p)
        return (y * z).sum() + buffer.pow(3).sum()

    def g(p: Tensor) -> Tensor:
        y = (2 * p + p**2) * p
        y = y.relu()
        return (y * y.sin()).sum() + p.pow(3).sum()

    p, v = torch.randn(3).double() + 1, torch.randn(3).double()
    exact = oracles.dot(v, oracles.hvp(g, p, v))
    assert float(forms(f, p, [v], 1)) == pytest.approx(float(exact), rel=1e-10)
    assert bool((buffer == 0).all())


def test_a_write_through_a_view_is_exact_by_products() -> None:
    def f(p: Tensor) -> Tensor:
        y = (2 * p).clone()
        y.view(-1).mul_(p)
        y.view(-1)[0] = p[1] ** 2
        return (y**3).sum()

    def g(p: Tensor) -> Tensor:
        return (torch.stack([p[1] ** 2, 2 * p[1] ** 2]) ** 3).sum()

    p, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, -1.0]).double()
    with pytest.warns(CurvatureFallbackWarning, match="several names"):
        found = quadratic_form(f)(p, v)
    exact = oracles.dot(v, oracles.hvp(g, p, v))
    assert float(found) == pytest.approx(float(exact), rel=1e-10)


def test_an_error_of_the_loss_is_the_users_own_and_leaves_nothing_behind() -> None:
    p = torch.ones(2)

    def f(p: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        quadratic_form(f)(p, p)
    assert not p.requires_grad
    op = hessian_operator(lambda p: (p**2).sum(), p)
    assert float(hutchinson_trace(op, 3).value) == 4


def test_wrong_arguments_are_named() -> None:
    p = torch.ones(2)
    with pytest.raises(ValueError, match="quadratic_form"):
        quadratic_form(lambda p: p.sum())(p, torch.ones(3))
    with pytest.raises(TypeError, match="must be a tensor"):
        quadratic_form(lambda p: 3.0)(p, p)
    with pytest.raises(ValueError, match="real and floating"):
        quadratic_form(lambda p: p.sum().to(torch.complex64))(p, p)
    with pytest.raises(TypeError, match="quadratic_form"):
        quadratic_form(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence"):
        hutchinson_trace(hessian_operator(lambda p: (p**2).sum(), p), 2).interval(1.0)


def test_huge_values_nan_and_infinities_come_through() -> None:
    v = torch.ones(1, dtype=torch.float64)
    huge = torch.tensor([1e100], dtype=torch.float64)
    assert float(quadratic_form(lambda p: (p**3).sum())(huge, v)) == pytest.approx(6e100)
    assert math.isnan(float(quadratic_form(lambda p: (p**3).sum())(huge * math.nan, v)))
    assert math.isinf(float(quadratic_form(lambda p: p.exp().sum())(huge, v)))


def test_empty_scalar_unused_and_constant() -> None:
    params = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "unused": torch.ones(4)}
    v = tree.map(torch.ones_like, params)

    def f(p: Any) -> Tensor:
        return p["scalar"] ** 3 + (p["empty"] ** 2).sum()

    assert float(quadratic_form(f)(params, v)) == 12
    assert float(quadratic_form(lambda p: torch.tensor(1.0))(params, v)) == 0
    assert float(quadratic_form(lambda p: p["scalar"])(params, v)) == 0
    assert quadratic_form(lambda p: p["empty"].sum(1) * p["scalar"])(params, v).shape == (0,)
    diagonal = exact_diagonal(hessian_operator(f, params))
    assert float(diagonal["scalar"]) == 12
    assert diagonal["empty"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    v = tree.map(torch.randn_like, params)
    double = tree.map(Tensor.double, params), tree.map(Tensor.double, v)
    hv = oracles.hvp(f, *double, x.double(), y)
    size = float(oracles.flat(double[1]).norm() * oracles.flat(hv).norm())
    cast = [tree.map(lambda leaf: leaf.to(dtype), t) for t in (params, v)]
    found = quadratic_form(f)(*cast, x.to(dtype), y)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert abs(float(found) - float(oracles.dot(double[1], hv))) < tolerance * size


def test_inside_transforms_and_differentiated_it_is_exact_by_products() -> None:
    p = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rows = torch.eye(2, dtype=torch.float64)
    f = lambda p: (p**4).sum()  # noqa: E731
    mapped = torch.func.vmap(quadratic_form(f), in_dims=(None, 0))(p, rows)
    oracles.assert_same(mapped, 12 * p**2, 1e-10)
    gradient = torch.func.grad(lambda p: quadratic_form(f)(p, rows[1]))(p)
    oracles.assert_same(gradient, torch.tensor([0.0, 48.0]).double(), 1e-10)


def test_a_dropout_loss_has_one_matrix() -> None:
    torch.manual_seed(0)
    op = hessian_operator(lambda p: F.dropout(p**3, 0.5).sum(), torch.ones(50).double())
    first, second = exact_diagonal(op), exact_diagonal(op)
    assert bool((first == second).all())
    oracles.assert_same(first, op.dense().diagonal(), 1e-12)
    assert set(first.unique().tolist()) == {0.0, 12.0}


def test_a_parameter_changed_in_place_is_noticed() -> None:
    p = torch.ones(3)
    op = hessian_operator(lambda p: (p**3).sum(), p)
    p.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        hutchinson_trace(op, 4)


def test_a_function_has_one_second_order_rule() -> None:
    with pytest.raises(ValueError, match="two second-order rules"):
        closed(torch.exp)(lambda t, out, x: (None, None))
    with pytest.raises(ValueError, match="two second-order rules"):
        rewritten(F.layer_norm)(lambda x: x)
    assert torch.exp in CLOSED
    assert F.layer_norm in WRITTEN


def test_operators_made_of_others_keep_their_forms() -> None:
    op = hessian_operator(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]))
    assert float(exact_trace(op * 2)) == 36
    assert float(exact_trace(op.damped(1.0))) == 20
    assert float(exact_trace(op.flat())) == 18
    assert float(exact_trace(op + op)) == 36


def test_whole_numbers_beside_others_have_no_terms() -> None:
    labels, weights = torch.tensor([[0], [2]]), torch.tensor([1.0, -2.0, 0.5]).double()

    def f(p: Tensor) -> Tensor:
        places, powers = torch.broadcast_tensors(labels, p**3)
        return (powers.gather(1, places) * weights).sum()

    p, v = torch.randn(3).double(), torch.randn(3).double()
    oracles.assert_same(quadratic_form(f)(p, v), v @ oracles.hessian(f, p) @ v)
