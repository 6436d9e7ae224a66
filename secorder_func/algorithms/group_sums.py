"""Numbers of random probes, summed over groups, and what their spread says of the mean.

Whatever way they were computed in (chunks, several calls, an interruption), the numbers of `count` probes are put
together into the same groups, so that mean and standard error depend on the seed and the count only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate, State
from secorder_func.algorithms.probes import Distribution, distribution_name, leaf_sampler
from secorder_func.algorithms.wide import wide
from secorder_func.errors import ArgumentError, message
from secorder_func.operators import LinearOperator, PerSampleOperator
from secorder_func.operators.chunks import check_chunk_size
from secorder_func.operators.forms import Forms, Plan, group_size
from secorder_func.operators.memory import is_out_of_memory
from secorder_func.typing import ChunkSize, Tree

__all__ = ["GroupSums", "Operator", "Sampling", "exact_forms", "mean_and_error"]

Operator: TypeAlias = LinearOperator | PerSampleOperator


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
        forms: Forms | None,
        state: State | None,
    ) -> None:
        self._sampling, self._value, self._forms = sampling, value, forms
        self.sizes: list[int] = []
        self.sums: list[Tensor] = []
        self.count = 0
        self.largest = 0
        self.by_propagation = False
        if state is not None:
            sampling.require_same(state)
            self.sizes, self.sums = list(state["sizes"]), [state["sums"]]
            self.count, self.by_propagation = sum(self.sizes), state["by_propagation"]

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
            self._add(part, 1, part.shape[0])
        self.largest = max(self.largest, self._sampling.chunks.largest)

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
            "sums": torch.cat(self.sums).detach(),
            "sizes": self.sizes,
            "by_propagation": self.by_propagation,
        }

    def _add(self, sums: Tensor, each: int, count: int) -> None:
        self.sums.append(sums)
        self.sizes += [each] * (count // each)
        self.count += count

    def _propagate(self, total: int) -> None:
        """Extend by propagation as far as it goes."""
        sampling, forms = self._sampling, self._forms
        if forms is None:
            return
        group = group_size(total)
        if sampling.chunk_size not in (None, "auto"):
            group = _power_of_two(min(group, int(sampling.chunk_size)))
        plan = _plan(sampling.op, sampling.chunk_size, sampling.memory_budget)
        while self.count < total:
            size = plan.size(total - self.count, group, forms.largest)
            group = _power_of_two(min(group, size))
            for count, each in _pieces(self.count, size, group):
                try:
                    found = forms(self._draws(count), count, count // each)
                except RuntimeError as error:
                    if sampling.chunk_size != "auto" or count == 1 or not is_out_of_memory(error):
                        raise
                    plan.halve(count)
                    break
                if found is None:
                    return
                self.by_propagation = True
                self.largest = max(self.largest, count)
                self._add(found, each, count)

    def _draws(self, count: int) -> Sequence[Any]:
        """Return what draws each leaf of the next probes."""
        sampling, probes = self._sampling, range(self.count, self.count + count)
        leaves, _ = tree.flatten(sampling.op.like)
        sampler = leaf_sampler(sampling.distribution)
        if sampler is None:
            stacks, _ = tree.flatten(sampling.distribution(sampling.seed, probes, sampling.op.like))
            return [partial(torch.detach, stack) for stack in stacks]
        seed = sampling.seed
        return [partial(sampler, seed, probes, index, leaf) for index, leaf in enumerate(leaves)]


def _pieces(start: int, size: int, group: int) -> list[tuple[int, int]]:
    """Return the counts into which the next probes fall, and of how many each group is: groups begin at multiples."""
    pieces = []
    if start % group:
        first = min(group - start % group, size)
        pieces.append((first, first))
        size -= first
    if size >= group:
        pieces.append((size - size % group, group))
    if size % group:
        pieces.append((size % group, size % group))
    return pieces


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


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


def _plan(op: Operator, chunk_size: ChunkSize, budget: int | None) -> Plan:
    leaves, _ = tree.flatten(op.like)
    largest = max((leaf.numel() * leaf.element_size() for leaf in leaves), default=0)
    return Plan(chunk_size, budget, op.device, largest)


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
    for index in range(len(leaves)):
        entries = _entries(op, forms, leaves, index, _plan(op, chunk_size, budget))
        if entries is None:
            return None
        found.append(entries)
    return found


def _entries(
    op: Operator, forms: Forms, leaves: Sequence[Tensor], index: int, plan: Plan
) -> Tensor | None:
    """Return the forms of the entries of one leaf; the other leaves have no terms."""
    leaf = leaves[index]
    parts: list[Tensor] = []
    start = 0
    while start < leaf.numel():
        size = plan.size(leaf.numel() - start, 1, forms.largest)
        draw = partial(tree.basis, leaf, start, start + size)
        draws = [draw if place == index else None for place in range(len(leaves))]
        try:
            found = forms(draws, size, size)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            plan.halve(size)
            continue
        if found is None:
            return None
        parts.append(found)
        start += size
    return torch.cat(parts) if parts else leaf.new_zeros(0, *op.batch_shape)
