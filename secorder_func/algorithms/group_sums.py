"""Sums of quadratic forms over groups of probes, as a forward propagation gives them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.probes import Distribution, leaf_sampler
from secorder_func.operators import LinearOperator
from secorder_func.operators.chunks import check_chunk_size
from secorder_func.operators.forms import Forms, Plan, group_size
from secorder_func.operators.memory import is_out_of_memory
from secorder_func.typing import ChunkSize, Tree

__all__ = ["GroupSums", "exact_forms", "group_sums", "mean_and_error"]


@dataclass(frozen=True)
class GroupSums:
    """Sums of forms, how many probes each is of, and the largest chunk."""

    sums: Tensor
    sizes: list[int]
    largest: int


def group_sums(
    op: LinearOperator,
    count: int,
    seed: int,
    distribution: Distribution,
    chunk_size: ChunkSize,
    budget: int | None,
) -> GroupSums | None:
    """Return the sums for random probes, None where the operator has products only."""
    if op.forms is None:
        return None
    check_chunk_size(chunk_size, budget, "hutchinson_trace")
    leaves, _ = tree.flatten(op.like)
    sampler = leaf_sampler(distribution)

    def draws(probes: range) -> Sequence[Any]:
        if sampler is None:
            stacks, _ = tree.flatten(distribution(seed, probes, op.like))
            return [partial(torch.detach, stack) for stack in stacks]
        return [partial(sampler, seed, probes, index, leaf) for index, leaf in enumerate(leaves)]

    group = group_size(count)
    if chunk_size not in (None, "auto"):
        group = min(group, int(chunk_size))
    plan = _plan(op, chunk_size, budget)
    sums: list[Tensor] = []
    sizes: list[int] = []
    largest = start = 0
    while start < count:
        size = plan.size(count - start, group, op.forms.largest)
        group = min(group, size)
        whole = size - size % group
        for begin, number, each in (
            (start, whole, group),
            (start + whole, size - whole, size - whole),
        ):
            if not number:
                continue
            try:
                found = op.forms(draws(range(begin, begin + number)), number, number // each)
            except RuntimeError as error:
                if chunk_size != "auto" or number == 1 or not is_out_of_memory(error):
                    raise
                plan.halve(number)
                break
            if found is None:
                return None
            sums.append(found)
            sizes += [each] * (number // each)
            largest = max(largest, number)
            start = begin + number
    return GroupSums(torch.cat(sums), sizes, largest)


def _plan(op: LinearOperator, chunk_size: ChunkSize, budget: int | None) -> Plan:
    leaves, _ = tree.flatten(op.like)
    largest = max((leaf.numel() * leaf.element_size() for leaf in leaves), default=0)
    return Plan(chunk_size, budget, op.device, largest)


def mean_and_error(sums: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean over all probes, along the first axis, and its standard error from the spread of the groups.

    A group of `g` probes has a mean of variance `s²/g`, so that `sum g (mean_j - mean)² / (groups - 1)` estimates `s²`,
    also for groups of unequal sizes.
    """
    count = sum(sizes)
    work = sums if sums.dtype.itemsize > 2 else sums.float()
    weights = work.new_tensor(sizes).reshape(-1, *[1] * (sums.ndim - 1))
    mean = work.sum(0) / count
    if len(sizes) == 1:
        return mean.to(sums.dtype), torch.full_like(mean, torch.inf, dtype=sums.dtype)
    apart = (work / weights - mean).detach()
    variance = (weights * apart * apart).sum(0) / (len(sizes) - 1)
    return mean.to(sums.dtype), (variance / count).sqrt().to(sums.dtype)


def exact_forms(op: LinearOperator, chunk_size: ChunkSize, budget: int | None) -> Tree | None:
    """Return `e . A e` for every entry of the space, a tree like `op.like`; None where there are products only."""
    forms = op.forms
    if forms is None:
        return None
    check_chunk_size(chunk_size, budget, "exact_diagonal")
    leaves, unflatten = tree.flatten(op.like)
    found: list[Tensor] = []
    for index, leaf in enumerate(leaves):
        entries = _entries(op, forms, leaves, index, _plan(op, chunk_size, budget))
        if entries is None:
            return None
        found.append(entries.to(leaf).reshape(leaf.shape))
    return unflatten(found)


def _entries(
    op: LinearOperator, forms: Forms, leaves: Sequence[Tensor], index: int, plan: Plan
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
    return torch.cat(parts) if parts else leaf.new_zeros(0)
