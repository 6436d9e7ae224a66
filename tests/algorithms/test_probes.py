"""Probe distributions: what the numbers depend on, and their moments within five standard errors."""

from __future__ import annotations

import math
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from secorder_func import probes
from tests import oracles

MANY = 40_000
DISTRIBUTIONS: dict[str, Any] = {
    "rademacher": probes.rademacher,
    "normal": probes.normal,
    "sphere": probes.sphere,
    "sparse": probes.sparse_rademacher(0.25),
    "sparse tenth": probes.sparse_rademacher(),
}
FOURTH = {"rademacher": 1.0, "normal": 3.0, "sparse": 4.0, "sparse tenth": 10.0}
"""E[v_i^4] of the distributions with independent entries of unit variance."""
LIKE = {
    "w": torch.zeros(3, 5, dtype=torch.float64),
    "b": (torch.zeros((), dtype=torch.float64), None, torch.zeros(0, 2, dtype=torch.float64)),
    "a": torch.zeros(2, dtype=torch.float64),
}

every = pytest.mark.parametrize("name", DISTRIBUTIONS)


def _rows(stack: Any) -> Tensor:
    leaves = optree.tree_leaves(stack)
    return torch.cat([leaf.reshape(leaf.shape[0], leaf.shape[1:].numel()) for leaf in leaves], 1)


def _equal(x: Any, y: Any) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(optree.tree_leaves(x), optree.tree_leaves(y), strict=True)
    )


def _within(mean: Tensor, expected: Any, samples: Tensor, sigmas: float = 5.0) -> bool:
    """Say whether means over axis 0 lie within so many standard errors of their expectation."""
    error = samples.std(0) / math.sqrt(samples.shape[0])
    return bool(((mean - expected).abs() <= sigmas * error + 1e-12).all())


# ---------------------------------------------------------------------- what a probe depends on


@every
def test_a_probe_depends_on_seed_and_number_only(name: str) -> None:
    draw = DISTRIBUTIONS[name]
    together = draw(3, range(10), LIKE)
    for k in range(10):
        alone = draw(3, range(k, k + 1), LIKE)
        assert _equal(alone, optree.tree_map(lambda leaf, k=k: leaf[k : k + 1], together))


@every
def test_probes_of_a_later_chunk_are_those_of_the_whole(name: str) -> None:
    draw = DISTRIBUTIONS[name]
    whole = draw(3, range(1000), LIKE)
    part = draw(3, range(700, 707), LIKE)
    assert _equal(part, optree.tree_map(lambda leaf: leaf[700:707], whole))


@every
def test_drawing_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    DISTRIBUTIONS[name](3, range(4), LIKE)
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_global_generator_does_not_enter(name: str) -> None:
    torch.manual_seed(1)
    first = DISTRIBUTIONS[name](3, range(4), LIKE)
    torch.manual_seed(2)
    assert _equal(first, DISTRIBUTIONS[name](3, range(4), LIKE))


@every
def test_another_seed_gives_other_probes(name: str) -> None:
    draw = DISTRIBUTIONS[name]
    like = torch.zeros(200)
    rows = torch.cat([draw(seed, range(2), like) for seed in (0, 1, 2, 2**62, 2**63 - 2)])
    assert len(torch.unique(rows, dim=0)) == 10


@every
def test_the_values_of_like_do_not_enter(name: str) -> None:
    draw = DISTRIBUTIONS[name]
    ones = optree.tree_map(torch.ones_like, LIKE)
    assert _equal(draw(3, range(4), LIKE), draw(3, range(4), ones))


def test_the_order_of_dict_keys_does_not_enter() -> None:
    x, y = torch.zeros(5), torch.zeros(5)
    one = probes.rademacher(0, range(3), {"x": x, "y": y})
    other = probes.rademacher(0, range(3), {"y": y, "x": x})
    assert _equal(one, {"x": other["x"], "y": other["y"]})


# -------------------------------------------------------------------------------------- structure


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes_are_those_of_like_with_one_more_axis(
    name: str, dtype: torch.dtype
) -> None:
    like = optree.tree_map(lambda leaf: leaf.to(dtype), LIKE)
    stack = DISTRIBUTIONS[name](0, range(2, 6), like)
    assert optree.tree_structure(stack) == optree.tree_structure(like)
    for leaf, row in zip(optree.tree_leaves(like), optree.tree_leaves(stack), strict=True):
        assert row.shape == (4, *leaf.shape)
        assert row.dtype == dtype
    assert torch.isfinite(_rows(stack)).all()
    assert float(_rows(stack).float().norm()) > 0


@pytest.mark.parametrize("name", ["rademacher", "normal", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_precision_probe_is_close_to_the_double_one(name: str, dtype: torch.dtype) -> None:
    draw = DISTRIBUTIONS[name]
    wide = draw(0, range(4), torch.zeros(50, dtype=torch.float64))
    narrow = draw(0, range(4), torch.zeros(50, dtype=dtype))
    assert oracles.relative_error(narrow, wide) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@every
@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 200])
def test_entries_at_the_edges_of_words_are_balanced_and_unequal(name: str, count: int) -> None:
    rows = DISTRIBUTIONS[name](1, range(4000), torch.zeros(count, dtype=torch.float64))
    assert rows.shape == (4000, count)
    assert _within(rows.mean(0), 0.0, rows, sigmas=5.5)
    assert _within(rows.square().mean(0), 1.0, rows.square(), sigmas=6.5) or count == 1
    last = rows[:, -1]
    assert len(last.unique()) > 1


