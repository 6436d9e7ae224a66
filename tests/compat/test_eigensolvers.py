"""The eigen-solvers of the documented surface: against dense Hessians, against the package, and where it differs."""

from __future__ import annotations

import inspect
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func.compat import analysis
from secorder_func.compat.analysis import eigensolvers as ours
from secorder_func.compat.analysis.eigensolvers import (
    lanczos,
    model_eigenvalues,
    power_iteration,
)
from secorder_func.errors import ArgumentError, ConvergenceWarning, NonFiniteError
from tests import oracles
from tests.algorithms.matrices import with_spectrum
from tests.compat.closures import Stateful, double_backward, same, snapshot, stateful
from tests.problems import Partial

METHODS = ["lanczos", "power_iteration"]
SOLVERS = {"lanczos": lanczos, "power_iteration": power_iteration}
each_method = pytest.mark.parametrize("method", METHODS)
GAPS = [8.0, 4.0, 2.0, *torch.linspace(-0.3, 0.3, 40).tolist()]


def _package() -> ModuleType:
    return pytest.importorskip(
        "torch_secorder.analysis.eigensolvers", reason="the published package needs Python 3.11"
    )


def _loss_fn(case: Stateful) -> Any:
    return lambda model, x, y: case.loss_fn(model(x), y)


def _solve(case: Stateful, count: int = 1, method: str = "lanczos", **options: Any) -> Any:
    return model_eigenvalues(
        case.model,
        _loss_fn(case),
        case.x,
        case.y,
        count,
        method,
        num_iterations=options.pop("num_iterations", 3000),
        **options,
    )


def _hessian(case: Stateful) -> Tensor:
    """Return the dense Hessian in all parameters by double backward, one column at a time."""
    params = case.params
    free = [p for p in params if p.requires_grad]
    columns = []
    for index, param in enumerate(params):
        for entry in range(param.numel()):
            unit = [torch.zeros_like(p) for p in params]
            unit[index].view(-1)[entry] = 1
            if not param.requires_grad:
                columns.append(torch.cat([t.reshape(-1) * 0 for t in unit]))
                continue
            v = [t for t, p in zip(unit, params, strict=True) if p.requires_grad]
            found = iter(double_backward(case.func, free, v, case.model))
            rows = [
                next(found) if p.requires_grad else torch.zeros_like(p, requires_grad=False)
                for p in params
            ]
            columns.append(torch.cat([r.reshape(-1) for r in rows]))
    return torch.stack(columns, 1).detach()


def _flat(vector: list[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in vector])


# ------------------------------------------------------------------------------- the package


def test_signatures_and_names_are_those_of_the_package() -> None:
    package = _package()
    assert sorted(ours.__all__) == sorted(package.__all__)
    for name in package.__all__:
        expected = inspect.signature(getattr(package, name)).parameters.values()
        found = inspect.signature(getattr(ours, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in found] == [
            (p.name, p.default, p.kind) for p in expected
        ]
    assert analysis.estimate_eigenvalues is model_eigenvalues
    assert analysis.lanczos_iteration is lanczos
    assert analysis.power_iteration is power_iteration


@each_method
def test_flat_products_agree_with_the_package_where_it_is_right(method: str) -> None:
    A = with_spectrum(GAPS).float()
    count = 1 if method == "lanczos" else 2  # more would have copies already
    values, vectors = getattr(_package(), method)(lambda v: A @ v, len(A), 14, count, 1e-6)
    found, X = SOLVERS[method](lambda v: A @ v, len(A), 100, count, 1e-6)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=0)
    torch.testing.assert_close((X.T @ vectors).abs(), torch.eye(count), rtol=0, atol=1e-3)


