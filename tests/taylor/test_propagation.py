"""What stops derivatives, what hides tensors, what is drawn and written: as one plain evaluation has it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import NoExactRouteError, functional_loss, hvp, rule_kinds, taylor
from secorder_func.compat.core.hvp import exact_hvp
from secorder_func.operators.memory import with_peak_bytes
from secorder_func.rules import evaluated
from secorder_func.taylor.general import PROVEN
from secorder_func.taylor.proven import NAMES
from tests import oracles

P = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2, -0.7], dtype=torch.float64)
V = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3, -2.0], dtype=torch.float64)
MODE: Any = "reverse_over_forward"
Fn = Callable[[Tensor], Tensor]


def _is_exact(f: Fn) -> None:
    oracles.assert_same(hvp(f, mode=MODE)(P, V), oracles.hvp(f, P, V), 1e-12)


# ------------------------------------------------------------------------ what stops derivatives


def _without_gradients(p: Tensor) -> Tensor:
    with torch.no_grad():
        factor = p.exp()
    return (factor * p.sin()).pow(2).sum()


@pytest.mark.parametrize(
    "f",
    [
        lambda p: (p.detach() * p.sin()).pow(2).sum(),
        lambda p: (p.data * p.sin()).pow(2).sum(),
        lambda p: (p.exp().detach_() * p.sin()).pow(2).sum(),
        lambda p: (p.round() * p.sin()).pow(2).sum(),
        lambda p: (p[0].item() * p.sin()).pow(2).sum(),
        _without_gradients,
    ],
)
def test_what_stops_derivatives_stops_terms(f: Fn) -> None:
    _is_exact(f)


def test_a_loss_without_any_second_derivative_gives_zeros() -> None:
    assert torch.equal(hvp(lambda p: p.sum(), mode=MODE)(P, V), torch.zeros_like(P))
    assert torch.equal(hvp(lambda p: P.sum(), mode=MODE)(P, V), torch.zeros_like(P))


# ------------------------------------------------------------------------- what hides tensors


class _Cube(torch.autograd.Function):
    """Its declared backward is twice the derivative, so that whoever looks inside is found out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 6 * ctx.saved_tensors[0] ** 2 * g


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return x * x.sin()


def _gradient_inside(p: Tensor) -> Tensor:
    (g,) = torch.autograd.grad((p**4).sum(), p, create_graph=True)
    return (g**2).sum()


HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "a function with a backward of its own": lambda p: (_Cube.apply(p) * p).sum(),
    "TorchScript": lambda p: (_scripted(p) * p).sum(),
    "vmap": lambda p: torch.func.vmap(lambda x: x**3)(p).pow(2).sum(),
    "a gradient": _gradient_inside,
    "a functional gradient": lambda p: torch.func.grad(lambda q: (q**4).sum())(p).pow(2).sum(),
    "no rule": lambda p: torch.linalg.eigvalsh(torch.outer(p, p) + torch.diag(p)).pow(3).sum(),
}


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_hides_tensors_is_refused_by_name_and_left_to_others(name: str) -> None:
    f = HIDING[name]
    with pytest.raises(NoExactRouteError, match="reverse_over_forward"):
        hvp(f, mode=MODE)(P, V)
    oracles.assert_same(hvp(f)(P, V), oracles.hvp(f, P, V), 1e-9)


def test_what_was_computed_before_the_loss_is_refused_where_it_has_a_graph() -> None:
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    features = w * 2
    f = lambda p: (features * p**3).sum()  # noqa: E731
    with pytest.raises(NoExactRouteError, match="before the loss"):
        hvp(f, mode=MODE)(P, V)
    oracles.assert_same(hvp(f)(P, V).detach(), 12 * P * V)


def test_auto_takes_what_has_rules_without_a_word_and_leaves_the_rest() -> None:
    ruled: Fn = lambda p: p.tanh().pow(3).sum()  # noqa: E731
    general: Fn = lambda p: torch.cumprod(p, 0).sum()  # noqa: E731
    assert rule_kinds(ruled)(P).closed
    found = rule_kinds(general)(P)
    assert not found.closed
    assert found.kinds["cumprod"] == "general"
    missing = rule_kinds(HIDING["no rule"])(P)
    assert missing.missing is not None
    assert "eigvalsh" in missing.missing
    for f in (ruled, general):
        oracles.assert_same(hvp(f)(P, V), oracles.hvp(f, P, V), 1e-12)
    _is_exact(general)


