"""Products by one backward pass over our own forward propagation, `reverse_over_forward`.

The loss is evaluated with the term of every tensor along the vector; that of the loss is `df(p)[v]`, and its gradient
the product. 8/3 gradients by the count of a dense layer, and no second graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from secorder_func.checks import check_callable
from secorder_func.errors import NoExactRouteError
from secorder_func.rules import evaluated
from secorder_func.rules.levels import JVP, differentiating_levels
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.registry import WrongForwardRuleError
from secorder_func.rules.torch_func import forward_mode_lock, vjp_aux
from secorder_func.taylor import NotPropagatedError, Propagation
from secorder_func.transforms.loss import FlatLoss, Leaves, exchanged, flat_loss
from secorder_func.transforms.plain_autograd import gradients, or_zeros, recording, to_differentiate
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import LossFn, Tree

__all__ = [
    "RuleKinds",
    "by_propagation",
    "evaluated_with_terms",
    "refuse_forward_mode",
    "rule_kinds",
    "with_constants",
]

T = TypeVar("T")


def by_propagation(
    loss: FlatLoss, vector: Leaves, *, closed: bool, differentiable: bool, gradient: bool = False
) -> tuple[Leaves, Leaves, Leaves]:
    """Return leaves of the product and of the gradient, and the tensors of the auxiliary output.

    Parameters
    ----------
    closed
        Whether every function of the loss must have a rule of ours.
    differentiable
        Whether the product is to be differentiated.
    gradient
        Whether to compute the gradient, by a backward pass of its own; else there are no leaves of it.

    Raises
    ------
    NotPropagatedError
        A function of the loss has no rule, or hides its tensors.
    """
    refuse_forward_mode()
    constants: dict[int, Tensor] = {}
    propagate = partial(_propagated, loss, vector, closed, differentiable, constants)
    if in_transform():
        (slope, value), pullback, aux = vjp_aux(propagate, loss.leaves)
        (hv,) = pullback((torch.ones_like(slope), torch.zeros_like(value)))
        found = pullback((torch.zeros_like(slope), torch.ones_like(value)))[0] if gradient else ()
        return hv, found, aux
    at = to_differentiate(loss.leaves, differentiable=differentiable)
    with forward_mode_lock(), recording():
        (slope, value), aux = propagate(at)
        found = _gradient(value, at, differentiable, last=False) if gradient else ()
        del value
        hv = _gradient(slope, at, differentiable)
    hv = with_constants(hv, constants.values())
    return hv, found, tuple(tensor.detach() for tensor in aux)


class _DependsOn(torch.autograd.Function):
    """A result that depends on captured tensors, in which it is not differentiated."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *captured: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(
            "a product cannot be differentiated in a tensor that the function captures"
        )


def with_constants(leaves: Leaves, constants: Iterable[Tensor]) -> Leaves:
    """Return a result that says, if it is differentiated in constants of the loss, that it cannot be."""
    captured = tuple(constants)
    if not (captured and torch.is_grad_enabled()):
        return leaves
    attached: Any = _DependsOn.apply
    return tuple(attached(leaf, *captured) for leaf in leaves)


def refuse_forward_mode() -> None:
    """Leave products that are differentiated in forward mode to other routes."""
    if JVP in differentiating_levels():
        raise NotPropagatedError("the product is differentiated in forward mode")


def _gradient(value: Tensor, at: Leaves, differentiable: bool, *, last: bool = True) -> Leaves:
    """Return the gradient; the last one frees the graph as it goes, all of which was made here."""
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, at))
    keep = differentiable or not last
    found = or_zeros(gradients([value], at, create_graph=differentiable, retain_graph=keep), at)
    return found if differentiable else tuple(leaf.detach() for leaf in found)


def _propagated(
    loss: FlatLoss,
    vector: Leaves,
    closed: bool,
    higher: bool,
    constants: dict[int, Tensor],
    at: Leaves,
) -> tuple[tuple[Tensor, Tensor], Leaves]:
    """Return the derivative of the loss along the vector, the loss, and the tensors of the auxiliary output."""

    def evaluate(terms: Propagation) -> tuple[tuple[Tensor, Tensor], Leaves]:
        value, aux = loss.verified(terms, at)
        slope = terms.or_zeros(value)
        constants.update(terms.constants)
        return (slope, value), aux

    exchange = exchanged(loss.originals, at)
    return evaluated_with_terms(
        evaluate, at, vector, exchange=exchange, closed=closed, higher=higher
    )


def evaluated_with_terms(
    evaluate: Callable[[Propagation], T],
    at: Leaves,
    vector: Leaves,
    *,
    exchange: list[tuple[Tensor, Tensor]] | None = None,
    closed: bool = False,
    higher: bool = False,
    record: bool = True,
) -> T:
    """Return `evaluate(terms)` under a propagation in which the term of every leaf is its part of the vector.

    Arguments as for `Propagation` and `evaluated`.
    """
    pairs = list(zip(at, vector, strict=True))
    return evaluated(
        evaluate,  # type: ignore[arg-type]
        forward=False,
        higher=higher,
        exchange=exchange,
        protect=at,
        make=partial(Propagation, pairs, closed=closed, record=record),
    )


@dataclass(frozen=True)
class RuleKinds:
    """Which functions of a loss the first-order term passes, and by what kind of rule.

    Attributes
    ----------
    kinds
        Name of a function -> the kind of its rule, in the order in which the loss called them.
    missing
        Why the term got no further; None if it reached the loss.
    """

    kinds: dict[str, str]
    missing: str | None

    @property
    def closed(self) -> bool:
        """Whether every function has a rule of ours, so that `"auto"` takes `"reverse_over_forward"`."""
        return self.missing is None and "general" not in self.kinds.values()


def rule_kinds(f: LossFn) -> Callable[..., RuleKinds]:
    """Transform `f` into the report of the rules that `hvp(f, mode="reverse_over_forward")` would take.

    `rule_kinds(f)(params, *args, **kwargs)` evaluates the loss once, and differentiates nothing.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import rule_kinds
    >>> found = rule_kinds(lambda p: torch.linalg.det(p @ p).tanh())(torch.eye(2))
    >>> found.kinds, found.closed
    ({'matmul': 'bilinear', 'linalg_det': 'general', 'tanh': 'elementwise', 'reshape': 'linear'}, False)
    """
    check_callable(f, "rule_kinds")

    def report(params: Tree, /, *args: Any, **kwargs: Any) -> RuleKinds:
        loss = flat_loss(f, params, args, kwargs, has_aux=False, where="rule_kinds")
        at = to_differentiate(loss.leaves, differentiable=False)
        ones = tuple(map(torch.ones_like, at))
        kinds: dict[Any, str] = {}
        missing = None

        def evaluate(terms: Propagation) -> None:
            nonlocal kinds
            kinds = terms.kinds
            loss.plain(at)

        state = RandomState.now(at)
        try:
            with forward_mode_lock(), recording():
                evaluated_with_terms(evaluate, at, ones)
        except (NoExactRouteError, WrongForwardRuleError) as error:
            missing = str(error)
        state.restore()
        named = {getattr(g, "__name__", str(g)): kind for g, kind in kinds.items()}
        return RuleKinds(named, missing)

    return report
