"""Blocks of an operator: what it does within a group of leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.forms import Draw
from secorder_func.typing import Tree

if TYPE_CHECKING:
    from secorder_func.operators.linear_operator import LinearOperator

__all__ = ["Selection", "block_diagonal_of", "block_of", "groups_of"]

Selection: TypeAlias = str | Iterable[str] | Callable[[str], bool]
"""Names of leaves, or of what holds them; or a function that says yes to the names that are wanted."""


def groups_of(like: Tree, groups: Any, where: str) -> dict[str, list[int]]:
    """Return which leaves belong to each group, by their index; the modules that hold them if no groups are given."""
    names = tree.names(like)
    _refuse_twins(names, where)
    if groups is None:
        found: dict[str, list[int]] = {}
        leaves = tree.flatten(like)[0]
        for index, name in enumerate(names):
            if leaves[index].numel():
                found.setdefault(name.rpartition(".")[0] or name or "all", []).append(index)
        return found
    if not isinstance(groups, Mapping):
        problem = f"groups must be a dict of selections by name, got {type(groups).__name__}"
        raise ArgumentTypeError(message(where, problem))
    if not groups:
        raise ArgumentError(message(where, "groups is empty"))
    chosen = {group: selected(like, selection, where) for group, selection in groups.items()}
    taken: dict[int, str] = {}
    for group, indices in chosen.items():
        for index in indices:
            if index in taken:
                problem = f"leaf {names[index]!r} is in two groups, {taken[index]!r} and {group!r}"
                raise ArgumentError(message(where, problem))
            taken[index] = group
    return chosen


def selected(like: Tree, selection: Any, where: str) -> list[int]:
    """Return the indices of the leaves that a selection names."""
    names = tree.names(like)
    _refuse_twins(names, where)
    if callable(selection):
        found = [index for index, name in enumerate(names) if selection(name)]
        problem = "the predicate says yes to no leaf"
    else:
        if not isinstance(selection, Iterable):
            given = type(selection).__name__
            problem = f"a selection is a name, names or a function of a name, got {given}"
            raise ArgumentTypeError(message(where, problem))
        wanted = [selection] if isinstance(selection, str) else list(selection)
        for one in wanted:
            if not any(_holds(one, name) for name in names):
                problem = f"no leaf has the name {one!r}, nor is in something of that name"
                raise ArgumentError(message(where, problem, f"Names are: {', '.join(names)}"))
        found = [i for i, name in enumerate(names) if any(_holds(one, name) for one in wanted)]
        problem = "the selection is empty"
    if not found:
        raise ArgumentError(message(where, problem, f"Names are: {', '.join(names)}"))
    return found


def _refuse_twins(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(message(where, f"two leaves have the name {twice!r}"))


def _holds(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


class _Part:
    """Some leaves of a space as a space of its own: a dict by name."""

    def __init__(self, like: Tree, indices: Sequence[int]) -> None:
        self._leaves, self._unflatten = tree.flatten(like)
        names = tree.names(like)
        # A dict's leaves are sorted by key, here and in whatever is made of it.
        self.indices = sorted(indices, key=lambda index: names[index])
        self.like = {names[index]: self._leaves[index] for index in self.indices}

    def widened(self, part: Tree, *, stacked: bool) -> Tree:
        """Return a vector of the whole space, zero outside of the part."""
        inside = dict(zip(self.indices, tree.flatten(part)[0], strict=True))
        axes = next(iter(inside.values())).shape[:1] if stacked else ()
        return self._unflatten(
            [
                inside[index] if index in inside else leaf.new_zeros((*axes, *leaf.shape))
                for index, leaf in enumerate(self._leaves)
            ]
        )

    def placed(self, draws: Sequence[Draw | None]) -> Sequence[Draw | None]:
        """Return what draws each leaf of the whole space; None outside of the part."""
        inside = dict(zip(self.indices, draws, strict=True))
        return [inside.get(index) for index in range(len(self._leaves))]

    def restricted(self, whole: Tree) -> Tree:
        """Return the part of a vector of the whole space."""
        leaves = tree.flatten(whole)[0]
        return {name: leaves[index] for name, index in zip(self.like, self.indices, strict=True)}


def block_of(op: LinearOperator, selection: Selection, where: str) -> dict[str, Any]:
    """Return the fields of the operator of a diagonal block."""
    part = _Part(op.like, selected(op.like, selection, where))

    def matvec(v: Tree) -> Tree:
        return part.restricted(op.matvec(part.widened(v, stacked=False)))

    def matmat(vectors: Tree) -> Tree:
        assert op.matmat is not None
        return part.restricted(op.matmat(part.widened(vectors, stacked=True)))

    def quadratic(vectors: Tree) -> Tensor:
        return op.quadratic_forms(part.widened(vectors, stacked=True))

    forms = None
    if op.forms is not None:
        forms = op.forms.moved(tuple(part.like.values()), part.placed)
    return {
        "matvec": matvec,
        "like": part.like,
        "matmat": None if op.matmat is None else matmat,
        "quadratic": None if op.quadratic is None else quadratic,
        "forms": forms,
        "rows": None if op.rows is None else op.rows.restricted(part.indices),
        "symmetric": op.symmetric,
        "mode": op.mode,
        "witness": None if op.witness is None else op.witness.block(selection),
        "passes": op.passes,
        "ranks": op.ranks,
    }


def block_diagonal_of(
    op: LinearOperator, groups: Mapping[str, Selection] | None, where: str
) -> dict[str, Any]:
    """Return the fields of the operator that keeps the blocks of groups and nothing between them."""
    chosen = list(groups_of(op.like, groups, where).values())
    leaves, unflatten = tree.flatten(op.like)

    def matvec(v: Tree) -> Tree:
        return tree.map(lambda leaf: leaf[0], matmat(tree.map(lambda leaf: leaf.unsqueeze(0), v)))

    def matmat(vectors: Tree) -> Tree:
        stacks = tree.flatten(vectors)[0]
        count = stacks[0].shape[0]
        found: list[Tensor | None] = [None] * len(leaves)
        for indices in chosen:
            inside = set(indices)
            padded = unflatten(
                [s if i in inside else torch.zeros_like(s) for i, s in enumerate(stacks)]
            )
            products = tree.flatten(op.mm(padded))[0]
            for index in indices:
                found[index] = products[index]
        return unflatten(
            [
                leaf.new_zeros((count, *leaf.shape)) if product is None else product
                for leaf, product in zip(leaves, found, strict=True)
            ]
        )

    return {
        "matvec": matvec,
        "like": op.like,
        "matmat": matmat,
        "symmetric": op.symmetric,
        "witness": None if op.witness is None else op.witness.block_diagonal(groups),
        "passes": op.passes,
        "ranks": op.ranks,
    }