# ----------------------------------------------------------------- random numbers, state, memory


@pytest.mark.parametrize("mode", ["auto", MODE])
def test_random_functions_draw_once(mode: Any) -> None:
    def f(p: Tensor) -> Tensor:
        return (F.dropout(p.sin(), 0.5) * torch.rand(6).double() * p).pow(2).sum()

    torch.manual_seed(3)
    found = hvp(f, mode=mode)(P, V)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = oracles.hvp(f, P, V)
    oracles.assert_same(found, expected)
    torch.manual_seed(3)
    f(P)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_failed_attempt_leaves_the_random_numbers_to_the_next() -> None:
    def f(p: Tensor) -> Tensor:
        x = F.dropout(p.sin(), 0.5)
        return (x * torch.linalg.eigvalsh(torch.outer(p, p) + torch.diag(p))).pow(2).sum()

    torch.manual_seed(3)
    found = hvp(f)(P, V)
    torch.manual_seed(3)
    oracles.assert_same(found, oracles.hvp(f, P, V), 1e-9)


def test_state_of_modules_stays_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten()
    )
    model = model.double()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    f, params = functional_loss(model, nn.MSELoss())
    x, y = torch.randn(3, 1, 3, 3).double(), torch.randn(3, 8).double()
    v = oracles.random_like(params, 1)
    oracles.assert_same(hvp(f, mode=MODE)(params, v, x, y), oracles.hvp(f, params, v, x, y))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_terms_die_with_their_values() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def f(p: Tensor) -> Tensor:
        x = p + 1  # saved by nobody
        seen.append(weakref.ref(x))
        y = x + 1
        del x
        gc.collect()
        assert seen[-1]() is None
        return y.pow(3).sum()

    _is_exact(f)


def test_what_a_loss_keeps_from_one_evaluation_is_a_constant_in_the_next() -> None:
    kept: list[Tensor] = []

    def f(p: Tensor) -> Tensor:
        kept.append(p.sin())
        return (kept[0].detach() * p**2).sum()

    first = hvp(f, mode=MODE)(P, V)
    second = hvp(f, mode=MODE)(2 * P, V)
    oracles.assert_same(first, 2 * P.sin() * V)
    oracles.assert_same(second, 2 * P.sin() * V)


