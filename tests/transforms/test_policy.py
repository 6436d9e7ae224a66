"""Which exact route a product takes, and when it says so."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import CurvatureFallbackWarning, NoExactRouteError, hvp
from secorder_func.errors import ArgumentError
from secorder_func.transforms.policy import (
    check_mode,
    differentiated_outside,
    first_exact,
    routes_for,
)
from tests import oracles, problems


@pytest.mark.parametrize(
    "mode", ["forward_over_reverse", "reverse_over_reverse", "double_backward"]
)
@pytest.mark.parametrize("outside", [False, True])
def test_a_named_mode_is_the_only_route(mode: Any, outside: bool) -> None:
    assert routes_for(mode, outside=outside) == (mode,)


def test_auto_tries_propagation_first_then_forward_over_reverse() -> None:
    routes = (
        "reverse_over_forward",
        "forward_over_reverse",
        "reverse_over_reverse",
        "double_backward",
    )
    assert routes_for("auto", outside=False) == routes


def test_auto_takes_reverse_over_reverse_where_the_product_is_differentiated() -> None:
    assert routes_for("auto", outside=True) == ("reverse_over_reverse", "double_backward")


def test_double_backward_is_no_route_inside_a_transform() -> None:
    seen: list[Any] = []
    torch.func.vmap(lambda p: seen.append(routes_for("auto", outside=False)) or p)(torch.ones(2))
    assert seen == [("reverse_over_forward", "forward_over_reverse", "reverse_over_reverse")]


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^here: mode must be one of 'auto', .* got 'fastest'"):
        check_mode("fastest", "here")


# ------------------------------------------------------------------------- who differentiates outside


def test_plain_tensors_are_differentiated_by_no_one() -> None:
    assert not differentiated_outside({"a": torch.ones(2)}, 3, "x")


def test_a_tensor_that_requires_gradients_is_noticed() -> None:
    assert differentiated_outside({"a": [torch.ones(2).requires_grad_()]})


def test_without_gradients_it_is_not() -> None:
    with torch.no_grad():
        assert not differentiated_outside(torch.ones(2).requires_grad_())


def test_an_outer_gradient_and_an_outer_jvp_are_noticed_and_a_vmap_is_not() -> None:
    seen: list[bool] = []

    def f(p: Tensor) -> Tensor:
        seen.append(differentiated_outside(p))
        return p.sum()

    p = torch.ones(2)
    torch.func.grad(f)(p)
    torch.func.jvp(f, (p,), (p,))
    torch.func.vmap(f)(torch.ones(3, 2))
    assert seen == [True, True, False]


def test_requires_grad_is_noticed_through_a_vmap() -> None:
    seen: list[bool] = []

    def f(p: Tensor) -> Tensor:
        seen.append(differentiated_outside(p))
        return p.sum()

    torch.func.vmap(f)(torch.ones(3, 2).requires_grad_())
    assert seen == [True]


# --------------------------------------------------------------------------------- the first exact


def _failing(error: Exception) -> Any:
    def route() -> Any:
        raise error

    return route


def _first(*routes: Any, eager: Any = lambda: None) -> Any:
    named = [(f"route {k}", route) for k, route in enumerate(routes)]
    return first_exact(named, where="here", tensors=[], eager=eager)


def test_the_first_route_that_works_is_taken_in_silence() -> None:
    assert _first(lambda: 1, lambda: 2) == ("route 0", 1)


def test_another_route_is_taken_with_a_warning_that_names_cause_and_route() -> None:
    with pytest.warns(
        CurvatureFallbackWarning,
        match=r"here: no route 0: no rule\. Took route 1",
    ):
        assert _first(_failing(RuntimeError("no rule.\nmore")), lambda: 2) == ("route 1", 2)


def test_errors_other_than_runtime_errors_pass_at_once() -> None:
    with pytest.raises(KeyError):
        _first(_failing(KeyError("k")), lambda: 2)


def test_argument_errors_pass_at_once() -> None:
    with pytest.raises(ArgumentError):
        _first(_failing(ArgumentError("bad")), lambda: 2)


def test_where_all_fail_the_losss_own_error_is_raised() -> None:
    class OwnError(Exception):
        pass

    with pytest.raises(OwnError):
        _first(_failing(RuntimeError("a")), _failing(RuntimeError("b")), eager=_failing(OwnError()))


def test_where_all_fail_and_the_loss_does_not_the_error_tells_every_cause() -> None:
    with pytest.raises(
        NoExactRouteError, match=r"^here: .*tried route 0: a; route 1: b\..*finite_difference_hvp"
    ) as caught:
        _first(_failing(RuntimeError("a")), _failing(RuntimeError("b")))
    assert isinstance(caught.value.__cause__, RuntimeError)


# ---------------------------------------------------------------------------------------- behaviour


def test_auto_evaluates_the_loss_once() -> None:
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    hvp(f)(torch.ones(2), torch.ones(2))
    assert len(calls) == 1


def test_the_same_call_takes_the_same_route_every_time() -> None:
    f = lambda p: torch.ormqr(torch.eye(3) + p, p.tanh(), torch.ones(3, 2)).sum()  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        products = [hvp(f)(torch.tensor([0.5, -1.0, 2.0]), torch.ones(3)) for _ in range(3)]
    assert len({str(w.message) for w in caught}) == 1
    assert len(caught) == 3
    assert torch.equal(products[0], products[2])


def test_differentiating_the_product_of_a_reverse_only_loss_needs_no_warning() -> None:
    y = torch.tensor([5.0, -5.0, 0.1]).double()
    f = lambda p: F.huber_loss(torch.sin(p), y)  # noqa: E731
    p = torch.tensor([0.3, 0.6, 1.1]).double()
    v = torch.ones(3).double()
    third = torch.func.grad(lambda p: v @ hvp(f)(p, v))(p)
    truth = oracles.directional_derivative(lambda p: v @ oracles.hvp(f, p, v), p, v)
    assert float(third @ v) == pytest.approx(float(truth), rel=1e-6)


def test_threads_do_not_disturb_each_other() -> None:
    problem = problems.load("mlp_tanh")
    vectors = [oracles.random_like(problem.params, seed) for seed in range(4)]
    expected = [oracles.hvp(problem.f, problem.params, v, *problem.args) for v in vectors]
    results: dict[int, list[Any]] = {}

    def work(k: int) -> None:
        results[k] = [hvp(problem.f)(problem.params, vectors[k], *problem.args) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        for hv in results[k]:
            oracles.assert_same(hv, expected[k])
