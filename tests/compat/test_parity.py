"""The published package, called beside us: the same numbers, and the differences of docs/migration.md."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torch_secorder", reason="the published package needs Python 3.11")
pytestmark = pytest.mark.peers

# ---------------------------------------------------------------------------- the same inputs


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _cnn() -> nn.Sequential:
    flat = (nn.Flatten(), nn.Linear(8, 2))
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), *flat).double()


def _regression(build: Callable[[], nn.Module] = _mlp) -> tuple[Any, ...]:
    x = _randn(5, 1, 3, 3) if build is _cnn else _randn(5, 3)
    return build(), nn.MSELoss(), x, _randn(5, 2)


def _classification() -> tuple[Any, ...]:
    return _mlp(), nn.CrossEntropyLoss(), _randn(5, 3), torch.tensor([0, 1, 1, 0, 1])


def _likelihood() -> tuple[Any, ...]:
    model, _, x, y = _classification()
    return model, model(x), y


def _vectors(model: nn.Module) -> list[Tensor]:
    return [torch.randn_like(p) for p in model.parameters()]


def _closure() -> tuple[Callable[[], Tensor], list[Tensor]]:
    model, loss_fn, x, y = _regression()
    return lambda: loss_fn(model(x), y), list(model.parameters())


def _closure_and_vectors() -> tuple[Any, ...]:
    func, params = _closure()
    return func, params, [torch.randn_like(p) for p in params]


def _outputs(count: int | None = None) -> tuple[Any, ...]:
    """Return a closure with a vector output, its parameters, and one vector or `count` for them."""
    model, x = _mlp(), _randn(5, 3)
    params = list(model.parameters())
    size = () if count is None else (count,)
    return lambda: model(x), params, [_randn(*size, *p.shape) for p in params]


def _outputs_and_covectors(count: int | None = None) -> tuple[Any, ...]:
    func, params, _ = _outputs()
    return func, params, _randn(*(() if count is None else (count,)), 5, 2)


def _matrix() -> tuple[Callable[[Tensor], Tensor], int]:
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    matrix = basis @ torch.diag(torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])) @ basis.T
    return lambda v: matrix @ v, 6


def _eigenproblem() -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    return model, lambda m, x, y: F.mse_loss(m(x), y), torch.randn(8, 3), torch.randn(8, 1)


def _surface(directions: int) -> tuple[Any, ...]:
    model, loss_fn, x, y = (*_regression(),)
    model, x, y = model.float(), x.float(), y.float()
    return model, loss_fn, x, y, *(_vectors(model) for _ in range(directions))


def _model_and(what: str) -> tuple[Any, ...]:
    model, x = _mlp(), _randn(5, 3)
    return model, x, _vectors(model) if what == "vectors" else _randn(5, 2)


def _model_products() -> tuple[Any, ...]:
    model, loss_fn, x, y = _regression()
    return model, loss_fn, x, y, _vectors(model)


def _params() -> tuple[list[Tensor]]:
    return (list(_mlp().parameters()),)


GRAPH = {"create_graph": True}
SAME: list[tuple[str, Callable[[], tuple[Any, ...]], dict[str, Any]]] = [
    ("core.hvp.exact_hvp", _closure_and_vectors, {}),
    ("core.hvp.exact_hvp", _closure_and_vectors, GRAPH),
    ("core.hvp.model_hvp", _model_products, {}),
    ("core.hvp.model_hvp", _model_products, GRAPH),
    ("core.hessian_diagonal.hessian_diagonal", _closure, {}),
    ("core.hessian_diagonal.hessian_diagonal", _closure_and_vectors, {}),
    ("core.hessian_diagonal.hessian_diagonal", _closure, GRAPH),
    ("core.hessian_diagonal.model_hessian_diagonal", _regression, {}),
    ("core.hessian_trace.hessian_trace", _closure, {"num_samples": 3}),
    ("core.hessian_trace.model_hessian_trace", _classification, {}),
    ("core.gvp.jvp", _outputs, {}),
    ("core.gvp.vjp", _outputs_and_covectors, {}),
    ("core.gvp.vjp", _outputs_and_covectors, GRAPH),
    ("core.gvp.model_jvp", lambda: _model_and("vectors"), {}),
    ("core.gvp.model_vjp", lambda: _model_and("covector"), {}),
    ("core.gvp.batch_jvp", lambda: _outputs(3), {}),
    ("core.gvp.batch_vjp", lambda: _outputs_and_covectors(3), {}),
    ("core.gvp.full_jacobian", lambda: _outputs()[:2], {}),
    ("core.gvp.full_jacobian", lambda: _outputs()[:2], GRAPH),
    ("core.utils.flatten_params", _params, {}),
    ("core.utils.get_param_shapes", _params, {}),
    ("core.utils.unflatten_params", lambda: (_randn(12), [torch.Size([3, 4])]), {}),
    ("core.utils.get_params_by_module_type", lambda: (_cnn(), nn.Linear), {}),
    ("core.utils.get_params_by_module_type", lambda: (_cnn(), [nn.Linear, nn.Conv2d]), {}),
    ("core.utils.get_params_by_module_type", lambda: (_cnn(), (nn.Sequential, nn.Tanh)), {}),
    ("core.utils.get_params_by_name_pattern", lambda: (_cnn(), "weight"), {}),
    ("core.per_layer_curvature.per_layer_hessian_diagonal", lambda: _regression(_cnn), {}),
    ("core.per_layer_curvature.per_layer_hessian_diagonal", _classification, GRAPH),
    ("core.per_layer_curvature.per_layer_fisher_diagonal", lambda: _regression(_cnn), {}),
    ("core.per_layer_curvature.per_layer_fisher_diagonal", _classification, GRAPH),
    (
        "core.per_layer_curvature.get_layer_curvature_stats",
        lambda: ({"a": _randn(4), "b": _randn(2, 3)},),
        {},
    ),
    ("approximations.fisher_diagonal.empirical_fisher_diagonal", _regression, {}),
    ("approximations.fisher_diagonal.empirical_fisher_diagonal", _classification, {}),
    ("approximations.fisher_diagonal.generalized_fisher_diagonal", _likelihood, {}),
    ("approximations.fisher_diagonal.generalized_fisher_diagonal", _likelihood, GRAPH),
    ("approximations.fisher_trace.empirical_fisher_trace", _classification, {"num_samples": 4}),
    ("approximations.fisher_trace.generalized_fisher_trace", _likelihood, {}),
    ("approximations.fisher_trace.generalized_fisher_trace", _likelihood, GRAPH),
    ("approximations.gauss_newton.gauss_newton_matrix_approximation", _regression, {}),
    ("approximations.gauss_newton.gauss_newton_matrix_approximation", _regression, GRAPH),
    ("analysis.eigensolvers.power_iteration", _matrix, {"num_iterations": 500, "tol": 1e-9}),
    ("analysis.eigensolvers.lanczos", _matrix, {"num_iterations": 6}),
    ("analysis.eigensolvers.lanczos_iteration", _matrix, {"num_iterations": 6}),
    (
        "analysis.eigensolvers.model_eigenvalues",
        _eigenproblem,
        {"method": "power_iteration", "num_iterations": 500, "tol": 1e-9},
    ),
    ("analysis.eigensolvers.estimate_eigenvalues", _eigenproblem, {"num_iterations": 4}),
    ("analysis.landscape.compute_loss_surface_1d", lambda: _surface(1), {"num_points": 7}),
    ("analysis.landscape.compute_loss_surface_2d", lambda: _surface(2), {"num_points": 5}),
    ("analysis.landscape.create_random_direction", lambda: (_mlp(),), {}),
]
"""Function, its arguments, its options. Both packages get arguments made from one seed."""

SINGLE = ("approximations.fisher_trace", "analysis")
"""Where the package computes in float32 whatever the parameters are."""


def _functions(path: str) -> tuple[Any, Any]:
    module, name = path.rsplit(".", 1)
    theirs = importlib.import_module(f"torch_secorder.{module}")
    ours = importlib.import_module(f"secorder_func.compat.{module}")
    return getattr(theirs, name), getattr(ours, name)


def _called(function: Any, make: Callable[[], tuple[Any, ...]], options: dict[str, Any]) -> Any:
    torch.manual_seed(17)
    args = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def _parts(result: Any) -> list[tuple[str, Tensor]]:
    """Return every tensor or number in a result with its place."""
    if isinstance(result, dict):
        pairs = list(result.items())
    elif isinstance(result, torch.Size):
        return [("", torch.tensor(result))]
    elif isinstance(result, (list, tuple)):
        pairs = [(str(index), item) for index, item in enumerate(result)]
    elif isinstance(result, Tensor):
        return [("", result)]
    else:
        return [("", torch.tensor(float(result), dtype=torch.float64))]
    return [(f"{key}.{place}", part) for key, item in pairs for place, part in _parts(item)]


@pytest.mark.parametrize(
    ("path", "make", "options"), SAME, ids=[f"{p.split('.', 1)[1]}-{sorted(o)}" for p, _, o in SAME]
)
def test_both_packages_give_the_same(
    path: str, make: Callable[[], tuple[Any, ...]], options: dict[str, Any]
) -> None:
    theirs, ours = (_called(f, make, options) for f in _functions(path))
    expected, found = _parts(theirs), _parts(ours)
    assert [place for place, _ in found] == [place for place, _ in expected]
    assert any(part.abs().max() > 0 for _, part in expected)
    rtol = 1e-4 if path.startswith(SINGLE) else 1e-9
    if (
        "method" in options
    ):  # the package stops when its eigenvalues stand still, its vectors not quite
        rtol = 1e-3
    for (place, e), (_, f) in zip(expected, found, strict=True):
        assert f.shape == e.shape, place
        e, f = e.detach().double(), f.detach().double()
        if "eigen" in path or "lanczos" in path:  # eigenvectors have no sign
            e, f = e.abs(), f.abs()
        torch.testing.assert_close(f, e, rtol=rtol, atol=rtol)
    if options == GRAPH:
        assert any(part.requires_grad for _, part in found)


def test_every_function_of_the_package_is_compared_or_listed_as_different() -> None:
    from tests.compat.test_signatures import _functions as all_functions

    different = {
        "core.hvp.approximate_hvp",
        "core.hvp.gauss_newton_product",
        "core.hvp.hessian_trace",
    }
    every = {f"{path[1:]}.{name}" for path, name in all_functions()}
    assert {path for path, _, _ in SAME} | different == every


# ---------------------------------------------------------------------------- within tolerance


def test_estimates_of_the_product_agree_with_the_exact_one_and_ours_is_nearer() -> None:
    theirs, ours = _functions("core.hvp.approximate_hvp")
    exact = [
        e.detach() for e in _called(_functions("core.hvp.exact_hvp")[0], _closure_and_vectors, {})
    ]

    def error(function: Any, damping: float) -> float:
        found = _called(function, _closure_and_vectors, {"damping": damping})
        torch.manual_seed(17)
        v = _closure_and_vectors()[2]
        return max(
            float((f - e - damping * t).abs().max())
            for f, e, t in zip(found, exact, v, strict=True)
        )

    for damping in (0.0, 0.5):
        assert error(theirs, damping) < 1e-3
        assert error(ours, damping) < 1e-7


def test_estimates_of_the_trace_have_one_mean() -> None:
    theirs, ours = _functions("core.hvp.hessian_trace")
    exact = float(_called(_functions("core.hessian_trace.hessian_trace")[0], _closure, {}))
    samples = 400
    # |v.Hv - tr H| has a spread of at most sqrt(2) |H| for one probe
    func, params = (torch.manual_seed(17), _closure())[1]
    gradient = torch.autograd.grad(func(), params, create_graph=True)
    rows = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(entry, params, retain_graph=True)])
        for g in gradient
        for entry in g.reshape(-1)
    ]
    error = math.sqrt(2 / samples) * float(torch.stack(rows).norm())
    for function in (theirs, ours):
        found = _called(function, _closure, {"num_samples": samples})
        assert abs(found - exact) < 4 * error


# -------------------------------------------------------------------------------- differences


def _w() -> Tensor:
    return torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


def test_difference_form_of_a_product_in_one_parameter() -> None:
    theirs, ours = _functions("core.hvp.exact_hvp")
    w = _w()
    assert isinstance(theirs(lambda: (w**3).sum(), [w], [torch.ones_like(w)]), Tensor)
    assert isinstance(ours(lambda: (w**3).sum(), [w], [torch.ones_like(w)]), list)


def test_difference_one_tensor_for_several_parameters() -> None:
    theirs, ours = _functions("core.hvp.exact_hvp")
    w, b, flat = _w(), _w(), torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)

    def loss() -> Tensor:
        return (w**3 * b).sum()  # H_ww = 6 w b, H_wb = 3 w^2, H_bb = 0

    assert [h.tolist() for h in theirs(loss, [w, b], flat[:2])] == [[6.0, 0.0], [3.0, 0.0]]
    assert ours(loss, [w, b], flat).tolist() == [12.0, 0.0, 3.0, 0.0]


def test_difference_a_vector_that_broadcasts() -> None:
    theirs, ours = _functions("core.hvp.exact_hvp")
    w, v = _w(), torch.ones(1, dtype=torch.float64)
    assert theirs(lambda: (w**3).sum(), [w], v).tolist() == [6.0, 12.0]
    with pytest.raises(ValueError, match=r"Expected shape \(2,\)"):
        ours(lambda: (w**3).sum(), [w], v)


def test_difference_an_unused_parameter() -> None:
    theirs, ours = _functions("core.hvp.exact_hvp")
    w, u = _w(), _w()
    vectors = [torch.ones_like(w), torch.ones_like(w)]
    with pytest.raises(RuntimeError, match="not have been used"):
        theirs(lambda: (w**3).sum(), [w, u], vectors)
    assert [h.tolist() for h in ours(lambda: (w**3).sum(), [w, u], vectors)] == [
        [6.0, 12.0],
        [0, 0],
    ]


def test_difference_the_gauss_newton_product() -> None:
    theirs, ours = _functions("core.hvp.gauss_newton_product")
    model, loss_fn, x, y = nn.Linear(3, 2).double(), nn.MSELoss(), _randn(5, 3), _randn(5, 2)
    v = _vectors(model)
    assert all(not h.any() for h in theirs(model, loss_fn, x, y, v))
    # of a linear model and a mean of squares over 10 numbers: 2/10 J^T J v
    slope = 0.2 * (x @ v[0].T + v[1])
    found = ours(model, loss_fn, x, y, v)
    torch.testing.assert_close(found[0], slope.T @ x)
    torch.testing.assert_close(found[1], slope.sum(0))


def test_difference_sparse_probes() -> None:
    theirs, ours = _functions("core.hvp.hessian_trace")
    w = torch.ones(500, dtype=torch.float64, requires_grad=True)
    options = {"num_samples": 50, "sparse": True}
    assert theirs(lambda: (w**2).sum(), [w], **options) == pytest.approx(100.0, rel=0.1)
    assert ours(lambda: (w**2).sum(), [w], **options) == pytest.approx(1000.0, rel=0.1)


def test_difference_the_rest_of_a_vector_that_is_too_long() -> None:
    theirs, ours = _functions("core.utils.unflatten_params")
    assert [p.shape for p in theirs(torch.ones(3), [torch.Size([2])])] == [(2,)]
    with pytest.raises(ValueError, match=r"must have shape \(2,\)"):
        ours(torch.ones(3), [torch.Size([2])])


def test_difference_transposed_tensors_and_tuples_for_shapes() -> None:
    theirs, ours = _functions("core.utils.flatten_params")
    p = torch.arange(6.0).reshape(2, 3).t()
    with pytest.raises(RuntimeError, match="view"):
        theirs([p])
    assert ours([p]).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    theirs, ours = _functions("core.utils.unflatten_params")
    with pytest.raises(AttributeError):
        theirs(torch.ones(2), [(2,)])
    assert ours(torch.ones(2), [(2,)])[0].tolist() == [1.0, 1.0]


def test_difference_an_exception_in_the_loss_of_a_layer() -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError

    for name in ("per_layer_hessian_diagonal", "per_layer_fisher_diagonal"):
        theirs, ours = _functions(f"core.per_layer_curvature.{name}")
        for function, kept in ((theirs, False), (ours, True)):
            model = _mlp()
            with pytest.raises(KeyError):
                function(model, fails, _randn(5, 3), _randn(5, 2))
            assert all(p.requires_grad for p in model.parameters()) is kept


class _Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_difference_layers_that_are_unused_or_empty() -> None:
    x, y = _randn(5, 3), _randn(5, 2)
    for name in ("per_layer_hessian_diagonal", "per_layer_fisher_diagonal"):
        theirs, ours = _functions(f"core.per_layer_curvature.{name}")
        with pytest.raises((RuntimeError, ValueError)):
            theirs(_Spare(), F.mse_loss, x, y)
        found = ours(_Spare(), F.mse_loss, x, y)
        assert (found["used"].count_nonzero(), found["spare"].tolist()) == (8, [0.0] * 8)
        with pytest.raises((RuntimeError, ValueError)):
            theirs(_mlp(), F.mse_loss, x, y, layer_types=[nn.Tanh])
        assert ours(_mlp(), F.mse_loss, x, y, layer_types=[nn.Tanh])["1"].shape == (0,)


def test_difference_statistics_of_one_entry_and_of_none() -> None:
    theirs, ours = _functions("core.per_layer_curvature.get_layer_curvature_stats")
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert math.isnan(theirs({"a": torch.ones(1)})["a"]["std"])
    assert math.isnan(ours({"a": torch.ones(1)})["a"]["std"])
    with pytest.warns(UserWarning, match="degrees"), pytest.raises(RuntimeError, match="max"):
        theirs({"a": torch.ones(0)})
    assert math.isnan(ours({"a": torch.ones(0)})["a"]["max"])


def test_difference_fisher_of_a_model_with_frozen_or_unused_parameters() -> None:
    x, y = _randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    frozen = _mlp()
    frozen[0].requires_grad_(False)
    for model in (_Spare(), frozen):
        for path, args in (
            ("fisher_diagonal.empirical_fisher_diagonal", (F.cross_entropy, x, y)),
            ("fisher_trace.empirical_fisher_trace", (F.cross_entropy, x, y)),
            ("fisher_diagonal.generalized_fisher_diagonal", (model(x), y)),
            ("fisher_trace.generalized_fisher_trace", (model(x), y)),
        ):
            theirs, ours = _functions(f"approximations.{path}")
            with pytest.raises(RuntimeError, match=r"require grad|not have been used"):
                theirs(model, *args)
            assert any(part.any() for _, part in _parts(ours(model, *args)))


def test_difference_the_dtype_of_fisher_traces() -> None:
    theirs, ours = _functions("approximations.fisher_trace.empirical_fisher_trace")
    model, loss_fn, x, y = _classification()
    exact = sum(
        g.square().sum() for g in torch.autograd.grad(loss_fn(model(x), y), [*model.parameters()])
    )
    assert theirs(model, loss_fn, x, y).dtype == torch.float32
    assert float(theirs(model, loss_fn, x, y)) != float(exact)
    torch.testing.assert_close(ours(model, loss_fn, x, y), exact, rtol=1e-14, atol=0.0)


def test_difference_buffers_of_the_model() -> None:
    for path in (
        "approximations.fisher_diagonal.empirical_fisher_diagonal",
        "approximations.fisher_trace.empirical_fisher_trace",
        "core.per_layer_curvature.per_layer_fisher_diagonal",
        "core.per_layer_curvature.per_layer_hessian_diagonal",
    ):
        for function, batches in zip(_functions(path), (True, False), strict=True):
            model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
            function(model, nn.MSELoss(), _randn(5, 3), _randn(5, 2))
            assert bool(model[1].num_batches_tracked) is batches
