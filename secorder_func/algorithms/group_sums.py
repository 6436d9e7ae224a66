"""Numbers of random probes, summed over groups, and what their spread says of the mean.

Whatever way they were computed in (chunks, several calls, an interruption), the numbers of `count` probes are put
together into the same groups, so that mean and standard error depend on the seed and the count only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.probes import (
    Distribution,
    distribution_name,
    leaf_sampler,
    sphere,
)
from secorder_func.algorithms.stopping import Operator
from secorder_func.algorithms.wide import wide
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, message
from secorder_func.operators.chunks import check_chunk_size
from secorder_func.operators.forms import FormsLike, group_size, plan_of, units
from secorder_func.typing import ChunkSize, Tree

__all__ = ["GroupSums", "Operator", "Sampling", "exact_forms", "mean_and_error", "settings_of"]


def settings_of(
    chunk_size: ChunkSize, memory_budget: int | None, distribution: Distribution | None = None
) -> State:
    """Return what the numbers of an estimator depend on, beside its probes' seed and their count."""
    name = None if distribution is None else distribution_name(distribution)
    return {"chunk_size": chunk_size, "memory_budget": memory_budget, "distribution": name}


class Sampling:
    """Which probes an estimator draws for which operator, in which chunks."""

    def __init__(
        self,
        op: Operator,
        seed: int,
        distribution: Distribution,
        chunk_size: ChunkSize,
        memory_budget: int | None,
        where: str,
    ) -> None:
        check_chunk_size(chunk_size, memory_budget, where)
        self.op = op
        self.seed = seed
        self.distribution = distribution
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self.where = where
        self.chunks = op.chunks(chunk_size, memory_budget, where)
        self._drawn = _seen(distribution, op.like)

    def probes(self, start: int, rows: slice) -> Tree:
        """Return some probes, counted from `start`."""
        return self.distribution(
            self.seed, range(start + rows.start, start + rows.stop), self.op.like
        )

    def state(self) -> State:
        """Return what tells whether other probes belong to these."""
        leaves = tree.flatten(self.op.like)[0]
        return {
            "seed": self.seed,
            "distribution": distribution_name(self.distribution),
            "drawn": self._drawn,
            "names": tree.names(self.op.like),
            "shapes": [list(leaf.shape) for leaf in leaves],
            "dtypes": [str(leaf.dtype) for leaf in leaves],
            "samples": list(self.op.batch_shape),
        }

    def require_same(self, state: State) -> None:
        """Refuse to continue what was begun with other probes or on another space."""
        for name, here in self.state().items():
            if state[name] != here:
                problem = f"resume was made with {name} {state[name]}, here it is {here}"
                raise ArgumentError(
                    message(self.where, problem, "Continue with the same operator and settings")
                )


def _seen(distribution: Distribution, like: Tree) -> str | None:
    """Return by what a distribution of the user's is known again; of ours the name suffices."""
    if distribution is sphere or leaf_sampler(distribution) is not None:
        return None
    return digest(tree.flatten(distribution(0, range(1), like))[0])


