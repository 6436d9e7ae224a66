"""The vector space of pytrees, and products, on random trees."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import optree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secorder_func import checks, hessian_operator, hvp, tree
from tests import oracles

Pair = namedtuple("Pair", ["left", "right"])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64])
KEYS = st.sampled_from(["z", "a", "m", "10", "9"])


@st.composite
def leaves(draw: Any) -> Tensor:
    """Draw a tensor of small integers, which float arithmetic adds and multiplies exactly."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def _nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        few,
        few.map(tuple),
        st.lists(st.tuples(KEYS, children), min_size=1, max_size=3).map(dict),
        st.lists(st.tuples(KEYS, children), min_size=1, max_size=3).map(OrderedDict),
        st.tuples(children, children).map(lambda both: Pair(*both)),
        st.tuples(children, st.none()),
    )


def trees() -> st.SearchStrategy[Any]:
    """Draw trees of tensors with at least one leaf."""
    return st.recursive(leaves(), _nodes, max_leaves=5)


def _reordered(value: Any) -> Any:
    """Return the same tree with the keys of every plain dict in reverse order."""
    if type(value) is dict:
        return {k: _reordered(value[k]) for k in reversed(value)}
    if isinstance(value, Pair):
        return Pair(*map(_reordered, value))
    if type(value) in (list, tuple):
        return type(value)(map(_reordered, value))
    return value


def _identical(x: Any, y: Any) -> bool:
    pairs = zip(optree.tree_leaves(x), optree.tree_leaves(y), strict=True)
    return optree.tree_structure(x) == optree.tree_structure(y) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


# ------------------------------------------------------------------------------- on random trees


@given(trees())
def test_unflatten_undoes_flatten(x: Any) -> None:
    items, unflatten = tree.flatten(x)
    assert _identical(unflatten(items), x)


@given(trees())
def test_unravel_undoes_ravel(x: Any) -> None:
    flat, unravel = tree.ravel(x)
    assert flat.shape == (tree.numel(x),)
    assert _identical(unravel(flat), x)


@given(trees())
def test_ravel_puts_the_leaves_one_after_another(x: Any) -> None:
    assert torch.equal(tree.ravel(x)[0].double(), oracles.real_flat(x))


@given(trees(), st.integers(0, 3))
def test_ravel_keeps_leading_axes(x: Any, count: int) -> None:
    stacked = optree.tree_map(
        lambda leaf: torch.stack([leaf] * count) if count else leaf[None][:0], x
    )
    flat, _ = tree.ravel(stacked, batch_dims=1)
    assert flat.shape == (count, tree.numel(x))
    assert _identical(tree.ravel(x)[1](flat), stacked)


@given(trees())
def test_the_order_of_dict_keys_is_no_part_of_a_vector(x: Any) -> None:
    assert torch.equal(tree.ravel(x)[0], tree.ravel(_reordered(x))[0])
    checks.check_like(_reordered(x), x, "test")
    assert tree.dot(x, _reordered(x)) == tree.dot(x, x)


@given(trees())
def test_dot_is_the_sum_of_products_of_entries(x: Any) -> None:
    y = optree.tree_map(lambda leaf: 3 - leaf, x)
    expected = (oracles.real_flat(x) * oracles.real_flat(y)).sum()
    assert float(tree.dot(x, y)) == float(expected)


@given(trees())
def test_batched_dot_is_one_dot_a_row(x: Any) -> None:
    rows = [x, optree.tree_map(lambda leaf: 3 - leaf, x)]
    stacked = tree.stack(rows)
    assert tree.batched_dot(stacked, stacked).tolist() == [float(tree.dot(r, r)) for r in rows]


@given(trees())
def test_unstack_undoes_stack(x: Any) -> None:
    rows = [x, optree.tree_map(lambda leaf: 3 - leaf, x)]
    first, second = tree.unstack(tree.stack(rows))
    assert _identical(first, rows[0])
    assert _identical(second, rows[1])


