"""Mean and spread of trees of random numbers, one a probe, in memory that does not grow with their count."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.group_sums import Sampling
from secorder_func.algorithms.wide import wide
from secorder_func.typing import Tree

__all__ = ["Moments"]


class Moments:
    """The moments of `value(probes)`, a tree stacked over probes.

    Chunks are joined by the pairwise update of Chan, Golub and LeVeque (1983).
    """

    def __init__(
        self, sampling: Sampling, value: Callable[[Tree], Tree], state: State | None
    ) -> None:
        self._sampling, self._value = sampling, value
        self.count = self._largest = 0
        self._mean: list[Tensor] = []
        self._spread: list[Tensor] = []  # sums of squared deviations from the mean
        self._unflatten: Callable[[Any], Tree] = tuple
        self._dtypes: list[torch.dtype] = []
        if state is not None:
            sampling.require_same(state)
            self.count, self._largest = state["count"], state["largest"]
            self._mean = state["mean"]
            self._spread = [leaf.clone() for leaf in state["spread"]]
            leaves, self._unflatten = tree.flatten(sampling.op.like)
            self._dtypes = [leaf.dtype for leaf in leaves]

    def extend(self, total: int) -> None:
        """Add the probes up to `total`."""
        if self.count == total:
            return

        def moments(vectors: Tree, rows: slice) -> tuple[int, list[Tensor], list[Tensor]]:
            samples, self._unflatten = tree.flatten(self._value(vectors))
            self._dtypes = [x.dtype for x in samples]
            count = rows.stop - rows.start
            if count == 1 and self.count:  # by the first, which is one, the memory is counted
                return 1, [wide(x[0]) for x in samples], []
            both = [_moments(x) for x in samples]
            return count, [mean for mean, _ in both], [spread for _, spread in both]

        chunks = self._sampling.chunks
        probes = partial(self._sampling.probes, self.count)
        for count, mean, spread in chunks.map(probes, moments, total - self.count):
            self._join(count, mean, spread)
            self._largest = max(self._largest, count)
            running.advance(self.count)

    def _join(self, count: int, mean: list[Tensor], spread: list[Tensor]) -> None:
        done, both = self.count, self.count + count
        self.count = both
        if not done:
            self._mean = mean
            self._spread = spread or [torch.zeros_like(leaf) for leaf in mean]
            return
        apart = [new - old for new, old in zip(mean, self._mean, strict=True)]
        self._mean = [
            torch.add(old, a, alpha=count / both) for old, a in zip(self._mean, apart, strict=True)
        ]
        for total, own in zip(self._spread, spread, strict=False):
            total.add_(own)
        for total, a in zip(self._spread, apart, strict=True):
            between = a.detach()
            total.addcmul_(between, between, value=done * count / both)

    def cut(self) -> int:
        """Return how many probes there are: none is ever half done."""
        return self.count

    def estimate(self, total: int) -> Estimate:
        """Return the mean and its standard error."""
        errors = [
            leaf.sqrt() / math.sqrt(total * (total - 1))
            if total > 1
            else torch.full_like(leaf, math.inf)
            for leaf in self._spread
        ]
        value, error = (
            self._unflatten([t.to(dtype) for t, dtype in zip(part, self._dtypes, strict=True)])
            for part in (self._mean, errors)
        )
        return Estimate(value, error, total, self._largest, total - 1)

    def state(self) -> State:
        """Return the moments so far."""
        return {
            **self._sampling.state(),
            "count": self.count,
            "largest": self._largest,
            "mean": [leaf.detach() for leaf in self._mean],
            "spread": [leaf.clone() for leaf in self._spread],
        }


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean along the first axis, and the sum of squared deviations from it."""
    values = wide(samples)
    mean = values.mean(0)
    return mean, (values - mean).detach().square().sum(0)