@pytest.mark.parametrize("count", range(1, 201, 7))
def test_a_longer_leaf_starts_with_the_entries_of_a_shorter_one(count: int) -> None:
    longest = probes.rademacher(1, range(3), torch.zeros(200))
    assert torch.equal(probes.rademacher(1, range(3), torch.zeros(count)), longest[:, :count])


def test_no_probes_are_an_empty_stack() -> None:
    assert probes.rademacher(0, range(0), torch.zeros(3)).shape == (0, 3)


# ---------------------------------------------------------------------------------- distributions


@every
def test_the_mean_is_zero(name: str) -> None:
    rows = _rows(DISTRIBUTIONS[name](7, range(MANY), LIKE))
    assert _within(rows.mean(0), 0.0, rows)


@every
def test_the_second_moment_is_the_identity(name: str) -> None:
    rows = _rows(DISTRIBUTIONS[name](8, range(MANY), LIKE))
    outer = rows[:, :, None] * rows[:, None, :]
    assert _within(outer.mean(0), torch.eye(rows.shape[1]).double(), outer)


@pytest.mark.parametrize("name", FOURTH)
def test_the_fourth_moment_is_that_of_the_distribution(name: str) -> None:
    fourth = _rows(DISTRIBUTIONS[name](9, range(MANY), LIKE)) ** 4
    assert _within(fourth.mean(0), FOURTH[name], fourth)


def test_the_fourth_moment_on_the_sphere_is_three_n_over_n_plus_two() -> None:
    rows = _rows(probes.sphere(9, range(MANY), LIKE))
    n = rows.shape[1]
    assert _within((rows**4).mean(0), 3 * n / (n + 2), rows**4)


def test_the_third_moment_of_the_normal_is_zero() -> None:
    cubes = _rows(probes.normal(10, range(MANY), LIKE)) ** 3
    assert _within(cubes.mean(0), 0.0, cubes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_normal_has_the_tails_of_the_normal(dtype: torch.dtype) -> None:
    draws = probes.normal(11, range(2000), torch.zeros(500, dtype=dtype)).flatten().double()
    for z in (0.0, 1.0, 2.0, 3.0, 4.0):
        share = (draws > z).double()
        expected = 0.5 * math.erfc(z / math.sqrt(2))
        error = math.sqrt(expected * (1 - expected) / len(share))
        assert abs(float(share.mean()) - expected) < 5 * error


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_neighbouring_entries_leaves_and_probes_are_uncorrelated(name: str) -> None:
    like = {"a": torch.zeros(64).double(), "b": torch.zeros(64).double()}
    stack = DISTRIBUTIONS[name](12, range(1000), like)
    a, b = stack["a"], stack["b"]
    for products in (a * b, a[1:] * a[:-1], a[:, 1:] * a[:, :-1], a[1:] * b[:-1]):
        flat = products.flatten()
        # On the sphere entries are dependent, but uncorrelated all the same.
        assert abs(float(flat.mean())) < 5 * float(flat.std()) / math.sqrt(len(flat))


@pytest.mark.parametrize("first", [0, 1, 17])
def test_streams_of_neighbouring_seeds_are_uncorrelated(first: int) -> None:
    like = torch.zeros(64).double()
    one, two = (probes.rademacher(seed, range(1000), like) for seed in (first, first + 1))
    assert abs(float((one * two).mean())) < 5 / math.sqrt(64_000)
    assert not torch.equal(one[1:], two[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rademacher_entries_are_plus_or_minus_one(dtype: torch.dtype) -> None:
    assert probes.rademacher(0, range(5), torch.zeros(77, dtype=dtype)).unique().tolist() == [-1, 1]


def test_sphere_probes_have_the_length_of_the_square_root_of_n() -> None:
    rows = _rows(probes.sphere(0, range(100), LIKE))
    oracles.assert_same(
        rows.norm(dim=1), torch.full((100,), math.sqrt(18), dtype=torch.float64), 1e-14
    )


def test_sphere_probes_of_mixed_precision_have_the_length_of_the_square_root_of_n() -> None:
    like = {"a": torch.zeros(40), "b": torch.zeros(9).double()}
    stack = probes.sphere(0, range(10), like)
    squares = stack["a"].double().square().sum(1) + stack["b"].square().sum(1)
    oracles.assert_same(squares.sqrt(), torch.full((10,), 7.0).double(), 1e-6)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_sparse_probes_have_their_density(density: float) -> None:
    rows = probes.sparse_rademacher(density)(0, range(100), torch.zeros(1000).double())
    kept = (rows != 0).double()
    assert abs(float(kept.mean()) - density) < 5 * math.sqrt(density * (1 - density) / 1e5)
    scale = 1 / math.sqrt(density)
    torch.testing.assert_close(rows.unique(), torch.tensor([-scale, 0.0, scale]).double())


def test_sparse_probes_of_full_density_are_rademacher_ones() -> None:
    rows = probes.sparse_rademacher(1.0)(0, range(100), torch.zeros(1000))
    assert rows.unique().tolist() == [-1.0, 1.0]


# ------------------------------------------------------------------------------------------ seeds


def test_the_generator_decides_the_seed() -> None:
    seeds = [probes.draw_seed(torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_generator_gives_another_seed_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len({probes.draw_seed(generator) for _ in range(20)}) == 20


def test_without_a_generator_the_global_one_decides() -> None:
    torch.manual_seed(4)
    first = probes.draw_seed(None)
    torch.manual_seed(4)
    assert probes.draw_seed(None) == first


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^sparse_rademacher: density must be in \(0, 1\], got {density}"
    ):
        probes.sparse_rademacher(density)
