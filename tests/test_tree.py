"""The vector space of pytrees on examples, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from secorder_func import checks, ggnvp, tree

# ------------------------------------------------------------------------------------ on examples


def test_flatten_sorts_keys_and_skips_none() -> None:
    x = {"b": torch.tensor(1.0), "a": (None, torch.tensor(2.0))}
    assert [float(leaf) for leaf in tree.flatten(x)[0]] == [2.0, 1.0]


def test_map_follows_keys_not_their_order() -> None:
    assert tree.map(lambda x, y: x - y, {"a": 3, "b": 5}, {"b": 1, "a": 1}) == {"a": 2, "b": 4}


def test_dot_follows_keys_not_their_order() -> None:
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    y = {"b": torch.tensor([1.0, 0.0]), "a": torch.tensor([0.0, 1.0])}
    assert float(tree.dot(x, y)) == 5.0
    stacked = tree.map(lambda leaf: leaf[None], x), tree.map(lambda leaf: leaf[None], y)
    assert tree.batched_dot(*stacked).tolist() == [5.0]


def test_dot_of_complex_leaves_is_the_real_inner_product() -> None:
    x, y = torch.tensor([1 + 2j, 3j]), torch.tensor([2 - 1j, 1 + 1j])
    assert float(tree.dot(x, y)) == 3.0
    assert tree.batched_dot(x[None], y[None]).tolist() == [3.0]


def test_dot_of_half_precision_adds_in_single() -> None:
    x = torch.ones(5000, dtype=torch.bfloat16)
    assert float(tree.dot(x, x)) == 5000.0
    assert float(tree.batched_dot(x[None], x[None])) == 5000.0


def test_norm_is_euclidean() -> None:
    assert float(tree.norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})) == 5.0


def test_numel_counts_entries() -> None:
    assert tree.numel([torch.zeros(2, 3), torch.zeros(()), torch.zeros(0, 5), None]) == 7


def test_common_dtype_is_what_all_leaves_promote_to() -> None:
    x = [torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1), torch.zeros(1).double()]
    assert tree.common_dtype(x) == torch.float64
    assert tree.common_dtype(x[:2]) == torch.float32


def test_tensors_in_finds_tensors_among_anything() -> None:
    one = torch.zeros(1)
    assert tree.tensors_in({"a": 1, "b": [one, "x"]}, object(), None) == [one]


def test_random_like_is_standard_normal() -> None:
    draw = tree.random_like(
        torch.zeros(10_000).double(), generator=torch.Generator().manual_seed(0)
    )
    assert abs(float(draw.mean())) < 5 / 100
    assert abs(float(draw.square().mean()) - 1) < 5 * 2**0.5 / 100


def test_random_like_without_a_generator_uses_the_global_one() -> None:
    torch.manual_seed(0)
    first = tree.random_like(torch.zeros(3))
    assert not torch.equal(first, tree.random_like(torch.zeros(3)))
    torch.manual_seed(0)
    assert torch.equal(first, tree.random_like(torch.zeros(3)))


# ----------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({}, ValueError, r"^here: params has no tensor in it\. Give it"),
        ([None], ValueError, r"^here: params has no tensor"),
        ([1.0], TypeError, r"^here: every leaf .* At \[0\] got float\. Make it a tensor"),
        ([object()], TypeError, r"^here: .*At \[0\] got object\. Register the class with optree"),
        (
            {"m": torch.nn.Linear(1, 1)},
            TypeError,
            r"^here: .*At \['m'\] got Linear\. .*named_parameters",
        ),
        (
            (torch.zeros(1), torch.zeros(1, dtype=torch.bool)),
            ValueError,
            r"^here: .*At \[1\] got torch\.bool",
        ),
    ],
)
def test_params_that_cannot_be_differentiated_are_refused(
    params: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        checks.check_params(params, "here")


@pytest.mark.parametrize(
    "params", [torch.zeros(2), torch.zeros(2, dtype=torch.complex64), [torch.zeros(0)]]
)
def test_floating_and_complex_params_pass(params: Any) -> None:
    assert checks.check_params(params, "here") is None


L = {"a": torch.zeros(2, 3), "b": [torch.zeros(())]}


@pytest.mark.parametrize(
    ("v", "error", "words"),
    [
        (
            {"a": torch.zeros(3, 2), "b": [torch.zeros(())]},
            ValueError,
            r"^here: v must match params\. At \['a'\] expected shape \(2, 3\), got \(3, 2\)\. Build v",
        ),
        (
            {"a": torch.zeros(2, 3), "b": [torch.zeros(1)]},
            ValueError,
            r"At \['b'\]\[0\] expected shape \(\), got \(1,\)",
        ),
        (
            {"a": torch.zeros(2, 3).double(), "b": [torch.zeros(())]},
            ValueError,
            r"At \['a'\] expected dtype torch\.float32, got torch\.float64",
        ),
        (
            {"a": torch.zeros(2, 3), "b": [torch.zeros((), device="meta")]},
            ValueError,
            r"At \['b'\]\[0\] expected device cpu, got meta",
        ),
        (
            {"a": torch.zeros(2, 3), "b": ["x"]},
            TypeError,
            r"At \['b'\]\[0\] expected a tensor, got str",
        ),
        ({"a": torch.zeros(2, 3)}, TypeError, r"structure of params\. Expected .*'b'.*, got .*'a'"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(())}, TypeError, "structure of params"),
    ],
)
def test_what_is_no_vector_of_the_space_is_refused(
    v: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        checks.check_like(v, L, "here")


@pytest.mark.parametrize(
    ("v", "words"),
    [
        ({"a": torch.zeros(2, 3), "b": [torch.zeros(2)]}, r"At \['a'\] expected shape \(k, 2, 3\)"),
        (
            {"a": torch.zeros(4, 2, 3), "b": [torch.zeros(5)]},
            r"At \['b'\]\[0\] expected 4 stacked vectors .*got 5",
        ),
        (
            {"a": torch.zeros(4, 2, 3), "b": [torch.zeros(())]},
            r"At \['b'\]\[0\] expected shape \(k",
        ),
    ],
)
def test_what_is_no_stack_of_vectors_is_refused(v: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        checks.check_like(v, L, "here", name="vectors", batched=True)
    assert "tree.stack" in str(caught.value)


def test_a_stack_of_vectors_passes() -> None:
    v = {"b": [torch.zeros(4)], "a": torch.zeros(4, 2, 3)}
    assert checks.check_like(v, L, "here", batched=True) is None


class Output:
    """A container that only torch's pytree knows, as the outputs of Hugging Face models are."""

    def __init__(self, logits: Any, cache: Any) -> None:
        self.logits, self.cache = logits, cache


pytree.register_pytree_node(
    Output, lambda o: ([o.logits, o.cache], None), lambda parts, _: Output(*parts)
)


def test_what_torchs_pytree_knows_is_taken_apart_fully_and_put_together() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    leaves, restore = tree.flatten_fully({"second": 5, "first": Output(a, (b, None))})
    assert leaves[0] is a
    assert leaves[1] is b
    assert leaves[-1] == 5
    doubled = restore([2 * leaf if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
    assert torch.equal(doubled["first"].logits, 2 * a)
    assert torch.equal(doubled["first"].cache[0], b)
    assert (doubled["first"].cache[1], doubled["second"]) == (None, 5)
    assert len(tree.tensors_in(Output(a, b), a)) == 3


def test_a_gauss_newton_product_sees_through_it() -> None:
    X, w = torch.randn(6, 3).double(), torch.randn(3).double()

    def model(w: Any, x: Any) -> Output:
        return Output(x @ w, cache="nothing")

    product = ggnvp(model, lambda output, y: ((output.logits - y) ** 2).sum())
    hv = product(w, w, X, torch.zeros(6).double())
    torch.testing.assert_close(hv, 2 * X.T @ (X @ w))
