"""Exact products by plain autograd, twice, outside all of torch.func's transforms.

The last resort, for what only plain autograd differentiates (a custom `autograd.Function` without `setup_context`,
activation checkpointing); and the way of a closure to a result with a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import (
    ArgumentError,
    ArgumentTypeError,
    NoExactRouteError,
    message,
)
from secorder_func.rules import SecondOrderRules, evaluated, evaluation
from secorder_func.rules.backward import grad_under_rules
from secorder_func.rules.cut_graphs import refuse_cut_history
from secorder_func.transforms.loss import Leaves, checked_scalar

__all__ = [
    "DoubleBackward",
    "GGNDoubleBackward",
    "gradients",
    "or_zeros",
    "plain_gradient",
    "to_differentiate",
]

Pairs = list[tuple[Tensor, Tensor]]


class DoubleBackward:
    """The product with a Hessian, by two backward passes.

    The loss is evaluated here, once. Parameters that it does not use get zeros.

    Parameters
    ----------
    evaluate
        `() -> loss`, a 0-dim tensor, computed from `params` as they are.
    params
        Where to differentiate; tensors that require gradients.
    create_graph
        Whether products can be differentiated again.

    Attributes
    ----------
    gradient
        Its leaves, None where the loss does not depend on a parameter or has no derivative in it.
    seen
        The ids of the parameters that a torch function of the loss was given.
    """

    def __init__(
        self, evaluate: Callable[[], Tensor], params: Leaves, *, create_graph: bool = False
    ) -> None:
        self.params = params
        self.create_graph = create_graph
        self.higher = create_graph
        self.seen: set[int] = set()

        def differentiate(rules: SecondOrderRules) -> list[Tensor | None]:
            loss = evaluate()
            self.seen = rules.seen
            if not loss.requires_grad:
                return [None] * len(params)
            refuse_cut_history([loss.grad_fn])
            self.higher = rules.higher
            return gradients([loss], params, create_graph=True)

        with _recording():
            self.gradient = evaluated(
                differentiate,
                forward=False,
                higher=create_graph,
                exchange=[(p, p) for p in params],  # to see which are used
                protect=params,
            )
        refuse_cut_history([g.grad_fn for g in self.gradient if g is not None and g.requires_grad])

    def __call__(self, vector: Leaves) -> Leaves:
        """Return the product with one vector."""
        pairs = _paired(self.gradient, vector)
        with self._under_rules():
            return _pull(pairs, self.params, create_graph=self.create_graph)

    def several(self, vectors: Leaves) -> Leaves:
        """Return the products with vectors stacked along a leading axis."""
        pairs = _paired(self.gradient, vectors)
        with self._under_rules():
            return _pull_several(pairs, self.params, self.create_graph, vectors[0].shape[0])

    @contextmanager
    def _under_rules(self) -> Iterator[None]:
        with (
            _recording(),
            evaluation(forward=False, higher=self.higher, protect=self.params),
        ):
            yield


class GGNDoubleBackward:
    """The product `J^T H_L J v`, `J v` as the derivative of the pullback with respect to its cotangent.

    Model and loss are evaluated here, once; arguments as for `DoubleBackward`.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        loss_of: Callable[[Any], Tensor],
        params: Leaves,
        where: str,
        *,
        create_graph: bool = False,
    ) -> None:
        self.params = params
        self.create_graph = create_graph
        self.higher = create_graph

        def differentiate(rules: SecondOrderRules) -> None:
            outputs, self.smooth = _cloned(model())
            if not self.smooth:
                raise ArgumentTypeError(
                    message(
                        where, "no output of the model is a tensor that depends on its parameters"
                    )
                )
            loss = checked_scalar(loss_of(outputs), where)
            if not loss.requires_grad:
                raise ArgumentError(
                    message(where, "the loss does not depend on the model's output")
                )
            refuse_cut_history([loss.grad_fn, *(z.grad_fn for z in self.smooth)])
            self.higher = rules.higher
            self.cotangents = tuple(torch.zeros_like(z, requires_grad=True) for z in self.smooth)
            self.pulled = gradients(self.smooth, params, self.cotangents, create_graph=True)
            self.slope = gradients([loss], self.smooth, create_graph=True)

        with _recording():
            evaluated(differentiate, forward=False, higher=create_graph, protect=params)

    def __call__(self, vector: Leaves) -> Leaves:
        """Return the product with one vector."""
        with _recording(), evaluation(forward=False, higher=self.higher, protect=self.params):
            tangents = _pull(_paired(self.pulled, vector), self.cotangents, create_graph=True)
            bent = _pull(_paired(self.slope, tangents), self.smooth, create_graph=True)
            pairs = list(zip(self.smooth, bent, strict=True))
            return _pull(pairs, self.params, create_graph=self.create_graph)


