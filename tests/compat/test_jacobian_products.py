"""core.gvp: products with the Jacobian of a closure's output, against Jacobians by plain autograd and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secorder_func.compat.approximations import (
    empirical_fisher_trace,
    gauss_newton_matrix_approximation,
)
from secorder_func.compat.core.gvp import (
    batch_jvp,
    batch_vjp,
    full_jacobian,
    jvp,
    model_jvp,
    model_vjp,
    vjp,
)
from secorder_func.compat.core.hessian_diagonal import hessian_diagonal
from secorder_func.compat.core.hvp import exact_hvp
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    CurvatureFallbackWarning,
    NoExactRouteError,
)
from tests import oracles
from tests.compat.closures import MODELS, Stateful, same, snapshot, stateful


def _jacobian(func: Callable[[], Tensor], params: list[Tensor]) -> list[Tensor]:
    """Return the Jacobian row by row, `(output.numel(), *p.shape)`."""
    rows = []
    output = func()
    for entry in output.reshape(-1):
        found = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        )
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _times(jacobian: list[Tensor], v: list[Tensor], like: Tensor) -> Tensor:
    pairs = zip(jacobian, v, strict=True)
    parts = [block.reshape(like.numel(), -1) @ leaf.reshape(-1) for block, leaf in pairs]
    return torch.stack(parts).sum(0).reshape(like.shape)


def _two() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a closure with four outputs of two parameters."""
    w = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return lambda: torch.sin(w @ w) * b, [w, b]


def _output(case: Stateful) -> Callable[[], Tensor]:
    def output() -> Tensor:
        found = case.model(case.x)
        return found[0] if isinstance(found, tuple) else found

    return output


def _tensor_output(model: nn.Module) -> nn.Module:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Any) -> Tensor:
            found = self.inner(x)
            return found[0] if isinstance(found, tuple) else found

    return First()


@pytest.mark.parametrize("name", MODELS)
def test_products_of_models_equal_those_with_the_jacobian_row_by_row(name: str) -> None:
    case = stateful(name)
    torch.manual_seed(3)
    func, v = _output(case), case.vector()
    state = torch.get_rng_state()
    with oracles.untouched(case.model):
        jacobian, like = _jacobian(func, case.params), func().detach()
    u = torch.randn_like(like)
    model = _tensor_output(case.model)
    before = snapshot(case.model)
    torch.set_rng_state(state)
    pushed = model_jvp(model, case.x, v)
    torch.set_rng_state(state)
    pulled = model_vjp(model, case.x, u)
    assert same(before, snapshot(case.model))
    oracles.assert_same(pushed, _times(jacobian, v, like))
    oracles.assert_same(pulled, [torch.tensordot(u.reshape(-1), block, 1) for block in jacobian])


def test_a_product_with_a_scalar_output_is_the_directional_derivative() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = jvp(lambda: (w**3).sum(), [w], v)
    assert found.shape == ()
    torch.testing.assert_close(found, (3 * w**2 @ v).detach())


def test_a_flat_vector_is_cut_in_the_order_of_the_parameters() -> None:
    func, params = _two()
    v = oracles.random_like(params, 1)
    flat = torch.nn.utils.parameters_to_vector(v)
    torch.testing.assert_close(jvp(func, params, flat), jvp(func, params, v))
    stack = torch.stack([flat, 2 * flat])
    torch.testing.assert_close(batch_jvp(func, params, stack)[1], 2 * jvp(func, params, v))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_batch_of_vectors_gives_each_its_product(count: int) -> None:
    # Fewer vectors than outputs, and more: two ways.
    func, params = _two()
    torch.manual_seed(2)
    vs = [torch.randn(count, *p.shape, dtype=torch.float64) for p in params]
    jacobian, like = _jacobian(func, params), func().detach()
    found = batch_jvp(func, params, vs)
    assert found.shape == (count, 2, 2)
    for k in range(count):
        torch.testing.assert_close(found[k], _times(jacobian, [v[k] for v in vs], like))


def test_a_batch_of_cotangents_gives_each_its_product() -> None:
    func, params = _two()
    torch.manual_seed(2)
    us = torch.randn(5, 2, 2, dtype=torch.float64)
    jacobian = _jacobian(func, params)
    found = batch_vjp(func, params, us)
    expected = [torch.tensordot(us.flatten(1), block, 1) for block in jacobian]
    oracles.assert_same(found, expected)
    oracles.assert_same(batch_vjp(func, params, us.flatten(1)), expected)


