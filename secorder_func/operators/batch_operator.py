"""The operator of a sum over batches, whose every product is a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.operators.batch_forms import BatchForms, BatchRows
from secorder_func.operators.batch_kinds import Kind
from secorder_func.operators.batch_sums import Add, Batch, BatchSums
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import Tree

__all__ = ["operator_over", "wide_zeros"]

T = TypeVar("T")


def operator_over(kind: Kind, sums: BatchSums, params: Tree) -> LinearOperator:
    """Return the operator of the sum over the batches."""
    leaves, unflatten = tree.flatten(params)
    like = tree.map(Tensor.detach, params)
    number = torch.promote_types(tree.common_dtype(like), torch.float32)
    forms = rows = None
    if not (differentiated_outside(params) or in_transform()):
        forms = BatchForms(sums, kind.forms, tuple(tree.flatten(like)[0]))
        rows = BatchRows(sums, kind, like)

    def summed(what: str, vectors: Tree, axes: tuple[int, ...], add_products: AddBatch) -> Tree:
        zeros = [wide_zeros(leaf, *axes) for leaf in leaves]
        totals = sums.over(what, zeros, add_products, vectors=lambda: tree.flatten(vectors)[0])
        return unflatten([t.to(leaf.dtype) for t, leaf in zip(totals, leaves, strict=True)])

    def matvec(v: Tree) -> Tree:
        def add_product(batch: Batch, add: Add) -> None:
            add(tree.flatten(kind.product(batch, v))[0])

        return summed("a product", v, (), add_product)

    def matmat(vectors: Tree) -> Tree:
        count = tree.flatten(vectors)[0][0].shape[0]
        whole = differentiated_outside(vectors, params) or in_transform()

        def add_products(batch: Batch, add: Add) -> None:
            if count == 1:
                product = kind.product(batch, _only(vectors))
                add([leaf.unsqueeze(0) for leaf in tree.flatten(product)[0]])
                return
            op = _several(kind, sums, batch)
            if whole:
                add(tree.flatten(op.mm(vectors))[0])
                return
            _in_chunks(op, "LinearOperator.mm", vectors, op._mm, lambda t: tree.flatten(t)[0], add)

        return summed(f"{count} products", vectors, (count,), add_products)

    def quadratic(vectors: Tree) -> Tensor:
        found = None if forms is None else forms.of(vectors)
        if found is not None:
            return found.to(number)
        count = tree.flatten(vectors)[0][0].shape[0]
        if differentiated_outside(vectors, params) or in_transform():
            return tree.batched_dot(vectors, matmat(vectors))

        def add_forms(batch: Batch, add: Add) -> None:
            if count == 1:
                v = _only(vectors)
                add([tree.dot(v, kind.product(batch, v)).detach().reshape(1)])
                return
            op = _several(kind, sums, batch)
            where = "LinearOperator.quadratic_forms"
            _in_chunks(op, where, vectors, op.quadratic_forms, lambda t: [t.detach()], add)

        zeros = torch.zeros(count, dtype=torch.float64, device=leaves[0].device)
        stacks = tree.flatten(vectors)[0]
        (total,) = sums.over(f"{count} forms", [zeros], add_forms, vectors=lambda: stacks)
        return total.to(number)

    def on_first(v: Tree) -> Tree:
        batch = sums.first()
        if batch is None:
            return tree.zeros_like(like)
        with sums.randomness(batch).replayed():
            return kind.product(batch, v)

    return LinearOperator(
        matvec=matvec,
        like=like,
        matmat=matmat,
        quadratic=quadratic,
        forms=forms,
        rows=rows,
        passes=True,
        witness=LinearOperator(on_first, like),
        ranks=sums.ranks,
        learned=sums.known,
    )


AddBatch = Callable[[Batch, Add], None]


def wide_zeros(leaf: Tensor, *axes: int) -> Tensor:
    """Return where to sum up what is like a leaf, in single precision at least."""
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return torch.zeros((*axes, *leaf.shape), dtype=dtype, device=leaf.device)


def _several(kind: Kind, sums: BatchSums, batch: Batch) -> LinearOperator:
    """Return the operator of a batch, which goes by what chunks of such batches took before."""
    return replace(kind.operator(batch), learned=sums.sizes(batch))


def _in_chunks(
    op: LinearOperator,
    where: str,
    vectors: Tree,
    work: Callable[[Tree], T],
    tensors: Callable[[T], list[Tensor]],
    add: Add,
) -> None:
    """Add what is made of several vectors, some at a time."""
    count = tree.flatten(vectors)[0][0].shape[0]
    chunks = op.chunks("auto", None, where)
    parts = chunks.map(
        lambda rows: tree.map(lambda leaf: leaf[rows], vectors),
        lambda some, rows: (rows, work(some)),
        count,
    )
    for rows, part in parts:
        add(tensors(part), rows)


def _only(vectors: Tree) -> Tree:
    return tree.map(lambda leaf: leaf[0], vectors)
