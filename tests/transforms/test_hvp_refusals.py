"""What `hvp` and `hvp_and_grad` refuse, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import hvp, hvp_and_grad

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]


# ------------------------------------------------------------------------------------- bad input

P = {"a": [torch.zeros(2, 3), torch.zeros(())]}


def _cubes(p: Any) -> Tensor:
    return (p["a"][0] ** 3).sum() + p["a"][1] ** 3


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
@pytest.mark.parametrize(
    ("v", "error", "words"),
    [
        (
            {"a": [torch.zeros(3, 2), torch.zeros(())]},
            ValueError,
            r"v must match params\. At \['a'\]\[0\] expected shape \(2, 3\), got \(3, 2\)",
        ),
        (
            {"a": [torch.zeros(2, 3), torch.zeros((), dtype=torch.float64)]},
            ValueError,
            r"At \['a'\]\[1\] expected dtype torch\.float32, got torch\.float64",
        ),
        (
            {"a": [torch.zeros(2, 3, device="meta"), torch.zeros(())]},
            ValueError,
            r"At \['a'\]\[0\] expected device cpu, got meta",
        ),
        (
            {"a": [torch.zeros(2, 3), 0.0]},
            TypeError,
            r"At \['a'\]\[1\] expected a tensor, got float",
        ),
        ({"b": [torch.zeros(2, 3), torch.zeros(())]}, TypeError, r"structure of params.*'a'.*'b'"),
        ({"a": (torch.zeros(2, 3), torch.zeros(()))}, TypeError, r"structure of params"),
        (torch.zeros(7), TypeError, r"structure of params"),
    ],
)
def test_a_wrong_v_is_refused_with_its_place(
    transform: Any, v: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{transform.__name__}: .*{words}") as caught:
        transform(_cubes)(P, v)
    mends = ("Build v with secorder_func.tree.random_like", "Convert the leaf with .to(")
    assert any(mend in str(caught.value) for mend in mends)


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"a": 1.0}, TypeError, r"At \['a'\] got float"),
        (torch.nn.Linear(2, 2), TypeError, r"At the root got Linear.*named_parameters"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, ValueError, r"At \['a'\] got torch\.int64"),
        ({"a": None}, ValueError, r"params has no tensor in it"),
    ],
)
def test_wrong_params_are_refused_with_their_place(
    transform: Any, params: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{transform.__name__}: .*{words}"):
        transform(lambda p: torch.zeros(()))(params, params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda p: p**2, ValueError, r"have one element, got shape \(3,\)"),
        (lambda p: 3.0, TypeError, r"be a tensor with one element, got float"),
        (lambda p: None, TypeError, r"got NoneType"),
        (lambda p: (p**2).sum() * 1j, ValueError, r"be real and floating, got torch\.complex"),
        (lambda p: (p > 0).sum(), ValueError, r"be real and floating, got torch\.int64"),
        (lambda p: ((p**2).sum(), "aux"), TypeError, r"got tuple"),
    ],
)
def test_a_loss_that_is_not_one_real_number_is_refused(
    loss: Any, error: type[Exception], words: str, mode: Any
) -> None:
    with pytest.raises(error, match=f"^hvp: the loss must .*{words}"):
        hvp(loss, mode=mode)(torch.ones(3), torch.ones(3))


def test_has_aux_without_a_pair_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^hvp: with has_aux=True .* \(loss, aux\), got Tensor"):
        hvp(lambda p: (p**2).sum(), has_aux=True)(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("transform", [hvp, hvp_and_grad])
def test_an_unknown_mode_is_refused_when_the_transform_is_made(transform: Any) -> None:
    with pytest.raises(
        ValueError, match=f"^{transform.__name__}: mode must be .*'auto'.*got 'fast'"
    ):
        transform(_cubes, mode="fast")