class GroupSums:
    """Numbers `value(probes)` of random probes, or sums of forms as a forward propagation gives them.

    Parameters
    ----------
    sampling
        The probes.
    value
        Stacked probes -> one number each, `(k, ...)`.
    forms
        The same by propagation, summed over groups, where there is that.
    """

    def __init__(
        self,
        sampling: Sampling,
        value: Callable[[Tree], Tensor],
        forms: FormsLike | None,
        state: State | None,
    ) -> None:
        self._sampling, self._value, self._forms = sampling, value, forms
        self.sizes: list[int] = []
        self.sums: list[Tensor] = []
        self.count = 0
        self.largest = 0
        self.by_propagation = False
        self._aim, self._group = 0, 1
        if state is not None:
            sampling.require_same(state)
            self.sizes, self.sums = list(state["sizes"]), [state["sums"]]
            self.count, self.by_propagation = sum(self.sizes), state["by_propagation"]
            self._aim, self._group = state["aim"], state["group"]
            self.largest = state["largest"]
            if forms is not None and state["term"] is not None:
                forms.largest = state["term"]

    def extend(self, total: int) -> None:
        """Compute the numbers of the probes up to `total`."""
        if self.count < total and (self.by_propagation or not self.count):
            self._propagate(total)
        if self.count == total:
            return
        if self.by_propagation:  # and no more
            self._forms = None
        start = self.count

        def numbers(vectors: Tree, rows: slice) -> Tensor:
            return self._value(vectors)

        probes = partial(self._sampling.probes, start)
        for part in self._sampling.chunks.map(probes, numbers, total - start):
            self.largest = max(self.largest, part.shape[0])
            self._add(part, [1] * part.shape[0])

    def cut(self) -> int:
        """Return how many probes there are: none is ever half done."""
        return self.count

    def estimate(self, total: int) -> Estimate:
        """Return the mean over all probes."""
        group = group_size(total) if self.by_propagation else 1
        sums, sizes = _merged(torch.cat(self.sums), self.sizes, group)
        mean, error = mean_and_error(sums, sizes)
        return Estimate(
            mean,
            error,
            total,
            self.largest,
            len(sizes) - 1,
            by_propagation=self.by_propagation and self._forms is not None,
        )

    def state(self) -> State:
        """Return the sums so far."""
        return {
            **self._sampling.state(),
            "sums": torch.cat(self.sums).detach() if self.sums else torch.zeros(0),
            "sizes": self.sizes,
            "by_propagation": self.by_propagation,
            "largest": self.largest,
            "aim": self._aim,
            "group": self._group,
            "term": None if self._forms is None else self._forms.largest,
        }

    def _add(self, sums: Tensor, sizes: list[int]) -> None:
        self.sums.append(sums)
        self.sizes += sizes
        self.count += sum(sizes)
        running.advance(self.count)

    def _propagate(self, total: int) -> None:
        """Extend by propagation as far as it goes."""
        sampling, forms = self._sampling, self._forms
        if forms is None:
            return
        plan = plan_of(
            sampling.op.like,
            sampling.op.device,
            sampling.chunk_size,
            sampling.memory_budget,
            group_size(total),
        )
        if self._aim == total:  # and an interruption came between
            plan.group = self._group
        self._aim, self._group = total, plan.group
        for part in forms.in_groups(self._draws, range(self.count, total), plan):
            self.by_propagation = True
            self.largest = max(self.largest, plan.largest)
            self._group = plan.group
            self._add(*part)

    def _draws(self, probes: range) -> Sequence[Any]:
        """Return what draws each leaf of some probes."""
        sampling = self._sampling
        leaves, _ = tree.flatten(sampling.op.like)
        sampler = leaf_sampler(sampling.distribution)
        if sampler is None:
            stacks, _ = tree.flatten(sampling.distribution(sampling.seed, probes, sampling.op.like))
            return [partial(torch.detach, stack) for stack in stacks]
        seed = sampling.seed
        return [partial(sampler, seed, probes, index, leaf) for index, leaf in enumerate(leaves)]


def _merged(sums: Tensor, sizes: list[int], group: int) -> tuple[Tensor, list[int]]:
    """Return the sums over groups of `group` probes, of parts that do not straddle them; the last may be short."""
    places, start = [], 0
    for size in sizes:
        places.append(start // group)
        start += size
    count = places[-1] + 1
    if count == len(sizes):
        return sums, sizes
    index = torch.tensor(places, device=sums.device)
    merged = sums.new_zeros(count, *sums.shape[1:]).index_add(0, index, sums)
    return merged, [min(group, start - place * group) for place in range(count)]


def mean_and_error(sums: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean over all probes, along the first axis, and its standard error from the spread of the groups.

    A group of `g` probes has a mean of variance `s²/g`, so that `sum g (mean_j - mean)² / (groups - 1)` estimates `s²`,
    also for groups of unequal sizes.
    """
    count = sum(sizes)
    work = wide(sums)
    mean = work.sum(0) / count
    if len(sizes) == 1:
        return mean.to(sums.dtype), torch.full_like(mean, torch.inf, dtype=sums.dtype)
    weights = work.new_tensor(sizes).reshape(-1, *[1] * (sums.ndim - 1))
    apart = (work / weights - mean).detach()
    variance = (weights * apart * apart).sum(0) / (len(sizes) - 1)
    return mean.to(sums.dtype), (variance / count).sqrt().to(sums.dtype)


def exact_forms(op: Operator, chunk_size: ChunkSize, budget: int | None) -> list[Tensor] | None:
    """Return `e . A e` for every entry of every leaf, `(entries, ...)`; None where there are products only."""
    forms = op.forms
    if forms is None:
        return None
    check_chunk_size(chunk_size, budget, "exact_diagonal")
    leaves, _ = tree.flatten(op.like)
    found: list[Tensor] = []
    for index, leaf in enumerate(leaves):
        plan = plan_of(op.like, op.device, chunk_size, budget)
        entries = range(leaf.numel())
        draws = partial(units, leaf, index, len(leaves))
        parts = list(forms.in_groups(draws, entries, plan))
        if sum(len(part.sizes) for part in parts) < len(entries):
            return None
        sums = [part.sums for part in parts]
        found.append(torch.cat(sums) if sums else leaf.new_zeros(0, *op.batch_shape))
    return found