@pytest.mark.parametrize("batched", [batch_jvp, batch_vjp])
def test_an_empty_batch_gives_an_empty_result(batched: Callable[..., Any]) -> None:
    func, params = _two()
    if batched is batch_jvp:
        vs = [torch.zeros(0, *p.shape, dtype=torch.float64) for p in params]
        assert batched(func, params, vs).shape == (0, 2, 2)
    else:
        found = batched(func, params, torch.zeros(0, 2, 2, dtype=torch.float64))
        assert [f.shape for f in found] == [(0, 2, 2), (0,)]


@pytest.mark.parametrize("wide", [True, False])
def test_the_full_jacobian_by_the_shorter_side(wide: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2 if wide else 40, 3, dtype=torch.float64)

    def func() -> Tensor:
        return torch.tanh(a @ w)[:, None]

    found = full_jacobian(func, [w, unused])
    torch.testing.assert_close(found[0], ((1 - torch.tanh(a @ w) ** 2)[:, None] * a).detach())
    assert found[1].shape == (len(a), 2)
    assert not found[1].any()
    assert found[0].is_contiguous()


def test_one_parameter_gives_a_tensor_and_several_a_list() -> None:
    func, params = _two()
    u = torch.ones(4, dtype=torch.float64)
    assert isinstance(vjp(func, params[:1], u), Tensor)
    assert isinstance(vjp(func, params, u), list)
    assert isinstance(full_jacobian(func, params[:1]), list)
    assert isinstance(batch_vjp(func, params[:1], u[None]), list)


