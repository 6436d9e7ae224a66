"""`check_finite=True`: a product with NaN or infinite entries is an error that says where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import ggn_operator, ggnvp, hessian_operator, hvp, hvp_and_grad
from secorder_func.errors import ArgumentError, NonFiniteError
from tests import oracles

PARAMS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, 3.0])}
V = {"a": torch.ones(2), "b": torch.ones(2)}


def singular(params: dict[str, Tensor]) -> Tensor:
    """Return a loss whose gradient at b = 0 is finite and whose second derivative is not."""
    return params["a"].pow(3).sum() + params["b"].pow(1.5).sum()


@pytest.mark.parametrize("make", [hvp, hvp_and_grad])
def test_the_error_names_the_leaf_and_says_that_the_gradient_is_finite(make: Any) -> None:
    text = r"at \['b'\] 1 of 2 entries are NaN or infinite.*The gradient is finite"
    with pytest.raises(NonFiniteError, match=f"^{make.__name__}: .*{text}"):
        make(singular, check_finite=True)(PARAMS, V)


def test_without_it_the_product_is_returned() -> None:
    assert not hvp(singular)(PARAMS, V)["b"].isfinite().all()


def test_a_gradient_that_is_not_finite_is_named_too() -> None:
    with pytest.raises(NonFiniteError, match="The gradient is not finite either"):
        hvp(lambda p: p.sqrt().sum(), check_finite=True)(torch.zeros(2), torch.ones(2))


def test_a_finite_product_is_what_it_is_without_the_check() -> None:
    finite = {"a": PARAMS["a"], "b": torch.tensor([1.0, 4.0])}
    expected = {"a": 6 * finite["a"], "b": 0.75 / finite["b"].sqrt()}
    oracles.assert_same(hvp(singular, check_finite=True)(finite, V), expected, 1e-6)


def test_an_operator_checks_each_product() -> None:
    op = hessian_operator(singular, PARAMS, check_finite=True)
    with pytest.raises(NonFiniteError, match=r"^LinearOperator: .*at \['b'\]"):
        op @ V
    with pytest.raises(NonFiniteError, match=r"^LinearOperator: .*at \['b'\]"):
        op.mm({name: leaf[None] for name, leaf in V.items()})


def test_gauss_newton_products_are_checked() -> None:
    model = lambda w, x: (x * w).sqrt()  # noqa: E731
    loss = lambda outputs, y: (outputs - y).square().sum()  # noqa: E731
    w, x, y = torch.zeros(2), torch.ones(2), torch.ones(2)
    with pytest.raises(NonFiniteError, match=r"^ggnvp: "):
        ggnvp(model, loss, check_finite=True)(w, torch.ones(2), x, y)
    with pytest.raises(NonFiniteError, match=r"^LinearOperator: "):
        ggn_operator(model, loss, w, x, y, check_finite=True) @ torch.ones(2)


def test_inside_a_transform_it_is_refused() -> None:
    with pytest.raises(ArgumentError, match="check_finite=True looks at values"):
        torch.func.vmap(lambda v: hvp(torch.sum, check_finite=True)(torch.ones(2), v))(
            torch.ones(3, 2)
        )