def test_an_exception_of_the_loss_comes_through_as_it_is() -> None:
    def f(p: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hvp(f, mode=MODE)(P, V)


# ------------------------------------------------------------------------------ kinds of numbers


def test_under_autocast_the_product_is_that_of_the_cast_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    v = oracles.random_like(params, 1)
    exact = oracles.hvp(f, params, v, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = hvp(f, mode=MODE)(params, v, x, y)
    assert {k: t.dtype for k, t in found.items()} == dict.fromkeys(params, torch.float32)
    assert 1e-5 < oracles.relative_error(found, exact) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_has_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    f: Fn = lambda p: F.layer_norm(p.tanh() * p, (6,)).pow(3).sum()  # noqa: E731
    found = hvp(f, mode=MODE)(P.to(dtype), V.to(dtype))
    assert found.dtype == dtype
    assert (
        oracles.relative_error(found.double(), oracles.hvp(f, P, V)) < 200 * torch.finfo(dtype).eps
    )


def test_complex_parameters() -> None:
    p, v = torch.randn(4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)
    f: Fn = lambda p: (p.tanh() * p.conj() * p.exp()).abs().pow(2).sum() + p.real.pow(3).sum()  # noqa: E731
    oracles.assert_same(hvp(f, mode=MODE)(p, v), oracles.hvp(f, p, v), 1e-12)


# ------------------------------------------------------------------------------ several vectors


def test_a_chunk_of_vectors_goes_through_like_each_alone() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(5, 4).double(), torch.randn(3, 5).double()
    vectors = torch.randn(7, 5, 4).double()

    def outputs(w: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(x @ w), (4,)).softmax(-1) + F.dropout(x[:, :4], 0.0)

    at = w.clone().requires_grad_()
    make = partial(taylor.Propagation, [(at, vectors)], several=True)
    terms = evaluated(lambda rules: rules(outputs(at)), forward=False, higher=False, make=make)
    J = torch.autograd.functional.jacobian(outputs, w)
    oracles.assert_same(terms, torch.einsum("ijkl,nkl->nij", J, vectors), 1e-12)


def test_every_proven_name_is_that_of_a_function_without_a_rule_for_all_of_its_arguments() -> None:
    for name in NAMES:
        found: Any = torch
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)
        assert found in PROVEN


@pytest.mark.slow
def test_it_is_refused_under_dynamo_by_name() -> None:
    product = torch.compile(
        hvp(lambda p: p.pow(3).sum(), mode=MODE), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="mode='auto'"):
        product(P, V)


# --------------------------------------------------------------------------- rules of the user's


def test_a_function_of_the_users_own_gets_a_rule_and_a_second_one_is_refused() -> None:
    @torch.overrides.wrap_torch_function(lambda x: (x,))
    def cube(x: Tensor) -> Any:
        return _RightCube.apply(x)

    f: Fn = lambda p: (cube(p.sin()) * p).sum()  # noqa: E731
    with pytest.raises(NoExactRouteError):
        hvp(f, mode=MODE)(P, V)

    @taylor.tangent(cube, kind="elementwise")
    def _cube(t: Any, out: Tensor, x: Tensor) -> Any:
        return 3 * x**2 * t(x)

    assert rule_kinds(f)(P).closed
    oracles.assert_same(hvp(f)(P, V), oracles.hvp(lambda p: (p.sin() ** 3 * p).sum(), P, V), 1e-12)
    with pytest.raises(ValueError, match="two rules"):
        taylor.tangent(cube)(_cube)


@pytest.mark.parametrize(
    ("term", "problem"),
    [(torch.ones(7), r"term of shape \(7,\) for \(6,\)"), (3, "returned int, not a tensor")],
)
def test_a_rule_that_returns_something_else_is_named(term: Any, problem: str) -> None:
    @torch.overrides.wrap_torch_function(lambda x: (x,))
    def wrongly_ruled(x: Tensor) -> Tensor:
        return x**2

    taylor.tangent(wrongly_ruled)(lambda t, out, x: term)
    with pytest.raises(NoExactRouteError, match=f"wrongly_ruled.*{problem}"):
        hvp(lambda p: wrongly_ruled(p).sum(), mode=MODE)(P, V)


def test_a_rule_for_nothing_and_one_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one function"):
        taylor.tangent()(lambda t, out, x: x)
    with pytest.raises(ValueError, match="kind must be one of"):
        taylor.tangent(torch.sinc, kind="other")(lambda t, out, x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be callable, got str"):
        taylor.linear("sinc")


class _RightCube(_Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


# -------------------------------------------------------------------------------------- closures


def test_a_closure_is_propagated_in_its_own_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    x, y = torch.randn(4, 64).double(), torch.randint(3, (4,))
    params = list(model.parameters())
    assert sum(p.numel() for p in params) > 4096
    v = [torch.randn_like(p) for p in params]
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y)

    found = exact_hvp(closure, params, v)
    assert len(calls) == 1
    gradient = torch.autograd.grad(closure(), params, create_graph=True)
    expected = torch.autograd.grad(gradient, params, v)
    oracles.assert_same(found, list(expected), 1e-12)
    assert all(p.grad is None for p in params)


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("activation", "limit"), [(nn.Tanh(), 0.8), (nn.ReLU(), 0.7)])
def test_a_product_takes_less_memory_than_a_double_backward(
    activation: nn.Module, limit: float
) -> None:
    """Counted in bytes of tensors, on 24 layers: two or three activations a layer in the place of three or four."""
    layers = [part for _ in range(24) for part in (nn.Linear(16, 16), activation)]
    f, params = functional_loss(nn.Sequential(*layers, nn.Linear(16, 4)), nn.CrossEntropyLoss())
    v, data = oracles.random_like(params, 1), (torch.randn(512, 16), torch.randint(4, (512,)))
    peaks = {}
    for mode in (MODE, "double_backward"):
        product = hvp(f, mode=mode)
        _, peaks[mode] = with_peak_bytes(partial(product, params, v, *data))
    assert 0 < peaks[MODE] < limit * peaks["double_backward"]