def to_differentiate(leaves: Leaves, *, differentiable: bool) -> Leaves:
    """Return tensors with the values of `leaves` to differentiate in, with their history if `differentiable`."""
    with _recording():
        return tuple(
            leaf.view_as(leaf)
            if differentiable and leaf.requires_grad
            else leaf.detach().requires_grad_()
            for leaf in leaves
        )


def _cloned(outputs: Any) -> tuple[Any, Leaves]:
    """Return the outputs with copies of the differentiable ones, and the copies.

    One output may be computed from another; the loss's derivative in a copy does not run through its siblings.
    """
    items, unflatten = tree.flatten_fully(outputs)
    copies: list[Tensor] = []
    for index, item in enumerate(items):
        if isinstance(item, Tensor) and item.requires_grad:
            items[index] = item.clone()
            copies.append(items[index])
    return unflatten(items), tuple(copies)


@contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def plain_gradient(
    loss: Callable[[Leaves], tuple[Tensor, Leaves]], leaves: Leaves, *, differentiable: bool
) -> Leaves:
    """Return the gradient of a loss by plain autograd, at tensors made for it."""
    at = to_differentiate(leaves, differentiable=differentiable)

    def differentiate(rules: SecondOrderRules) -> list[Tensor | None]:
        value = loss(at)[0]
        if not value.requires_grad:
            return [None] * len(at)
        return gradients([value], at, create_graph=differentiable)

    with _recording():
        found = evaluated(differentiate, forward=False, higher=differentiable, protect=at)
    return or_zeros(found, at)


def gradients(
    outputs: Sequence[Tensor], inputs: Leaves, cotangents: Any = None, **options: Any
) -> list[Tensor | None]:
    """Return autograd's derivatives, None for an input that no output depends on."""
    try:
        with _hooks_set_aside(inputs):
            found: Any = grad_under_rules(outputs, inputs, cotangents, allow_unused=True, **options)
    except ArgumentError:
        raise
    except RuntimeError as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise NoExactRouteError(
            f"torch has no derivative here: {cause}. Replace the function that this names; where only the second "
            "derivative is missing, approximate_hvp estimates the product."
        ) from error
    return list(found)


@contextmanager
def _hooks_set_aside(tensors: Leaves) -> Iterator[None]:
    """Take the hooks off tensors: what they do to a gradient is no part of the function."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def or_zeros(found: Sequence[Tensor | None], like: Leaves) -> Leaves:
    """Return zeros in the place of missing derivatives."""
    pairs = zip(found, like, strict=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in pairs)


def _paired(outputs: Sequence[Tensor | None], cotangents: Leaves) -> Pairs:
    """Return the pairs whose output has a derivative of its own."""
    zipped = zip(outputs, cotangents, strict=True)
    return [(z, v) for z, v in zipped if z is not None and z.requires_grad]


def _pull(pairs: Pairs, params: Leaves, *, create_graph: bool) -> Leaves:
    """Return the derivative of `sum(<output, cotangent>)` in `params`, zeros where there is none.

    Graphs are kept: a part of them may be the user's.
    """
    if not pairs:
        return tuple(torch.zeros_like(p) for p in params)
    outputs, cotangents = zip(*pairs, strict=True)
    found = gradients(outputs, params, cotangents, retain_graph=True, create_graph=create_graph)
    return or_zeros(found, params)


def _pull_several(pairs: Pairs, params: Leaves, create_graph: bool, count: int) -> Leaves:
    """Do the same for `count` cotangents stacked along a leading axis, batched where torch can."""
    zeros = tuple(p.new_zeros((count, *p.shape)) for p in params)
    if not pairs:
        return zeros
    outputs, cotangents = zip(*pairs, strict=True)
    try:
        found = gradients(
            outputs,
            params,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=True,
        )
    except RuntimeError:  # no batching rule: one by one
        rows = [
            _pull(list(zip(outputs, row, strict=True)), params, create_graph=create_graph)
            for row in zip(*cotangents, strict=True)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return tuple(z if h is None else h for h, z in zip(found, zeros, strict=True))