@given(trees())
def test_the_basis_is_the_identity(x: Any) -> None:
    n = tree.numel(x)
    basis = tree.basis(x, 0, n)
    assert torch.equal(tree.ravel(basis, batch_dims=1)[0], torch.eye(n, dtype=tree.common_dtype(x)))


@given(trees(), st.data())
def test_a_part_of_the_basis_is_those_rows_of_the_identity(x: Any, data: Any) -> None:
    n = tree.numel(x)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    rows = tree.ravel(tree.basis(x, start, stop), batch_dims=1)[0]
    assert torch.equal(rows.double(), torch.eye(n).double()[start:stop])


@given(trees(), st.integers(-3, 3))
def test_arithmetic_is_that_of_entries(x: Any, a: int) -> None:
    y = optree.tree_map(lambda leaf: 3 - leaf, x)
    fx, fy = oracles.real_flat(x), oracles.real_flat(y)
    assert torch.equal(oracles.real_flat(tree.add(x, y)), fx + fy)
    assert torch.equal(oracles.real_flat(tree.sub(x, y)), fx - fy)
    assert torch.equal(oracles.real_flat(tree.scale(a, x)), a * fx)
    assert torch.equal(oracles.real_flat(tree.axpy(a, x, y)), a * fx + fy)
    assert torch.equal(oracles.real_flat(tree.axpy(torch.tensor(float(a)), x, y)), a * fx + fy)


@given(trees())
def test_arithmetic_keeps_the_dtype_of_every_leaf(x: Any) -> None:
    a = torch.tensor(2.0, dtype=torch.float64)
    for result in (tree.scale(a, x), tree.axpy(a, x, x), tree.add(x, x), tree.zeros_like(x)):
        kinds = [leaf.dtype for leaf in optree.tree_leaves(result)]
        assert kinds == [leaf.dtype for leaf in optree.tree_leaves(x)]


@given(trees())
def test_every_leaf_has_the_path_that_reaches_it(x: Any) -> None:
    places = tree.paths(x)
    for place, leaf in zip(places, optree.tree_leaves(x), strict=True):
        assert eval(f"x{place}", {"x": x}) is leaf


@given(trees(), st.integers(0, 2**16))
def test_random_like_depends_on_its_generator_only(x: Any, seed: int) -> None:
    draws = [tree.random_like(x, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert _identical(*draws)
    checks.check_like(draws[0], x, "test")


@given(trees(), st.integers(0, 2**16))
def test_hvp_of_a_quadratic_on_any_tree_is_the_product_with_its_matrix(x: Any, seed: int) -> None:
    n = tree.numel(x)
    if n == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    A = torch.randint(-3, 4, (n, n), generator=generator).double()
    A = A + A.T + torch.eye(n).double()
    v = optree.tree_map(lambda leaf: 1 + leaf.abs(), x)

    def f(params: Any) -> Tensor:
        p = torch.cat([leaf.reshape(-1).double() for leaf in optree.tree_leaves(params)])
        return 0.5 * p @ A @ p

    expected = A @ oracles.real_flat(v)
    for mode in ("auto", "forward_over_reverse", "reverse_over_reverse"):
        hv = hvp(f, mode=mode)(x, _reordered(v))
        assert optree.tree_structure(hv) == optree.tree_structure(x)
        assert torch.equal(oracles.real_flat(hv), expected)


@given(trees(), st.integers(0, 2**16))
def test_the_operator_of_a_quadratic_on_any_tree_is_its_matrix(x: Any, seed: int) -> None:
    n = tree.numel(x)
    generator = torch.Generator().manual_seed(seed)
    A = torch.randint(-3, 4, (n, n), generator=generator).double()
    A = A + A.T + torch.eye(n).double()

    def f(params: Any) -> Tensor:
        p = torch.cat([leaf.reshape(-1).double() for leaf in optree.tree_leaves(params)])
        return 0.5 * p @ A @ p

    op = hessian_operator(f, x)
    assert torch.equal(op.dense(chunk_size=3).double(), A)
    vector = torch.arange(1.0, n + 1).to(op.dtype)
    assert torch.equal((op.flat() @ vector).double(), A @ vector.double())
