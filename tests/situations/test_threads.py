"""Several threads at once: their own products, one module together, and the user's own work beside ours.

A short switch interval makes the interpreter change threads as often as it can.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import hvp
from secorder_func.compat.core.hvp import exact_hvp
from secorder_func.rules.torch_func import forward_mode_lock
from tests import oracles
from tests.compat.closures import same, snapshot
from tests.situations.entries import (
    CLOSURES,
    ENTRIES,
    FUNCTIONAL,
    GAUSS_NEWTON,
    Case,
    classification,
    double_backward,
    gauss_newton,
)
from tests.versions import needs_traceable_trees

ALL = {**ENTRIES, **GAUSS_NEWTON}
THREADS, PRODUCTS = 4, 50


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    body = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)]
    return nn.Sequential(*body).double()


def _case(seed: int, model: nn.Module | None = None) -> Case:
    return Case(model or _model(seed), F.cross_entropy, *classification(seed))


class Errors(list[str]):
    """What went wrong in any thread."""

    def check(self, label: str, found: Any, expected: Any) -> None:
        error = oracles.relative_error(found, expected)
        if not error < 1e-10:
            self.append(f"{label}: relative error {error:.1e}")

    @contextmanager
    def noted(self, label: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.append(f"{label}: {type(error).__name__} {error}")


def _answers(case: Case) -> dict[str, Any]:
    v = case.vector()
    exact, ggn = double_backward(case, v), gauss_newton(case, v)
    return {entry: ggn if entry in GAUSS_NEWTON else exact for entry in ALL}


def _in_threads(
    cases: list[Case],
    entries: list[str],
    beside: Callable[[Errors], None] | None = None,
    products: int = PRODUCTS,
) -> Errors:
    """Compute products of every case in a thread of its own; `beside` runs in one more until they end."""
    errors, done = Errors(), threading.Event()
    answers = [_answers(case) for case in cases]

    def work(index: int) -> None:
        case, v = cases[index], cases[index].vector()
        for step in range(products):
            entry = entries[(index + step) % len(entries)]
            with errors.noted(entry):
                product = [h.detach() for h in ALL[entry](case, v)]
                errors.check(entry, product, answers[index][entry])

    def company() -> None:
        assert beside is not None
        while not done.is_set():
            with errors.noted("beside"):
                beside(errors)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    other = threading.Thread(target=company)
    for thread in [*threads, other] if beside else threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    if beside:
        other.join()
    return errors


@pytest.mark.parametrize("entry", ALL)
def test_different_modules_in_one_entry_point(entry: str) -> None:
    assert not _in_threads([_case(seed) for seed in range(THREADS)], [entry], products=20)


def test_different_modules_in_all_entry_points() -> None:
    assert not _in_threads([_case(seed) for seed in range(THREADS)], list(ALL))


@pytest.mark.parametrize("entries", [[entry] for entry in ALL], ids=list(ALL))
def test_one_module_in_one_entry_point_is_left_bit_identical(entries: list[str]) -> None:
    model = _model(0)
    cases = [_case(seed, model) for seed in range(THREADS)]
    before = snapshot(model)
    assert not _in_threads(cases, entries, products=20)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "entries",
    [[*FUNCTIONAL, "ggnvp", "ggn_operator"], [*CLOSURES, "gauss_newton_product"]],
    ids=["functional", "closures"],
)
def test_one_module_in_several_entry_points_of_one_kind(entries: list[str]) -> None:
    model = _model(0)
    before = snapshot(model)
    assert not _in_threads([_case(seed, model) for seed in range(THREADS)], entries)
    assert same(before, snapshot(model))


def _training(model: nn.Module) -> Callable[[Errors], None]:
    case = _case(50, model)
    expected = torch.autograd.grad(case.closure(), case.params)

    def step(errors: Errors) -> None:
        errors.check("training", torch.autograd.grad(case.closure(), case.params), expected)

    return step


def test_another_module_trains_meanwhile() -> None:
    cases = [_case(seed) for seed in range(THREADS)]
    assert not _in_threads(cases, list(ALL), beside=_training(_model(50)))


def test_the_module_of_closures_trains_meanwhile() -> None:
    model = _model(0)
    cases = [_case(seed, model) for seed in range(2)]
    entries = [*CLOSURES, "gauss_newton_product"]
    assert not _in_threads(cases, entries, beside=_training(model))


class MyError(Exception):
    pass


def test_exceptions_in_one_thread_do_not_reach_the_others() -> None:
    def fails(output: Tensor, y: Tensor) -> Tensor:
        raise MyError

    failing = Case(_model(9), fails, *classification())
    before = snapshot(failing.model)

    def step(errors: Errors) -> None:
        for entry in ALL:
            try:
                ALL[entry](failing, failing.vector())
            except MyError:
                continue
            errors.append("no exception")

    assert not _in_threads([_case(seed) for seed in range(THREADS)], list(ALL), beside=step)
    assert same(before, snapshot(failing.model))


def test_the_users_own_gradient_transforms_meanwhile() -> None:
    w = torch.randn(5, dtype=torch.float64)

    def step(errors: Errors) -> None:
        gradient = torch.func.grad(lambda w: (w**3).sum())
        _, pullback = torch.func.vjp(gradient, w)
        errors.check("vjp", pullback(w)[0], 6 * w * w)
        errors.check("vmap", torch.func.vmap(gradient)(w[:, None])[:, 0], 3 * w**2)

    assert not _in_threads([_case(seed) for seed in range(THREADS)], list(ALL), beside=step)


def test_the_users_own_jvp_meanwhile_is_safe_beside_reverse_mode() -> None:
    # Forward mode is one for the whole process; a jvp of the user's own does not take the library's lock. Reverse
    # over reverse enters no forward mode.
    w = torch.randn(5, dtype=torch.float64)

    def step(errors: Errors) -> None:
        _, tangent = torch.func.jvp(torch.func.grad(lambda w: (w**3).sum()), (w,), (w,))
        errors.check("jvp", tangent, 6 * w * w)

    entries = ["hvp in reverse", "operator", "operator.mm", *CLOSURES]
    assert not _in_threads([_case(seed) for seed in range(THREADS)], entries, beside=step)


def test_a_product_inside_the_loss_of_a_product_does_not_wait_for_itself() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def f(p: Tensor) -> Tensor:
        return (hvp(lambda q: (q**4).sum())(p, torch.ones_like(p)) ** 2).sum()  # (12 p²)²

    finished: list[Tensor] = []
    thread = threading.Thread(target=lambda: finished.append(hvp(f)(w, w)), daemon=True)
    thread.start()
    thread.join(30)
    assert finished
    torch.testing.assert_close(finished[0], 144 * 12 * w**3)


@needs_traceable_trees
def test_no_lock_is_taken_while_compiling() -> None:
    # Dynamo cannot trace a lock. A thread that holds ours must not stop a compiled product.
    released, holding = threading.Event(), threading.Event()

    def hold() -> None:
        with forward_mode_lock():
            holding.set()
            released.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait(10)
    try:
        w = torch.tensor([1.0, 2.0], dtype=torch.float64)
        product = torch.compile(hvp(lambda p: (p**3).sum()), backend="eager", fullgraph=True)
        finished: list[Tensor] = []
        thread = threading.Thread(target=lambda: finished.append(product(w, w)), daemon=True)
        thread.start()
        thread.join(50)
        assert finished
        torch.testing.assert_close(finished[0], 6 * w * w)
    finally:
        released.set()
        holder.join()


def test_a_closure_evaluated_in_a_worker_thread_is_exact() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def func() -> Tensor:
        result: list[Tensor] = []
        worker = threading.Thread(target=lambda: result.append((w**3).sum()))
        worker.start()
        worker.join()
        return result[0]

    product = exact_hvp(func, [w], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(product, 6 * w.detach())
