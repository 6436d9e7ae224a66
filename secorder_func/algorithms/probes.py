r"""Random probe vectors with `E[v v^T] = I`.

Probe `k` of a seed depends on the seed and `k` only: not on the chunk in which it is drawn, nor on what was drawn
before, nor on the device. Every leaf of every probe has a stream of its own in a counter-based generator (the
output function of SplitMix64 applied to a counter), evaluated for all entries at once in integer arithmetic. A
Rademacher entry takes one bit, so that drawing costs little beside a product.

References
----------
G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
https://doi.org/10.1145/2660193.2660195
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_number
from secorder_func.errors import ArgumentTypeError, message
from secorder_func.seeds import draw_seed
from secorder_func.typing import Tree

__all__ = [
    "Distribution",
    "check_distribution",
    "distribution_name",
    "draw_seed",
    "leaf_sampler",
    "normal",
    "rademacher",
    "sparse_rademacher",
    "sphere",
]


class Distribution(Protocol):
    """A distribution of probes: `(seed, probes, like) -> ` a tree stacked along a leading axis of `len(probes)`."""

    def __call__(self, seed: int, probes: range, like: Tree, /) -> Tree:
        """Return the probes whose numbers are in the range."""


def rademacher(seed: int, probes: range, like: Tree, /) -> Tree:
    """Return probes of independent entries, +1 or -1 with equal probability.

    Of all distributions with independent entries this has the least variance for a trace.

    >>> like = {"w": torch.zeros(2, 2)}
    >>> both = rademacher(0, range(0, 2), like)["w"]
    >>> both.shape, both.abs().unique()
    (torch.Size([2, 2, 2]), tensor([1.]))
    >>> bool((rademacher(0, range(1, 2), like)["w"] == both[1:]).all())
    True
    """
    return _leafwise(_signs, seed, probes, like)


def normal(seed: int, probes: range, like: Tree, /) -> Tree:
    """Return probes of independent standard normal entries (Box-Muller).

    >>> normal(0, range(3), {"w": torch.zeros(2)})["w"].shape
    torch.Size([3, 2])
    """
    return _leafwise(_normals, seed, probes, like)


def sphere(seed: int, probes: range, like: Tree, /) -> Tree:
    """Return probes uniform on the sphere of radius sqrt(n), n the number of entries of the whole tree.

    >>> sphere(0, range(3), torch.zeros(4)).norm(dim=1).round(decimals=3)
    tensor([2., 2., 2.])
    """
    vectors = normal(seed, probes, like)
    lengths = tree.batched_dot(vectors, vectors).sqrt()
    factors = math.sqrt(tree.numel(like)) / lengths

    def scale(leaf: Tensor) -> Tensor:
        return leaf * factors.to(leaf).reshape(-1, *[1] * (leaf.ndim - 1))

    return tree.map(scale, vectors)


def sparse_rademacher(density: float = 0.1) -> Distribution:
    """Return the distribution of independent entries that are 0 but for a share `density` of +-1/sqrt(density).

    >>> probe = sparse_rademacher(0.25)(0, range(1), torch.zeros(10_000))
    >>> probe.unique()
    tensor([-2.,  0.,  2.])
    """
    check_number(density, "sparse_rademacher", name="density")
    if not 0 < density <= 1:
        raise ValueError(message("sparse_rademacher", f"density must be in (0, 1], got {density}"))

    def sample(seed: int, probes: range, like: Tree, /) -> Tree:
        return _leafwise(partial(_sparse_signs, density), seed, probes, like)

    setattr(sample, "sample_leaf", partial(_sparse_signs, density))  # noqa: B010
    sample.__qualname__ = f"sparse_rademacher({density:g})"
    return sample


def leaf_sampler(distribution: Distribution) -> Sampler | None:
    """Return `(seed, probes, index of a leaf, leaf) -> its part of the probes`; None if they are drawn whole only."""
    sampler: Sampler | None = getattr(distribution, "sample_leaf", None)
    return sampler


def distribution_name(distribution: Distribution) -> str:
    """Return by what name a distribution is known again."""
    return str(getattr(distribution, "__qualname__", type(distribution).__qualname__))


def check_distribution(distribution: Any, where: str) -> None:
    """Refuse what is no distribution of probes."""
    mend = "Pass probes.rademacher, normal, sphere or sparse_rademacher(density)"
    if distribution is sparse_rademacher:
        problem = "distribution must be called with its density first, got sparse_rademacher itself"
        raise ArgumentTypeError(message(where, problem, mend))
    check_callable(distribution, where, name="distribution", mend=mend)


# ---------------------------------------------------------------------- words of 64 random bits

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio as a signed word, SplitMix64's increment
_LEAF = -0x2E9BD9C1F1B72C35  # another odd constant, so that leaves and probes count apart
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix(words: Tensor) -> Tensor:
    """Return the output function of SplitMix64; int64 arithmetic wraps as unsigned would."""
    words = (words ^ _shift(words, 30)) * _FIRST
    words = (words ^ _shift(words, 27)) * _SECOND
    return words ^ _shift(words, 31)


_SIGN, _ONE = -(2**31), 0x3F800000
"""Of a float32: the bit of the sign, and the number one."""


def _mixed(word: int) -> int:
    """Return `_mix` of one word."""
    word %= 2**64
    word = ((word ^ word >> 30) * _FIRST) % 2**64
    word = ((word ^ word >> 27) * _SECOND) % 2**64
    return _signed(word ^ word >> 31)


def _signed(word: int) -> int:
    """Return an integer modulo 2**64, as int64 holds it."""
    return (word + 2**63) % 2**64 - 2**63


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _words(seed: int, probes: range, leaf: int, count: int, device: torch.device) -> Tensor:
    """Return `count` words for each probe and one leaf, `(len(probes), count)`."""
    rows = torch.arange(probes.start, probes.stop, device=device)
    keys = _mix(_mix(rows * _GOLDEN + _mixed(seed)) + _signed((leaf + 1) * _LEAF))
    counter = torch.arange(1, count + 1, device=device) * _GOLDEN
    return _mix(keys[:, None] + counter)


Sampler = Callable[[int, range, int, Tensor], Tensor]


def _leafwise(sample: Sampler, seed: int, probes: range, like: Tree) -> Tree:
    leaves, unflatten = tree.flatten(like)
    return unflatten([sample(seed, probes, index, leaf) for index, leaf in enumerate(leaves)])


def _working_dtype(leaf: Tensor) -> torch.dtype:
    return torch.float64 if leaf.dtype == torch.float64 else torch.float32


def _shaped(entries: Tensor, probes: range, leaf: Tensor) -> Tensor:
    return entries[:, : leaf.numel()].reshape(len(probes), *leaf.shape).to(leaf.dtype)


def _signs(seed: int, probes: range, index: int, leaf: Tensor) -> Tensor:
    # A bit, turned over, becomes the sign of a float32 one.
    halves = ~_words(seed, probes, index, -(-leaf.numel() // 64), leaf.device).view(torch.int32)
    places = torch.arange(31, -1, -1, dtype=torch.int32, device=leaf.device)
    signs = (halves.unsqueeze(-1) << places).bitwise_and_(_SIGN).bitwise_or_(_ONE)
    return _shaped(signs.view(torch.float32).flatten(1), probes, leaf)


def _halves(seed: int, probes: range, index: int, leaf: Tensor) -> Tensor:
    """Return one int32 an entry, rounded up to an even number of entries."""
    count = -(-leaf.numel() // 2)
    return _words(seed, probes, index, count, leaf.device).view(torch.int32)


def _normals(seed: int, probes: range, index: int, leaf: Tensor) -> Tensor:
    uniform = _halves(seed, probes, index, leaf).to(_working_dtype(leaf)).mul_(2.0**-32).add_(0.5)
    pairs = uniform.unflatten(1, (-1, 2))
    radius = pairs[..., 0].clamp(min=2.0**-33).log().mul(-2.0).sqrt()
    angle = pairs[..., 1] * (2 * math.pi)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return _shaped(normals.flatten(1), probes, leaf)


def _sparse_signs(density: float, seed: int, probes: range, index: int, leaf: Tensor) -> Tensor:
    halves = _halves(seed, probes, index, leaf)
    uniform = (halves >> 1).to(_working_dtype(leaf)) * 2.0**-31 + 0.5  # 31 bits, [0, 1)
    signs = ((halves & 1) * 2 - 1).to(uniform.dtype)
    kept = torch.where(uniform < density, signs, torch.zeros_like(signs))
    return _shaped(kept / math.sqrt(density), probes, leaf)


setattr(rademacher, "sample_leaf", _signs)  # noqa: B010
setattr(normal, "sample_leaf", _normals)  # noqa: B010
