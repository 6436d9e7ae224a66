"""Functions whose forward rule in torch is wrong go to reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import CurvatureFallbackWarning, hessian_operator, hvp
from secorder_func.errors import NoExactRouteError
from tests import oracles

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
P, V = torch.tensor([0.5, -1.0, 2.0, 0.3]).double(), torch.tensor([1.0, 2.0, -1.0, 0.5]).double()
INDEX = torch.tensor([0, 0, 1, 1])
B = torch.arange(1.0, 9.0).reshape(4, 2).double()


def _spd(p: Tensor) -> Tensor:
    return torch.outer(p, p) + torch.diag(torch.arange(2, 6, dtype=p.dtype))


def _zeros() -> Tensor:
    return torch.zeros(2, dtype=torch.float64)


CASES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "scatter_reduce method": (
        "scatter_reduce",
        lambda p: (
            _zeros().scatter_reduce(0, INDEX, torch.tanh(p), "prod", include_self=False) ** 2
        ).sum(),
    ),
    "scatter_reduce keyword": (
        "scatter_reduce",
        lambda p: (
            torch.scatter_reduce(
                _zeros(), 0, INDEX, src=torch.tanh(p), reduce="prod", include_self=False
            )
            ** 2
        ).sum(),
    ),
    "scatter_reduce in place": (
        "scatter_reduce_",
        lambda p: (
            (0 * p[:2] + 2).scatter_reduce_(0, INDEX, torch.tanh(p), "prod", include_self=False)
            ** 2
        ).sum(),
    ),
    "cholesky_solve": (
        "cholesky_solve",
        lambda p: torch.cholesky_solve(B * p[:, None], torch.tril(_spd(p))).sin().sum(),
    ),
    "cholesky_inverse": (
        "cholesky_inverse",
        lambda p: torch.cholesky_inverse(torch.tril(_spd(p))).sin().sum(),
    ),
    "triangular_solve": (
        "triangular_solve",
        lambda p: torch.triangular_solve(B * p[:, None], torch.triu(_spd(p)))[0].sin().sum(),
    ),
    "cholesky_inverse method": (
        "cholesky_inverse",
        lambda p: torch.tril(_spd(p)).cholesky_inverse().sin().sum(),
    ),
}
WRONG = ["scatter_reduce method", "scatter_reduce keyword", "cholesky_inverse", "triangular_solve"]


@pytest.mark.parametrize("name", WRONG)
def test_raw_forward_over_reverse_is_silently_wrong(name: str) -> None:
    _, f = CASES[name]
    _, raw = torch.func.jvp(torch.func.grad(f), (P,), (V,))
    assert oracles.relative_error(raw, oracles.hvp(f, P, V)) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_reverse_mode_says_so_and_is_exact(name: str) -> None:
    function, f = CASES[name]
    with pytest.warns(CurvatureFallbackWarning, match=f"forward rule of {function} ") as caught:
        hv = hvp(f)(P, V)
    assert [w.category for w in caught].count(CurvatureFallbackWarning) == 1
    oracles.assert_same(hv, oracles.hvp(f, P, V))


@pytest.mark.parametrize("name", CASES)
def test_the_named_forward_mode_raises(name: str) -> None:
    function, f = CASES[name]
    with pytest.raises(NoExactRouteError, match=function):
        hvp(f, mode="forward_over_reverse")(P, V)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_exact_and_silent(name: str) -> None:
    _, f = CASES[name]
    op = hessian_operator(f, P)
    assert op.mode == "reverse_over_reverse"
    oracles.assert_same(op.dense(), oracles.hessian(f, P))


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_other_reductions_of_scatter_reduce_stay_in_forward_mode(reduce: Any) -> None:
    f = lambda p: (_zeros().scatter_reduce(0, INDEX, p**2, reduce) ** 2).sum()  # noqa: E731
    oracles.assert_same(hvp(f)(P, V), oracles.hvp(f, P, V))


@pytest.mark.parametrize(
    "f",
    [
        lambda p: torch.linalg.solve_triangular(torch.triu(_spd(p)), B * p[:, None], upper=True),
        lambda p: torch.linalg.cholesky(_spd(p)),
        lambda p: torch.linalg.inv(_spd(p)),
        lambda p: torch.linalg.eigvalsh(_spd(p)),
        lambda p: torch.cumprod(p, 0),
        lambda p: torch.logsumexp(p * B[:, 0], 0),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "forward_over_reverse", "reverse_over_reverse"])
def test_their_modern_relatives_are_exact_in_every_mode(f: Any, mode: Any) -> None:
    loss = lambda p: f(p).sin().sum()  # noqa: E731
    oracles.assert_same(hvp(loss, mode=mode)(P, V), oracles.hvp(loss, P, V), 1e-9)
