"""Derivatives by plain autograd, outside all of torch.func's transforms, where tensors are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func.errors import ArgumentError, NoExactRouteError
from secorder_func.rules import SecondOrderRules, evaluated, evaluation
from secorder_func.rules.backward import grad_under_rules
from secorder_func.rules.cut_graphs import History, UnrecordedBackwardError
from secorder_func.rules.torch_func import without_vmap_warnings
from secorder_func.transforms.loss import Leaves

__all__ = [
    "PlainEvaluation",
    "gradients",
    "or_zeros",
    "paired",
    "pull",
    "pull_several",
    "recording",
    "to_differentiate",
]

Pairs = list[tuple[Tensor, Tensor]]


def recording(on: bool = True) -> AbstractContextManager[Any]:
    """Record a graph inside, or none, whatever the caller has switched off or on."""
    if torch.is_inference_mode_enabled():
        return _out_of_inference_mode(on)
    return nullcontext() if torch.is_grad_enabled() == on else torch.set_grad_enabled(on)


@contextmanager
def _out_of_inference_mode(on: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(on):
        yield


class PlainEvaluation:
    """Something evaluated once under the rules, to be differentiated by plain autograd where tensors are.

    Parameters
    ----------
    evaluate
        `() -> tensors`, computed from `params` as they are.
    params
        Where to differentiate.
    create_graph
        Whether derivatives can be differentiated again.
    forward
        As for `evaluated`.

    Attributes
    ----------
    outputs
        What was evaluated.
    history
        What their history is made of.
    """

    def __init__(
        self,
        evaluate: Callable[[], Leaves],
        params: Leaves,
        *,
        create_graph: bool,
        forward: bool = False,
    ) -> None:
        self._params = params

        def run(rules: SecondOrderRules) -> tuple[SecondOrderRules, Leaves]:
            self._since = torch._C._autograd._get_sequence_nr()
            return rules, evaluate()

        with recording():
            rules, self.outputs = evaluated(
                run, forward=forward, higher=create_graph, protect=params
            )
        self.history = History([z.grad_fn for z in self.outputs if z.grad_fn is not None])
        self._higher = rules.higher
        self._hooked = rules.hooked

    @property
    def calls_python(self) -> bool:
        """Whether a backward pass may call Python.

        It does for functions with a backward of their own, for hooks (those of checkpointing are hooks of what is
        saved), and perhaps for what was made outside, whose hooks do not show.
        """
        return bool(self.history.custom) or self._may_be_hooked

    @property
    def hides_tangents(self) -> bool:
        """Whether a backward pass may call Python other than ours, which may keep values without their tangents."""
        own = all(
            getattr(node._forward_cls, "keeps_tangents", False) for node in self.history.custom
        )
        return not own or self._may_be_hooked

    @property
    def _may_be_hooked(self) -> bool:
        return self._hooked or self.history.oldest < self._since

    def differentiating(self) -> AbstractContextManager[Any]:
        """Return the context for a backward pass: as the outputs were evaluated, if the pass may call Python."""
        return self._under_rules() if self.calls_python else recording()

    @contextmanager
    def _under_rules(self) -> Iterator[None]:
        with (
            recording(),
            evaluation(forward=False, higher=self._higher, protect=self._params),
        ):
            yield


def to_differentiate(leaves: Leaves, *, differentiable: bool) -> Leaves:
    """Return tensors with the values of `leaves` to differentiate in, with their history if `differentiable`."""
    with recording():
        return tuple(
            leaf.view_as(leaf)
            if differentiable and leaf.requires_grad
            else leaf.detach().requires_grad_()
            for leaf in leaves
        )


def gradients(
    outputs: Sequence[Tensor], inputs: Leaves, cotangents: Any = None, **options: Any
) -> list[Tensor | None]:
    """Return autograd's derivatives, None for an input that no output depends on."""
    try:
        with _hooks_set_aside(inputs):
            found: Any = grad_under_rules(outputs, inputs, cotangents, allow_unused=True, **options)
    except (ArgumentError, UnrecordedBackwardError):
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
    with torch._C.DisableTorchFunction():  # a look at each, which the rules need not see
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


def paired(outputs: Sequence[Tensor | None], cotangents: Leaves) -> Pairs:
    """Return the pairs whose output has a derivative of its own."""
    zipped = zip(outputs, cotangents, strict=True)
    return [(z, v) for z, v in zipped if z is not None and z.requires_grad]


def pull(pairs: Pairs, params: Leaves, *, create_graph: bool) -> Leaves:
    """Return the derivative of `sum(<output, cotangent>)` in `params`, zeros where there is none.

    Graphs are kept: a part of them may be the user's.
    """
    if not pairs:
        return tuple(torch.zeros_like(p) for p in params)
    outputs, cotangents = zip(*pairs, strict=True)
    found = gradients(outputs, params, cotangents, retain_graph=True, create_graph=create_graph)
    return or_zeros(found, params)


def pull_several(pairs: Pairs, params: Leaves, create_graph: bool, count: int) -> Leaves:
    """Do the same for `count` cotangents stacked along a leading axis, batched where torch can."""
    if not pairs:
        return tuple(p.new_zeros((count, *p.shape)) for p in params)
    outputs, cotangents = zip(*pairs, strict=True)
    missing: set[int] = set()

    def one(cotangents: Leaves) -> Leaves:
        found = gradients(outputs, params, cotangents, retain_graph=True, create_graph=create_graph)
        missing.update(index for index, g in enumerate(found) if g is None)
        return tuple(g for g in found if g is not None)

    try:
        with without_vmap_warnings():
            batched: Leaves = vmap(one, randomness="same")(cotangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no batching rule: one by one
        rows = [
            pull(list(zip(outputs, row, strict=True)), params, create_graph=create_graph)
            for row in zip(*cotangents, strict=True)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    found = iter(batched)
    return tuple(
        p.new_zeros((count, *p.shape)) if index in missing else next(found)
        for index, p in enumerate(params)
    )