@each_method
def test_models_agree_with_the_package_where_it_is_right(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    args = (model, lambda m, x, y: F.mse_loss(m(x), y), x, y, 1, method)
    values, (vector,) = _package().model_eigenvalues(
        *args, num_iterations=12 if method == "lanczos" else 300
    )
    found, (ours_vector,) = model_eigenvalues(*args, num_iterations=500)
    torch.testing.assert_close(found, values, rtol=1e-3, atol=0)
    assert float((_flat(vector) @ _flat(ours_vector)).abs()) > 0.999


def test_a_difference_the_package_finds_one_eigenvalue_several_times() -> None:
    A = with_spectrum([100.0, 50.0, 20.0, *torch.linspace(0, 1, 300).tolist()]).float()
    torch.manual_seed(0)
    ghosts, X = _package().lanczos(lambda v: A @ v, len(A), 200, 3, 1e-6)
    assert float(ghosts[1]) == pytest.approx(100, abs=0.01)  # a copy that is not there
    assert float(F.cosine_similarity(X[:, 0], X[:, 1], dim=0).abs()) > 0.9
    found, X = lanczos(lambda v: A @ v, len(A), 200, 3, 1e-6)
    torch.testing.assert_close(found, torch.tensor([100.0, 50.0, 20.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(X.T @ X, torch.eye(3), rtol=0, atol=1e-5)


def test_a_difference_the_package_ends_in_an_invariant_subspace() -> None:
    values, _ = _package().lanczos(lambda v: 2 * v, 5, 100, 3)
    assert values.tolist() != pytest.approx([2.0] * 3, rel=1e-4)
    assert lanczos(lambda v: 2 * v, 5, 100, 3)[0].tolist() == pytest.approx([2.0] * 3, rel=1e-6)


def test_a_difference_one_iteration_is_enough_for_one_number() -> None:
    with pytest.raises((IndexError, RuntimeError, UnboundLocalError)):
        _package().lanczos(lambda v: 2 * v, 1, 1)
    assert lanczos(lambda v: 2 * v, 1, 1)[0].tolist() == [2.0]


def test_a_difference_power_iteration_multiplies_once_an_iteration() -> None:
    A, counts = with_spectrum(torch.linspace(0.9, 1, 50).tolist()).float(), [0, 0]

    def product(which: int) -> Any:
        def apply(V: Tensor) -> Tensor:
            counts[which] += 1
            return A @ V

        return apply

    _package().power_iteration(product(0), 50, 10, 1, 0.0)
    with pytest.warns(ConvergenceWarning):
        power_iteration(product(1), 50, 10, 1, 0.0)
    assert counts == [20, 10]


@each_method
def test_a_difference_small_eigenvalues_are_relative(method: str) -> None:
    A = (with_spectrum([3.0, -2.0, 1.0, 0.5]) * 1e-7).float()
    wrong, _ = getattr(_package(), method)(lambda v: A @ v, 4)
    assert float(wrong[0]) != pytest.approx(3e-7, rel=1e-2)
    assert float(SOLVERS[method](lambda v: A @ v, 4)[0][0]) == pytest.approx(3e-7, rel=1e-4)


@each_method
def test_a_difference_float64_products_work(method: str) -> None:
    A = with_spectrum(GAPS)
    with pytest.raises(RuntimeError):
        getattr(_package(), method)(lambda v: A @ v, len(A))
    values, vectors = SOLVERS[method](lambda v: A @ v, len(A), tol=1e-10)
    assert values.dtype == vectors.dtype == torch.float64
    assert abs(float(values[0]) - 8) < 1e-12


# ---------------------------------------------------------------------------- flat products


@pytest.mark.parametrize("count", [1, 3])
def test_products_are_given_what_the_package_gives_them(count: int) -> None:
    A, shapes = with_spectrum(GAPS).float(), set()

    def product(v: Tensor) -> Tensor:
        shapes.add(tuple(v.shape))
        assert v.is_contiguous()
        return A @ v

    for method, shape in (("lanczos", (43,)), ("power_iteration", (43, count))):
        shapes.clear()
        values, vectors = SOLVERS[method](product, 43, num_vectors=count)
        assert shapes == {shape}
        assert values.shape == (count,)
        assert vectors.shape == (43, count)
        torch.testing.assert_close(values, torch.tensor(GAPS[:count]), rtol=1e-5, atol=0)


@each_method
def test_the_first_product_is_made_once(method: str) -> None:
    A = with_spectrum(GAPS).float()
    first: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        first.append(v.clone())
        return A @ v

    torch.manual_seed(5)
    SOLVERS[method](product, 43)
    torch.manual_seed(5)
    drawn = torch.randn(43)
    cosine = float(first[0].flatten() @ drawn / drawn.norm())
    assert abs(cosine) == pytest.approx(1, rel=1e-6)
    assert abs(float(first[1].flatten() @ drawn / drawn.norm())) < 0.9999


@each_method
def test_the_global_seed_decides(method: str) -> None:
    A = with_spectrum(GAPS)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(SOLVERS[method](lambda v: A @ v, 43)[1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0].abs(), runs[2].abs())


@each_method
def test_the_default_dtype_is_tried_first(method: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert SOLVERS[method](lambda v: 2 * v, 3)[0].dtype == torch.float64
        A = with_spectrum(GAPS).float()
        assert SOLVERS[method](lambda v: A @ v, 43)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@each_method
def test_the_products_own_error_is_raised_and_the_first_one(method: str) -> None:
    seen = []

    def product(v: Tensor) -> Tensor:
        seen.append(v.dtype)
        raise RuntimeError(f"mine, with {v.dtype}")

    with pytest.raises(RuntimeError, match=r"^mine, with torch\.float32$"):
        SOLVERS[method](product, 3)
    assert seen[:2] == [torch.float32, torch.float64]


@each_method
def test_an_error_after_the_first_product_is_not_tried_again(method: str) -> None:
    A, calls = with_spectrum(GAPS).float(), []

    def product(v: Tensor) -> Tensor:
        calls.append(v.dtype)
        if len(calls) == 3:
            raise RuntimeError("mine")
        return A @ v

    with pytest.raises(RuntimeError, match=r"^mine$"):
        SOLVERS[method](product, 43)
    assert calls == [torch.float32] * 3


@each_method
def test_an_unfinished_iteration_warns_at_the_users_line_and_returns(method: str) -> None:
    A = with_spectrum(torch.linspace(0.9, 1, 100).tolist()).float()
    with pytest.warns(ConvergenceWarning, match="not converged in 5 iterations") as caught:
        values, vectors = SOLVERS[method](lambda v: A @ v, 100, 5)
    assert caught[0].filename == __file__
    worst = float((A @ vectors[:, 0] - values * vectors[:, 0]).norm())
    assert f"is {worst:.2g} where" in str(caught[0].message)
    assert 0.9 < float(values) <= 1


@each_method
def test_a_product_that_is_not_finite_is_an_error(method: str) -> None:
    with pytest.raises(NonFiniteError, match=f"^{method}: product 1 has NaN"):
        SOLVERS[method](lambda v: v * math.nan, 3)


@each_method
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 2.0}, "dim must be a whole number"),
        ({"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ({"num_vectors": 4}, "num_vectors must be at most dim, 3, got 4"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"tol": -1e-6}, "tol must be at least 0"),
        ({"tol": math.nan}, "tol must be at least 0"),
        ({"tol": "small"}, "tol must be a real number"),
        ({"device": 1.5}, "device must be a torch.device or its name"),
        ({"matrix_vector_product": torch.eye(3)}, "matrix_vector_product must be a function"),
        ({"matrix_vector_product": lambda v: v[:1]}, "must have the shape of its vectors"),
    ],
)
def test_bad_arguments_are_refused(method: str, options: dict[str, Any], pattern: str) -> None:
    given = {"matrix_vector_product": lambda v: v, "dim": 3, **options}
    with pytest.raises(ArgumentError, match=f"^{method}: .*{pattern}"):
        SOLVERS[method](**given)


def test_lanczos_refuses_fewer_steps_than_pairs() -> None:
    with pytest.raises(ArgumentError, match="num_iterations must be at least num_vectors"):
        lanczos(lambda v: v, 5, 2, 3)


# ------------------------------------------------------------------------------------ models


@each_method
@pytest.mark.parametrize(
    "name",
    ["mlp_tanh", "cnn_batchnorm_train", "lstm", "tied_embeddings", "encoder_eval", "layer_norm"],
)
def test_eigenpairs_are_those_of_the_dense_hessian(name: str, method: str) -> None:
    case = stateful(name)
    H = _hessian(case)
    before = snapshot(case.model)
    values, vectors = _solve(case, 3 if method == "lanczos" else 1, method, tol=1e-7)
    assert same(before, snapshot(case.model))
    expected = torch.linalg.eigvalsh(H)
    order = expected if method == "lanczos" else expected.abs()
    expected = expected[order.argsort(descending=True)][: len(values)]
    scale = float(torch.linalg.eigvalsh(H).abs().max())
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 * scale)
    for theta, vector in zip(values, vectors, strict=True):
        assert [v.shape for v in vector] == [p.shape for p in case.params]
        x = _flat(vector)
        assert float(x.norm()) == pytest.approx(1, rel=1e-12)
        assert float((H @ x - theta * x).norm()) < 1e-6 * scale


@each_method
def test_frozen_and_unused_parameters_have_zeros(method: str) -> None:
    case = stateful("frozen_and_unused")
    names = [name for name, _ in case.model.named_parameters()]
    values, vectors = _solve(case, 2, method)
    H = _hessian(case)
    for theta, vector in zip(values, vectors, strict=True):
        x = _flat(vector)
        torch.testing.assert_close(H @ x, theta * x, rtol=0, atol=1e-4 * float(values[0]))
        by_name = dict(zip(names, vector, strict=True))
        assert by_name["unused"].count_nonzero() == 0
        assert by_name["first.weight"].count_nonzero() == 0
        assert by_name["second.weight"].count_nonzero() > 0


def test_all_products_see_one_dropout_mask() -> None:
    case = stateful("dropout")
    torch.manual_seed(7)
    expected = torch.linalg.eigvalsh(_one_mask(case))[-1]
    torch.manual_seed(7)
    values, _ = _solve(case)
    torch.testing.assert_close(values[0], expected, rtol=1e-9, atol=0)


def _one_mask(case: Stateful) -> Tensor:
    gradient = torch.autograd.grad(case.func(), case.params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    return torch.stack(
        [_flat(list(torch.autograd.grad(g, case.params, retain_graph=True))) for g in flat]
    )


@each_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_the_call_change_nothing(method: str, mode: Any) -> None:
    case = stateful("mlp_tanh")
    torch.manual_seed(0)
    expected, vectors = _solve(case, 1, method)
    torch.manual_seed(0)
    with mode():
        values, inside = _solve(case, 1, method)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(inside, vectors)
    assert not inside[0][0].is_inference()


def test_an_exception_in_the_loss_passes_and_leaves_the_model_alone() -> None:
    case = stateful("cnn_batchnorm_train")
    before = snapshot(case.model)

    def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model_eigenvalues(case.model, broken, case.x, case.y)
    assert same(before, snapshot(case.model))


def test_the_loss_is_evaluated_once() -> None:
    case, calls = stateful("mlp_tanh"), []

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return case.loss_fn(model(x), y)

    model_eigenvalues(case.model, loss_fn, case.x, case.y)
    assert len(calls) == 1


def test_data_and_target_may_be_anything() -> None:
    case = stateful("mlp_tanh")

    def loss_fn(model: nn.Module, data: Any, target: None) -> Tensor:
        return case.loss_fn(model(data["x"]), data["y"])

    values, _ = model_eigenvalues(case.model, loss_fn, {"x": case.x, "y": case.y}, None)
    torch.testing.assert_close(values, _solve(case)[0])


@each_method
def test_parameters_of_two_dtypes_keep_them_in_the_vectors(method: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Parameter(torch.randn(3))
            self.wide = nn.Parameter(torch.randn(2, 3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * (self.wide @ self.narrow.double())).square().sum()

    model = Mixed()
    values, (vector,) = model_eigenvalues(
        model, lambda m, x, y: m(x), torch.ones(2).double(), None, 1, method, 2000, 1e-5
    )
    assert values.dtype == torch.float64
    assert [v.dtype for v in vector] == [torch.float32, torch.float64]
    assert float(_flat([v.double() for v in vector]).norm()) == pytest.approx(1, rel=1e-6)


def test_a_half_precision_model_has_vectors_in_half_precision() -> None:
    case = stateful("bfloat16")
    values, (vector,) = _solve(case, 1)
    assert values.dtype == torch.float32
    assert {v.dtype for v in vector} == {torch.bfloat16}
    double = stateful("bfloat16")
    double.model.double()
    truth = Stateful(double.model, double.loss_fn, double.x.double(), double.y.double())
    expected = torch.linalg.eigvalsh(_hessian(truth))[-1]
    assert float(values[0]) == pytest.approx(float(expected), rel=0.05)
    double.model.bfloat16()


def test_a_device_is_where_the_results_are() -> None:
    case = stateful("mlp_tanh")
    for device in ("cpu", torch.device("cpu")):
        values, (vector,) = _solve(case, 1, device=device)
        assert values.device == vector[0].device == torch.device("cpu")


@pytest.mark.parametrize("method", ["LANCZOS", "Power_Iteration"])
def test_the_method_is_known_in_any_case(method: str) -> None:
    case = stateful("mlp_tanh")
    torch.testing.assert_close(
        _solve(case, 1, method)[0], _solve(case, 1, method.lower())[0], rtol=1e-6, atol=0
    )


def test_an_unfinished_iteration_of_a_model_warns() -> None:
    case = stateful("mlp_tanh")
    with pytest.warns(ConvergenceWarning, match="^model_eigenvalues: not converged in 2") as caught:
        _solve(case, 1, num_iterations=2)
    assert caught[0].filename == __file__


def test_bad_arguments_of_the_model_are_refused() -> None:
    model, x, y = nn.Linear(2, 1), torch.ones(1, 2), torch.ones(1, 1)
    loss_fn = lambda m, x, y: F.mse_loss(m(x), y)  # noqa: E731
    with pytest.raises(ValueError, match="method must be 'lanczos' or 'power_iteration', got 'qr'"):
        model_eigenvalues(model, loss_fn, x, y, method="qr")
    with pytest.raises(ArgumentError, match=r"num_eigenvalues must be at most .*, 3, got 4"):
        model_eigenvalues(model, loss_fn, x, y, 4)
    with pytest.raises(ArgumentError, match="num_iterations must be at least num_eigenvalues"):
        model_eigenvalues(model, loss_fn, x, y, 3, num_iterations=2)
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module"):
        model_eigenvalues(loss_fn, loss_fn, x, y)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="loss_fn must be a function"):
        model_eigenvalues(model, x, x, y)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no parameter of the model requires gradients"):
        model_eigenvalues(model.requires_grad_(False), loss_fn, x, y)
    with pytest.raises(ArgumentError, match="does not depend on any parameter"):
        model_eigenvalues(Partial(), lambda m, x, y: x.sum(), x, y)


def test_all_pairs_of_a_small_model_are_the_whole_spectrum() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    case = Stateful(model, F.mse_loss, torch.randn(10, 2).double(), torch.randn(10, 1).double())
    values, vectors = _solve(case, 3)
    oracles.assert_same(values, torch.linalg.eigvalsh(_hessian(case)).flip(0), 1e-9)
    X = torch.stack([_flat(v) for v in vectors])
    torch.testing.assert_close(X @ X.T, torch.eye(3).double())


def test_a_block_of_another_shape_is_shown_as_the_caller_has_it() -> None:
    with pytest.raises(ArgumentError, match=r"Expected \(3, 2\), got \(2, 2\)"):
        power_iteration(lambda v: v[:2], 3, num_vectors=2)
