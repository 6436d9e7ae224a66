"""The Jacobian of a closure's output in its parameters, where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.compat._arguments import Leaves
from secorder_func.errors import ArgumentError, ArgumentTypeError, NoExactRouteError, message
from secorder_func.operators.chunks import chunks, default_chunk_size
from secorder_func.rules import evaluated
from secorder_func.rules.cut_graphs import UnrecordedBackwardError
from secorder_func.transforms.plain_autograd import recording
from secorder_func.transforms.plain_jacobian import PlainJacobian
from secorder_func.transforms.policy import first_exact

__all__ = ["ClosureJacobian", "frozen_output"]

T = TypeVar("T")


class ClosureJacobian:
    """The Jacobian of a closure whose output is one tensor; the closure is evaluated here, once.

    By plain autograd, which differentiates the parameters where they are, so that none can hide. Parameters that the
    output does not use get zeros.

    Parameters
    ----------
    func
        A closure that returns a tensor of any shape.
    params
        Distinct tensors that require gradients.
    create_graph
        Whether products can be differentiated again.
    where
        The public function, for messages.

    Attributes
    ----------
    output
        What was evaluated.
    """

    def __init__(
        self, func: Callable[[], Any], params: Leaves, *, create_graph: bool, where: str
    ) -> None:
        def evaluate() -> Leaves:
            return (_checked_output(func(), where),)

        self.where = where
        self.params = params
        self._plain = PlainJacobian(evaluate, params, create_graph=create_graph)
        (self.output,) = self._plain.outputs
        self._height = self.output.numel()
        self._width = sum(p.numel() for p in params)
        self._is_real = not any(t.is_complex() for t in (self.output, *params))

    def push(self, vector: Leaves) -> Tensor:
        """Return `J v`, shaped like the output."""
        if self._is_real and self._height == 1:  # the gradient is all there is
            return self._directional(vector)
        return self._first_exact(
            lambda: self._plain.push(vector)[0],
            lambda: self._inner_products(tuple(leaf[None] for leaf in vector))[0],
        )

    def push_several(self, vectors: Leaves) -> Tensor:
        """Return `J v` for vectors stacked along a leading axis, `(count, *output.shape)`.

        By one backward pass for each output, or one product for each vector, whichever are fewer.
        """
        count = vectors[0].shape[0]
        if self._is_real and self._height <= count:
            return self._inner_products(vectors)

        def products() -> Tensor:
            parts = [
                self._plain.push_several(tuple(leaf[part] for leaf in vectors))[0]
                for part in self._chunks(count)
            ]
            with self.recording():
                empty = self.output.new_zeros((0, *self.output.shape))
                return torch.cat([empty, *parts])

        return self._first_exact(products, lambda: self._inner_products(vectors))

    def require_real_output(self) -> None:
        """Refuse an output whose rows are no gradients."""
        if self.output.is_complex():
            raise ArgumentError(
                message(
                    self.where,
                    f"the output must be real, got {self.output.dtype}",
                    "Return its real and imaginary parts, with torch.view_as_real",
                )
            )

    def pull(self, cotangent: Tensor) -> Leaves:
        """Return `J^T u` for `u` shaped like the output."""
        return self._plain.pull((cotangent,))

    def pull_several(self, cotangents: Tensor) -> Leaves:
        """Return `J^T u` for cotangents stacked along a leading axis."""
        parts = [
            self._plain.pull_several((cotangents[part],))
            for part in self._chunks(cotangents.shape[0])
        ]
        return self._joined(parts)

    def rows(self) -> Iterator[Leaves]:
        """Yield the rows of the Jacobian, some at a time: for each parameter `(rows, *p.shape)`."""
        for part in self._chunks(self._height):
            with recording(False):  # no inference tensors
                basis = tree.basis(self.output, part.start, part.stop)
            yield self._plain.pull_several((basis,))

    def dense(self) -> Leaves:
        """Return the whole Jacobian, for each parameter `(output.numel(), p.numel())`.

        By one backward pass for each output, or one product for each entry of the parameters, whichever are fewer.
        The output must be real. Complex parameters go by rows, in torch's convention for gradients.
        """

        def by_rows() -> Leaves:
            rows = self._joined(list(self.rows()))
            with self.recording():
                return tuple(_flat(block) for block in rows)

        def by_columns() -> Leaves:
            columns = []
            for part in self._chunks(self._width):
                with recording(False):
                    basis = tree.basis(self.params, part.start, part.stop)
                columns.append(self._plain.push_several(basis)[0])
            with self.recording():
                whole = _flat(torch.cat(columns)).T
                blocks = whole.split([p.numel() for p in self.params], dim=1)
                pairs = zip(blocks, self.params, strict=True)
                return tuple(block.to(p).contiguous() for block, p in pairs)

        if self._is_real and 0 < self._width < self._height:
            return self._first_exact(by_columns, by_rows)
        return by_rows()

    def _directional(self, vector: Leaves) -> Tensor:
        """Return `J v` of a single output as the inner product of its gradient with the vector."""
        with self.recording():
            pairs = zip(vector, self.pull(torch.ones_like(self.output)), strict=True)
            terms = [_inner(v, g.to_dense()).to(self.output) for v, g in pairs]
            return torch.stack(terms).sum().reshape(self.output.shape)

    def _inner_products(self, vectors: Leaves) -> Tensor:
        """Return `J v` as the inner products of vectors with the rows of the Jacobian."""
        parts = [self.output.new_zeros((vectors[0].shape[0], 0))]
        with self.recording():
            for blocks in self.rows():
                pairs = zip(vectors, blocks, strict=True)
                terms = [(_flat(v) @ _flat(block).T).to(self.output) for v, block in pairs]
                parts.append(torch.stack(terms).sum(0))
            return torch.cat(parts, 1).reshape(vectors[0].shape[0], *self.output.shape)

    def recording(self) -> AbstractContextManager[None]:
        """Return the context in which results are combined: with a graph where that was asked for."""
        return recording(self._plain.create_graph)

    def _joined(self, parts: list[Leaves]) -> Leaves:
        if not parts:
            return tuple(p.new_zeros((0, *p.shape)) for p in self.params)
        with self.recording():
            return tuple(torch.cat(blocks) for blocks in zip(*parts, strict=True))

    def _chunks(self, count: int) -> Iterator[slice]:
        size = default_chunk_size(max(self._width, self._height), at_most=256)
        return chunks(count, size, self.where)

    def _first_exact(self, products: Callable[[], T], rows: Callable[[], T]) -> T:
        """Return what products with `J` give, or rows where torch has no second derivative of some function."""
        if not self._is_real:
            return products()

        def by_products() -> T:
            try:
                return products()
            except UnrecordedBackwardError as error:  # which rows do not ask for
                raise NoExactRouteError(str(error)) from error

        _, found = first_exact(
            [
                ("product by double backward", by_products),
                ("one backward pass for each output", rows),
            ],
            where=self.where,
            tensors=self.params,
            eager=lambda: None,
        )
        return found


def _inner(v: Tensor, g: Tensor) -> Tensor:
    """Return the inner product without a copy, as a multiplication and a sum would make."""
    return torch.dot(v.reshape(-1), g.reshape(-1))


def _flat(stacked: Tensor) -> Tensor:
    """Return a matrix whose rows are the entries of a stack."""
    if stacked.layout != torch.strided:  # the gradient of a sparse embedding
        stacked = stacked.to_dense()
    return stacked.reshape(stacked.shape[0], stacked.shape[1:].numel())


def frozen_output(func: Callable[[], Any], params: Leaves, where: str) -> Tensor:
    """Return the output of a model all of whose parameters are frozen, without a graph."""
    output = evaluated(lambda rules: func(), forward=False, higher=False, protect=params)
    return _checked_tensor(output, where).detach()


def _checked_output(output: Any, where: str) -> Tensor:
    if not _checked_tensor(output, where).requires_grad:
        raise ArgumentError(
            message(
                where,
                "the output does not depend on any parameter",
                "Check what the closure returns",
            )
        )
    return output  # type: ignore[no-any-return]


def _checked_tensor(output: Any, where: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ArgumentTypeError(
            message(
                where,
                f"the output must be one tensor, got {type(output).__name__}",
                "Return the tensor to differentiate; wrap a model with several outputs in one that returns one",
            )
        )
    if not (output.is_floating_point() or output.is_complex()):
        raise ArgumentError(message(where, f"the output must be floating, got {output.dtype}"))
    return output
