"""Parameters as one vector and back, and choices of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func.compat.core.utils import (
    flatten_params,
    get_param_shapes,
    get_params_by_module_type,
    get_params_by_name_pattern,
    unflatten_params,
)
from secorder_func.errors import ArgumentError, ArgumentTypeError


def _params() -> list[Tensor]:
    shapes = [(2, 3), (), (4,), (0, 2), (1, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.inner = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.inner[0].weight


def test_pieces_of_the_flat_vector_are_the_parameters() -> None:
    params = _params()
    flat = flatten_params(p for p in params)
    assert flat.shape == (6 + 1 + 4 + 0 + 4,)
    for p, piece in zip(params, unflatten_params(flat, get_param_shapes(params)), strict=True):
        assert piece.shape == p.shape
        assert torch.equal(piece, p)


def test_entries_of_a_transposed_tensor_are_in_the_order_of_its_rows() -> None:
    transposed = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).t()
    assert flatten_params([transposed]).tolist() == [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]


def test_the_flat_vector_is_new_memory_and_its_pieces_are_views() -> None:
    p = torch.ones(3)
    flat = flatten_params([p])
    unflatten_params(flat, [(3,)])[0].zero_()
    assert flat.tolist() == [0.0, 0.0, 0.0]
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_gradients_flow_through_both_directions() -> None:
    p = torch.tensor([[1.0, 2.0]], requires_grad=True)
    q = torch.tensor(3.0, requires_grad=True)
    a, b = unflatten_params(flatten_params([p, q]) ** 2, [(1, 2), ()])
    grads = torch.autograd.grad(a.sum() * b, [p, q])
    assert grads[0].tolist() == [[18.0, 36.0]]
    assert grads[1].item() == 30.0


def test_dtypes_promote_as_in_cat() -> None:
    flat = flatten_params([torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)])
    assert flat.dtype == torch.float64


def test_shapes_may_be_tuples_and_lists_and_the_vector_strided() -> None:
    strided = torch.arange(12.0)[::2]
    a, b = unflatten_params(strided, [[2, 2], (2,)])  # type: ignore[list-item]
    assert a.tolist() == [[0.0, 2.0], [4.0, 6.0]]
    assert b.tolist() == [8.0, 10.0]


@pytest.mark.parametrize("entries", [0, 2, 4])
def test_a_vector_of_another_length_is_refused(entries: int) -> None:
    with pytest.raises(ArgumentError, match=rf"must have shape \(3,\) .* got \({entries},\)"):
        unflatten_params(torch.zeros(entries), [torch.Size([3])])


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: flatten_params([]), ArgumentError, "params is empty"),
        (lambda: flatten_params(None), ArgumentTypeError, "got NoneType"),
        (lambda: flatten_params({"a": torch.ones(1)}), ArgumentTypeError, "got dict"),
        (lambda: flatten_params([torch.ones(1), None]), ArgumentTypeError, r"params\[1\]"),
        (lambda: flatten_params(torch.ones(())), ArgumentTypeError, "0-dim"),
        (lambda: get_param_shapes([1.0]), ArgumentTypeError, r"params\[0\]"),
        (lambda: unflatten_params(torch.ones(1, 2), [(2,)]), ArgumentError, r"got \(1, 2\)"),
        (lambda: unflatten_params(torch.ones(2), [(2, -1), (4,)]), ArgumentError, "negative"),
        (lambda: unflatten_params([1.0], [(1,)]), ArgumentTypeError, "flat_params"),
        (lambda: unflatten_params(torch.ones(2), [2]), ArgumentTypeError, "param_shapes"),
        (lambda: get_params_by_module_type(None, nn.Linear), ArgumentTypeError, "model"),
        (lambda: get_params_by_module_type(_Nested(), "Linear"), ArgumentTypeError, "module_type"),
        (lambda: get_params_by_name_pattern(None, "a"), ArgumentTypeError, "model"),
        (lambda: get_params_by_name_pattern(_Nested(), "("), ArgumentError, "regular expression"),
        (lambda: get_params_by_name_pattern(_Nested(), 1), ArgumentTypeError, "pattern"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize("kind", [nn.Linear, [nn.Linear], (nn.Linear, nn.Conv2d)])
def test_every_layer_of_a_type_has_its_parameters_and_tied_ones_are_in_both(kind: Any) -> None:
    model = _Nested()
    found = get_params_by_module_type(model, kind)
    assert list(found) == ["first", "inner.0", "tied"]
    assert [p is q for p, q in zip(found["first"], model.first.parameters(), strict=True)] == [
        True,
        True,
    ]
    assert found["inner.0"][0] is found["tied"][0]


def test_a_module_has_the_parameters_of_the_modules_inside_it() -> None:
    model = _Nested()
    found = get_params_by_module_type(model, [_Nested, nn.Sequential, nn.ReLU])
    assert {name: len(params) for name, params in found.items()} == {
        "": 4,
        "inner": 1,
        "inner.1": 0,
    }


def test_a_pattern_is_searched_for_in_the_whole_name() -> None:
    model = _Nested()
    assert get_params_by_name_pattern(model, "first") == list(model.first.parameters())
    assert [p.shape for p in get_params_by_name_pattern(model, r"^inner\.\d+\.weight$")] == [(2, 2)]
    assert get_params_by_name_pattern(model, "nothing") == []