CALLS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, p, **k: jvp(f, p, [torch.ones_like(q) for q in p], **k),
    "vjp": lambda f, p, **k: vjp(f, p, torch.ones(4, dtype=torch.float64), **k),
    "batch_jvp": lambda f, p, **k: batch_jvp(f, p, [torch.ones_like(q)[None] for q in p], **k),
    "batch_jvp, many": lambda f, p, **k: batch_jvp(
        f, p, [torch.ones_like(q).expand(5, *q.shape) for q in p], **k
    ),
    "batch_vjp": lambda f, p, **k: batch_vjp(f, p, torch.ones(1, 4, dtype=torch.float64), **k),
    "full_jacobian": lambda f, p, **k: full_jacobian(f, p, **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_with_create_graph_a_result_can_be_differentiated(name: str) -> None:
    func, params = _two()
    w = params[0].detach()

    def total(found: Any) -> Tensor:
        return sum(f.sum() for f in found) if isinstance(found, list) else found.sum()

    with torch.no_grad():
        found = CALLS[name](func, params, create_graph=True)
    (derivative,) = torch.autograd.grad(total(found), params[0])

    def at(shift: Tensor) -> Tensor:
        moved = (w + shift).requires_grad_()
        b = params[1].detach().clone().requires_grad_()
        return total(CALLS[name](lambda: torch.sin(moved @ moved) * b, [moved, b])).detach()

    step = 1e-5
    for index in range(4):
        e = torch.zeros(4, dtype=torch.float64)
        e[index] = step
        slope = (at(e.view(2, 2)) - at(-e.view(2, 2))) / (2 * step)
        assert derivative.view(-1)[index].item() == pytest.approx(slope.item(), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_without_create_graph_a_result_has_no_graph(name: str) -> None:
    func, params = _two()
    found = CALLS[name](func, params)
    leaves = found if isinstance(found, list) else [found]
    assert not any(leaf.requires_grad for leaf in leaves)


class _OnceSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cos(ctx.saved_tensors[0]) * g


def test_a_function_that_is_differentiable_once_is_enough() -> None:
    w = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)

    def func() -> Tensor:
        return _OnceSine.apply(w)

    slope = torch.cos(w.detach())
    torch.testing.assert_close(vjp(func, [w], v), slope * v)
    torch.testing.assert_close(full_jacobian(func, [w])[0], slope.diag())
    with pytest.warns(CurvatureFallbackWarning, match="one backward pass for each output"):
        torch.testing.assert_close(jvp(func, [w], v), slope * v)
    with pytest.raises(NoExactRouteError, match="once_differentiable"):
        vjp(func, [w], v, create_graph=True)


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_in_the_closure_leaves_everything_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    x = torch.randn(2, 2, dtype=torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, params = snapshot(model), list(model.parameters())

    def func() -> Tensor:
        model(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CALLS[name](func, params)
    assert same(before, snapshot(model))


def test_a_frozen_parameter_gets_zeros_and_its_part_of_v_has_no_effect() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    x, u = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    pulled = model_vjp(model, x, u)
    assert not pulled[0].any()
    torch.testing.assert_close(pulled[1], u.sum(0))
    v = oracles.random_like(list(model.parameters()), 1)
    torch.testing.assert_close(model_jvp(model, x, v), v[1].expand(4, 2))


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda f, p: jvp(f(), p, p), ArgumentTypeError, "closure"),
        (lambda f, p: jvp(f, p, [p[0]]), ArgumentError, "Expected 2, got 1"),
        (lambda f, p: jvp(f, p, torch.ones(3).double()), ArgumentError, r"shape \(5,\)"),
        (lambda f, p: jvp(f, p, [p[0].float(), p[1]]), ArgumentError, "dtype"),
        (lambda f, p: jvp(f, [p[0], p[0]], p), ArgumentError, "same tensor"),
        (lambda f, p: jvp(lambda: {"a": f()}, p, p), ArgumentTypeError, "one tensor, got dict"),
        (lambda f, p: jvp(lambda: f().detach(), p, p), ArgumentError, "does not depend"),
        (lambda f, p: vjp(f, p, torch.ones(3).double()), ArgumentError, r"Expected shape \(2, 2\)"),
        (lambda f, p: vjp(f, p, torch.ones(4).cfloat()), ArgumentError, "real like the output"),
        (lambda f, p: vjp(f, p, 1.0), ArgumentTypeError, "must be a tensor, got float"),
        (lambda f, p: batch_jvp(f, p, [p[0][None], p[1].expand(2)]), ArgumentError, r"\[1, 2\]"),
        (lambda f, p: batch_jvp(f, p, p), ArgumentError, "leading axis|batch size"),
        (lambda f, p: batch_jvp(f, p, p[1]), ArgumentError, "leading axis"),
        (lambda f, p: batch_vjp(f, p, torch.ones(3, 5).double()), ArgumentError, r"\(3, 2, 2\)"),
        (lambda f, p: batch_vjp(f, p, torch.ones(()).double()), ArgumentError, "leading axis"),
        (lambda f, p: full_jacobian(lambda: f().long(), p), ArgumentError, "floating"),
        (lambda f, p: model_jvp(f, p, p), TypeError, "torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused(call: Any, error: type[Exception], pattern: str) -> None:
    func, params = _two()
    with pytest.raises(error, match=pattern):
        call(func, params)


# ------------------------------------------------------------------- the diagonal of J^T J


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_train", "layer_norm"])
def test_the_gauss_newton_diagonal_is_the_sum_of_squares_of_the_rows(name: str) -> None:
    case = stateful(name)
    func = _output(case)
    with oracles.untouched(case.model):
        jacobian, y = _jacobian(func, case.params), torch.zeros_like(func())
    before = snapshot(case.model)
    found = gauss_newton_matrix_approximation(case.model, nn.MSELoss(), case.x, y)
    assert same(before, snapshot(case.model))
    oracles.assert_same(found, [block.square().sum(0) for block in jacobian])


def test_residuals_broadcast_as_output_and_target_do() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = gauss_newton_matrix_approximation(model, F.mse_loss, x, torch.zeros(3).double())
    torch.testing.assert_close(found[0], torch.tensor([[15.0]], dtype=torch.float64))  # 3 (1 + 4)


def test_a_constant_gauss_newton_diagonal_has_a_graph_where_asked() -> None:
    model = nn.Linear(2, 1).double()
    x = torch.ones(3, 2, dtype=torch.float64)
    found = gauss_newton_matrix_approximation(
        model, nn.MSELoss(), x, torch.zeros(3, 1).double(), create_graph=True
    )
    assert all(f.grad_fn is not None for f in found)
    (slope,) = torch.autograd.grad(found[0].sum(), model.weight)
    assert not slope.any()


def test_frozen_parameters_are_left_out_and_unused_ones_get_zeros() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}).double()
    model["a"].bias.requires_grad_(False)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    model.forward = lambda inputs: model["a"](inputs)
    found = gauss_newton_matrix_approximation(model, nn.MSELoss(), x, torch.zeros(1, 1).double())
    oracles.assert_same(found, [x.square(), torch.zeros(1, 2).double(), torch.zeros(1).double()])


@pytest.mark.parametrize("loss_fn", [nn.L1Loss(), F.cross_entropy])
def test_another_loss_is_refused(loss_fn: Any) -> None:
    with pytest.raises(ValueError, match="MSE-based loss functions, got"):
        gauss_newton_matrix_approximation(nn.Linear(1, 1), loss_fn, torch.ones(1, 1), 0.0)


# --------------------------------------------------------------------- found by trying to break it


class _Unrecorded(torch.autograd.Function):
    """A square whose backward autograd does not record."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0].detach() * g.detach()


def test_a_backward_that_is_not_recorded_is_seen_and_goes_output_by_output() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def func() -> Tensor:
        return torch.cat([_Unrecorded.apply(x), x])

    expected = torch.cat([2 * x.detach(), torch.ones(3).double()]) * v.repeat(2)
    with pytest.warns(CurvatureFallbackWarning, match="not recorded"):
        torch.testing.assert_close(jvp(func, [x], v), expected)
    with pytest.warns(CurvatureFallbackWarning, match="not recorded"):
        torch.testing.assert_close(batch_jvp(func, [x], v[None])[0], expected)
    with pytest.warns(CurvatureFallbackWarning, match="not recorded"):
        (found,) = full_jacobian(func, [x])
    torch.testing.assert_close(found @ v, expected)


class _UnrecordedForTransforms(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    backward = _Unrecorded.backward


@pytest.mark.parametrize("square", [_Unrecorded, _UnrecordedForTransforms])
def test_second_derivatives_of_a_backward_that_is_not_recorded_are_refused(square: Any) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for function in (exact_hvp, hessian_diagonal):
        arguments = (torch.ones_like(x),) if function is exact_hvp else ()
        with pytest.raises(NoExactRouteError, match="not recorded"):
            function(lambda: square.apply(x).sum(), [x], *arguments, create_graph=True)
        with pytest.raises(NoExactRouteError, match="not recorded"):
            function(lambda: square.apply(x).sum(), [x], *arguments)


def test_a_custom_function_with_a_recorded_backward_is_exact() -> None:
    class Recorded(_Unrecorded):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * ctx.saved_tensors[0] * g

    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(jvp(lambda: Recorded.apply(x), [x], v), 2 * x.detach() * v)
    hv = exact_hvp(lambda: (Recorded.apply(x) ** 2).sum(), [x], v, create_graph=True)
    torch.testing.assert_close(hv, 12 * x**2 * v)
    (third,) = torch.autograd.grad(hv.sum(), x)
    torch.testing.assert_close(third, 24 * x.detach() * v)


def test_a_complex_output_has_no_matrix_of_gradients() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ArgumentError, match="must be real"):
        full_jacobian(lambda: torch.complex(x, x * x), [x])


def test_complex_parameters_have_the_rows_of_their_gradients_whatever_the_shape() -> None:
    z = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j], dtype=torch.complex128, requires_grad=True)
    for times in (1, 3):

        def func(times: int = times) -> Tensor:
            return torch.cat([z.real, z.imag, z.abs()] * times)

        (found,) = full_jacobian(func, [z])
        for row, entry in zip(found, func(), strict=True):
            torch.testing.assert_close(row, torch.autograd.grad(entry, z, retain_graph=True)[0])


def test_an_empty_output_has_empty_products() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert jvp(lambda: x[:0] * 2, [x], x.detach()).shape == (0,)
    assert batch_jvp(lambda: x[:0] * 2, [x], torch.ones(2, 3).double()).shape == (2, 0)
    assert full_jacobian(lambda: x[:0] * 2, [x])[0].shape == (0, 3)


def test_all_parameters_frozen_give_zeros() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    x = torch.ones(3, 2)
    assert not model_jvp(model, x, [torch.ones(1, 2), torch.ones(1)]).any()
    assert [tuple(p.shape) for p in model_vjp(model, x, torch.ones(3, 1))] == [(1, 2), (1,)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_cotangent_is_converted_to_the_dtype_of_the_output(dtype: torch.dtype) -> None:
    func, params = _two()
    u = torch.tensor([1, 2, 3, 4])
    oracles.assert_same(vjp(func, params, u.to(dtype)), vjp(func, params, u.double()))


@pytest.mark.parametrize("call", [model_jvp, model_vjp])
def test_inputs_made_in_inference_mode_are_taken(call: Callable[..., Any]) -> None:
    model = nn.Linear(2, 1).double()
    with torch.inference_mode():
        x = torch.ones(3, 2, dtype=torch.float64)
        v = [torch.ones_like(p) for p in model.parameters()]
        u = torch.ones(3, 1, dtype=torch.float64)
    argument = v if call is model_jvp else u
    found = call(model, x, argument, create_graph=True)
    total = found.sum() if isinstance(found, Tensor) else found[0].sum()
    assert total.item() == pytest.approx(9.0 if call is model_jvp else 6.0)
    y = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        (jacobian,) = full_jacobian(lambda: y**2, [y], create_graph=True)
    assert torch.autograd.grad(jacobian.sum(), y)[0].tolist() == [2.0, 2.0]


def test_a_flat_complex_vector_over_real_parameters_is_refused() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    z = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(ArgumentError, match="some of params are real"):
        jvp(lambda: z * x, [x, z], torch.ones(4, dtype=torch.complex128))


def test_the_mend_of_a_batch_builds_a_batch() -> None:
    func, params = _two()
    with pytest.raises(ArgumentError, match=r"torch\.randn\(batch, \*p\.shape\)"):
        batch_jvp(func, params, [torch.ones(2, 3).double(), torch.ones(2).double()])


def test_sparse_gradients_of_an_embedding_are_taken_in_full() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(6, 2, sparse=True).double()
    x, y = torch.tensor([1, 1, 4]), torch.zeros(3, 2, dtype=torch.float64)
    dense = nn.Embedding(6, 2).double()
    dense.load_state_dict(model.state_dict())
    expected = torch.autograd.grad(F.mse_loss(dense(x), y), dense.weight)[0]
    trace = empirical_fisher_trace(model, F.mse_loss, x, y)
    torch.testing.assert_close(trace, expected.square().sum())
    vs = torch.randn(20, 6, 2, dtype=torch.float64)
    found = batch_jvp(lambda: model(x), [model.weight], vs)
    torch.testing.assert_close(found, vs[:, x])


def test_a_closure_that_counts_is_evaluated_once() -> None:
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    calls = []

    def func() -> Tensor:
        calls.append(1)
        return ((a**2).sum() + (b**2).sum()) * len(calls)

    for entries in hessian_diagonal(func, [a, b]):
        assert entries.tolist() == [2.0, 2.0]
    assert len(calls) == 1


_PASSES = torch.zeros(())


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        _PASSES.add_(1)
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


def _counted_by_a_function(w: Tensor) -> Callable[[], Tensor]:
    return lambda: _Counting.apply(w).sum()


def _counted_by_a_hook_inside(w: Tensor) -> Callable[[], Tensor]:
    def func() -> Tensor:
        y = w**2
        y.register_hook(lambda g: _PASSES.add_(1) and None)
        return y.sum()

    return func


def _counted_by_a_hook_outside(w: Tensor) -> Callable[[], Tensor]:
    y = w**2
    y.register_hook(lambda g: _PASSES.add_(1) and None)
    return lambda: (1.0 * y).sum()


@pytest.mark.parametrize(
    "counted", [_counted_by_a_function, _counted_by_a_hook_inside, _counted_by_a_hook_outside]
)
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda f, w: vjp(f, [w], torch.tensor(1.0)), [2.0, -4.0]),
        (lambda f, w: jvp(f, [w], torch.tensor([1.0, 0.5])), 0.0),
        (lambda f, w: exact_hvp(f, [w], [torch.tensor([1.0, 0.5])])[0], [2.0, 1.0]),
    ],
)
def test_python_that_a_backward_pass_calls_writes_to_nothing_outside(
    counted: Any, call: Any, expected: Any
) -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    _PASSES.zero_()
    torch.testing.assert_close(call(counted(w), w), torch.tensor(expected))
    assert _PASSES == 0

    torch.autograd.grad(counted(w)(), w)  # else the test could not fail
    assert _PASSES == 1
