"""An exception anywhere in the user's loss leaves everything as it was and reaches the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import functional_loss, hessian_operator, hvp
from secorder_func.compat.core.hvp import approximate_hvp
from tests import oracles
from tests.compat.closures import same, snapshot
from tests.situations.entries import (
    ENTRIES,
    GAUSS_NEWTON,
    Case,
    assert_product,
    classification,
)

ALL: dict[str, Callable[[Case, list[Tensor]], Any]] = {
    **ENTRIES,
    **GAUSS_NEWTON,
    "approximate_hvp": lambda case, v: approximate_hvp(case.closure, case.params, v),
}


class MyError(RuntimeError):
    """An error of the kind that torch raises too."""


WITHOUT_SECOND_BACKWARD = ("approximate_hvp", "ggnvp", "gauss_newton_product")
FAILURES: list[BaseException] = [
    MyError("mine"),
    KeyError("mine"),
    KeyboardInterrupt("mine"),
    StopIteration("mine"),
]


class FailsInBackward(torch.autograd.Function):
    """A square whose gradient raises."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MyError("mine")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        raise MyError("mine")


class FailsInSecondBackward(torch.autograd.Function):
    """The identity of a value and its gradient, whose derivative raises."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return FailsInBackward.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class Fails(nn.Module):
    """A network that writes to everything, under every mode, and fails at one place."""

    def __init__(self, place: str, failure: BaseException) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.register_buffer("mean", torch.zeros(4))
        self.place, self.failure = place, failure
        self.last: Any = None
        self.evaluations = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations[0] += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.last = h = self.inner(F.dropout(x, 0.0))
        fails_now = self.place == "forward" or (
            self.place == "later evaluation" and self.evaluations[0] > 1
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            if fails_now:
                raise self.failure
        if self.place == "inner transform":
            torch.func.grad(lambda t: torch.func.vmap(self._raises)(t).sum())(h)
        if self.place == "hook" and h.requires_grad:
            h.register_hook(self._raises)
        if self.place == "backward":
            h = FailsInBackward.apply(h)
        if self.place == "second backward":
            h = FailsInSecondBackward.apply(h)
        return h

    def _raises(self, *args: Any) -> Any:
        raise self.failure


def _case(place: str, failure: BaseException) -> Case:
    torch.manual_seed(0)
    model = Fails(place, failure).double()
    x, y = classification()
    case = Case(model, F.cross_entropy, x, y)
    F.cross_entropy(model.inner(x), y).backward()  # there are gradients, which must stay
    return case


def _global_state() -> tuple[Any, ...]:
    levels = torch._C._functorch.get_interpreter_stack()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_fwd_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
        len(levels or ()),
        torch.autograd.forward_ad._current_level,
        torch._C._get_graph_executor_optimize(),
        len(nn.modules.module._global_forward_pre_hooks),
        torch.backends.mha.get_fastpath_enabled(),
    )


def _forward_mode_is_free() -> bool:
    """Say whether another thread can take a product in forward mode: no lock is held."""
    w = torch.tensor([1.0, 2.0])
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(hvp(lambda p: (p**3).sum())(w, w)), daemon=True
    )
    thread.start()
    thread.join(10)
    return bool(found) and torch.equal(found[0], 6 * w * w)


def _assert_left_alone(entry: str, case: Case, failure: type[BaseException]) -> None:
    v = case.vector()
    before, state, random = snapshot(case.model), _global_state(), torch.get_rng_state()
    with pytest.raises(failure, match="mine"):
        ALL[entry](case, v)
    assert same(before, snapshot(case.model))
    assert all(type(p) is nn.Parameter for p in case.params)
    assert _global_state() == state
    assert torch.equal(torch.get_rng_state(), random)
    assert _forward_mode_is_free()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("place", ["forward", "inner transform"])
@pytest.mark.parametrize("entry", ALL)
def test_an_exception_in_the_forward_pass(entry: str, place: str, failure: BaseException) -> None:
    _assert_left_alone(entry, _case(place, failure), type(failure))


@pytest.mark.parametrize("failure", FAILURES[1:3], ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("entry", ["hvp", "hvp in reverse", "operator", "exact_hvp", "model_hvp"])
def test_an_exception_in_a_hook_of_the_backward_pass(entry: str, failure: BaseException) -> None:
    _assert_left_alone(entry, _case("hook", failure), type(failure))


@pytest.mark.parametrize("place", ["backward", "second backward"])
@pytest.mark.parametrize("entry", ALL)
def test_a_runtime_error_in_a_backward_of_the_users_own(entry: str, place: str) -> None:
    if place == "second backward" and entry in WITHOUT_SECOND_BACKWARD:
        pytest.skip("takes no second backward")
    _assert_left_alone(entry, _case(place, MyError("mine")), RuntimeError)


@pytest.mark.parametrize("failure", FAILURES[:3], ids=lambda failure: type(failure).__name__)
def test_an_exception_in_a_later_evaluation_of_an_operator(failure: BaseException) -> None:
    case = _case("later evaluation", failure)
    f, params = functional_loss(case.model, case.loss_fn)
    op = hessian_operator(f, params, case.x, case.y, mode="forward_over_reverse")
    v = oracles.random_like(params, 1)
    before, state, random = snapshot(case.model), _global_state(), torch.get_rng_state()
    for product in (lambda: op @ v, lambda: op.mm({k: t[None] for k, t in v.items()})):
        with pytest.raises(type(failure), match="mine"):
            product()
        assert same(before, snapshot(case.model))
        assert _global_state() == state
        assert torch.equal(torch.get_rng_state(), random)
        assert _forward_mode_is_free()


@pytest.mark.parametrize("entry", ENTRIES)
def test_after_an_exception_the_next_product_is_right(entry: str) -> None:
    case = _case("forward", KeyError("mine"))
    v = case.vector()
    with pytest.raises(KeyError):
        ALL[entry](case, v)
    case.model.place = "nowhere"
    assert_product(entry, case)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("entry", ALL)
def test_the_callers_own_modes_survive_an_exception(entry: str, context: Any) -> None:
    case = _case("forward", KeyError("mine"))
    v = case.vector()
    with context():
        state = _global_state()
        with pytest.raises(KeyError):
            ALL[entry](case, v)
        assert _global_state() == state
