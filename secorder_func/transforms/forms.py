"""Quadratic forms of the Hessian by second-order forward propagation: no backward pass, nothing stored for one.

The loss is evaluated with terms of first and second order beside every value; the second-order term of the loss is
`v.Hv`, of a loss with several entries that of every entry. For K vectors `v.Hv` is summed over groups as it propagates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.checks import check_callable, check_like
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules import evaluated
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.torch_func import forward_mode_lock, grad, vjp, without_vmap_warnings
from secorder_func.taylor.second_order import Draw, SecondOrderPropagation
from secorder_func.transforms.gauss_newton import FlatModel
from secorder_func.transforms.hessian import hvp
from secorder_func.transforms.loss import FlatLoss, Leaves, checked_scalar, exchanged, flat_loss
from secorder_func.transforms.plain_autograd import recording, to_differentiate
from secorder_func.transforms.policy import differentiated_outside, first_exact, in_transform
from secorder_func.transforms.propagated import with_constants
from secorder_func.transforms.samples import Samples
from secorder_func.typing import LossFn, Tree

__all__ = [
    "Draw",
    "bilinear_form",
    "checked_value",
    "forms_of_loss",
    "forms_of_model",
    "forms_of_samples",
    "itself",
    "propagated_to_second_order",
    "quadratic_form",
]

T = TypeVar("T")
_PRODUCTS_AT_ONCE = 64


def quadratic_form(f: LossFn) -> Callable[..., Tensor]:
    r"""Transform `f` into its quadratic form: `quadratic_form(f)(params, v) = v . H v`, `H = d²f/dparams²`.

    Parameters
    ----------
    f
        `f(params, *args, **kwargs) -> loss`, a real floating tensor of any shape. One value a sample gives the form of
        every sample's own Hessian, all at once; samples may depend on each other.

    Returns
    -------
    Callable
        `(params, v, *args, **kwargs) -> forms`, shaped like the loss. `v` is a tree like `params`.

    Raises
    ------
    TypeError, ValueError
        As for `hvp`, but for the shape of the loss.
    NoExactRouteError
        torch cannot differentiate some function of the loss twice.

    Notes
    -----
    By second-order forward propagation: 1.3 to 3 gradients for one vector, and memory that does not grow with depth.
    Where a function of the loss has no second-order rule, exact products follow, one for every entry of the loss, and a
    `CurvatureFallbackWarning` says so. Inside a transform, under `torch.compile`, and where the form is itself
    differentiated, products are taken at once.

    References
    ----------
    A. Griewank, A. Walther, Evaluating Derivatives, SIAM 2008, chapter 13. https://doi.org/10.1137/1.9780898717761

    Examples
    --------
    >>> import torch
    >>> from secorder_func import quadratic_form
    >>> samples = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> cubes = lambda p, x: (x @ p) ** 3
    >>> quadratic_form(cubes)(torch.ones(2), torch.tensor([1.0, 0.0]), samples)
    tensor([ 18., 162.])
    """
    check_callable(f, "quadratic_form")

    def form(params: Tree, v: Tree, /, *args: Any, **kwargs: Any) -> Tensor:
        check_like(v, params, "quadratic_form")
        return _form(f, params, (v,), args, kwargs, "quadratic_form")

    return form


def bilinear_form(f: LossFn) -> Callable[..., Tensor]:
    """Transform `f` into `bilinear_form(f)(params, u, v, *args, **kwargs) = u . H v`.

    Everything else, errors too, is as for `quadratic_form`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import bilinear_form
    >>> f = lambda p: p[0] ** 2 * p[1]
    >>> bilinear_form(f)(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(2.)
    """
    check_callable(f, "bilinear_form")

    def form(params: Tree, u: Tree, v: Tree, /, *args: Any, **kwargs: Any) -> Tensor:
        check_like(u, params, "bilinear_form", name="u")
        check_like(v, params, "bilinear_form")
        return _form(f, params, (u, v), args, kwargs, "bilinear_form")

    return form


def _form(
    f: LossFn,
    params: Tree,
    vectors: tuple[Tree, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
) -> Tensor:
    loss = flat_loss(f, params, args, kwargs, has_aux=False, where=where)
    leaves = [tree.flatten(without_inference_tensors(v))[0] for v in vectors]
    stacks = [torch.stack(rows) for rows in zip(*leaves, strict=True)]
    count = len(vectors)
    outside = differentiated_outside(params, vectors, args, tuple(kwargs.values()))

    def by_propagation() -> Tensor:
        draws = [partial(itself, stack.detach()) for stack in stacks]
        forms = propagated_to_second_order(
            loss.leaves,
            draws,
            lambda terms, at: checked_value(loss.evaluate(at), where),
            count=count,
            groups=1,
            across=count > 1,
        )[0]
        return forms[0] if count == 1 else forms[0] / 2

    def by_products() -> Tensor:
        u, v = vectors[0], vectors[-1]
        value = checked_value(loss.eager(), where)

        def weighted(weights: Tensor) -> Tensor:
            def total(params: Tree) -> Tensor:
                return (checked_value(f(params, *args, **kwargs), where) * weights).sum()

            return tree.dot(u, hvp(total)(params, v)).to(value.dtype)

        if value.numel() == 1:
            return weighted(torch.ones_like(value)).reshape(value.shape)
        weights = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        weights = weights.reshape(-1, *value.shape)
        each = vmap(weighted, chunk_size=_PRODUCTS_AT_ONCE, randomness="same")
        return each(weights).reshape(value.shape) if value.numel() else torch.zeros_like(value)

    if outside or in_transform():
        return by_products()
    _, forms = first_exact(
        [("propagation", by_propagation), ("products", by_products)],
        where=where,
        tensors=loss.leaves,
        eager=loss.eager,
    )
    return forms


def itself(stack: Tensor) -> Tensor:
    """Return vectors that need not be drawn."""
    return stack


def checked_value(value: Any, where: str) -> Tensor:
    """Return a loss of any shape; refuse what is not real and floating."""
    if not isinstance(value, Tensor):
        problem = f"the loss must be a tensor, got {type(value).__name__}"
        raise ArgumentTypeError(message(where, problem))
    if not value.is_floating_point():
        problem = f"the loss must be real and floating, got {value.dtype}"
        raise ArgumentError(message(where, problem, "Take .real or .abs() of it"))
    return value


# ---------------------------------------------------------------------------- for operators


def forms_of_loss(
    loss: FlatLoss, draws: Sequence[Draw | None], count: int, groups: int
) -> tuple[Tensor, int]:
    """Return the sums of `v.Hv` over groups of vectors, `(groups,)`, and the bytes of the largest term of a vector."""
    return propagated_to_second_order(
        loss.leaves,
        draws,
        lambda terms, at: loss.verified(terms, at)[0],
        count=count,
        groups=groups,
        originals=loss.originals,
    )


def forms_of_model(
    model: FlatModel, draws: Sequence[Draw | None], count: int, groups: int
) -> tuple[Tensor, int]:
    """Return the sums of `v.Gv`, `G` the Gauss-Newton matrix: first order in the model, second in the loss."""
    outputs, others, firsts, largest, constants = _outputs_with_terms(model, draws, count, groups)
    loss = FlatLoss(model.loss_of(others), outputs, tuple, False, model.where)
    bent = [None if first is None else partial(itself, first) for first in firsts]
    forms, bytes_of_loss = forms_of_loss(loss, bent, count, groups)
    (forms,) = with_constants((forms,), constants.values())
    return forms, max(largest, bytes_of_loss)


def forms_of_samples(
    model: FlatModel,
    loss_fn: LossFn,
    samples: Samples,
    draws: Sequence[Draw | None],
    count: int,
    groups: int,
) -> tuple[Tensor, int]:
    """Return the sums of `v.G_n v` of every sample, `(groups, samples)`.

    First order in the model, of the whole batch; the Hessian of every sample's own loss bends the terms.
    """
    outputs, others, firsts, largest, constants = _outputs_with_terms(model, draws, count, groups)

    def alone(at: Leaves, beside: Leaves, row: Leaves) -> Tensor:
        single = model.assembled(*(tuple(t.unsqueeze(0) for t in ts) for ts in (at, beside)))
        return checked_scalar(loss_fn(single, samples.alone(row)[1]), model.where)

    def total(at: Leaves) -> Tensor:
        each = vmap(alone, randomness="same")
        return evaluated(
            lambda rules: each(at, others, samples.tensors).sum(), forward=False, higher=False
        )

    terms = tuple(
        torch.zeros(count, *z.shape, dtype=z.dtype, device=z.device) if t is None else t.detach()
        for t, z in zip(firsts, outputs, strict=True)
    )
    at = tuple(z.detach() for z in outputs)
    with without_vmap_warnings():
        _, bend = vjp(grad(total), at)
        (bent,) = vmap(bend)(terms)
    forms = [
        (t * b).flatten(2).sum(2) if t.ndim > 2 else t * b for t, b in zip(terms, bent, strict=True)
    ]
    each = torch.stack([form.to(forms[0]) for form in forms]).sum(0)
    sums = each.reshape(groups, count // groups, -1).sum(1)
    (sums,) = with_constants((sums,), constants.values())
    return sums, largest


def _outputs_with_terms(
    model: FlatModel, draws: Sequence[Draw | None], count: int, groups: int
) -> tuple[Leaves, Leaves, tuple[Tensor | None, ...], int, Any]:
    """Return the outputs of a model, its other tensors, their first-order terms, bytes of a term, and constants."""

    def evaluate(terms: SecondOrderPropagation, at: Leaves) -> tuple[Any, ...]:
        smooth, others = model.plain_outputs(terms, at)
        return smooth, others, tuple(map(terms, smooth)), terms.largest, terms.constants

    found: Any = _evaluated(
        evaluate,
        model.leaves,
        draws,
        count=count,
        groups=groups,
        originals=model.originals,
        only_first=True,
    )
    return found  # type: ignore[no-any-return]


def propagated_to_second_order(
    leaves: Leaves,
    draws: Sequence[Draw | None],
    evaluate: Callable[[SecondOrderPropagation, Leaves], Tensor],
    *,
    count: int,
    groups: int,
    originals: Leaves | None = None,
    across: bool = False,
) -> tuple[Tensor, int]:
    """Return the second-order terms of a value, with a leading axis of groups, and the bytes of the largest term.

    Arguments as for `SecondOrderPropagation`.
    """

    def both(terms: SecondOrderPropagation, at: Leaves) -> tuple[Tensor, int, Any]:
        value = evaluate(terms, at)
        found: Tensor | None = terms.second(value)
        if found is None:
            found = value.new_zeros(groups, *value.shape)
        return found, terms.largest, terms.constants

    found, largest, constants = _evaluated(
        both,
        leaves,
        draws,
        count=count,
        groups=groups,
        originals=originals,
        across=across,
    )
    (found,) = with_constants((found,), constants.values())
    return found, largest


def _evaluated(
    evaluate: Callable[[SecondOrderPropagation, Leaves], T],
    leaves: Leaves,
    draws: Sequence[Draw | None],
    *,
    originals: Leaves | None,
    **options: Any,
) -> T:
    with out_of_inference_mode(), forward_mode_lock(), recording():
        at = to_differentiate(leaves, differentiable=False)
        return evaluated(
            lambda rules: evaluate(rules, at),  # type: ignore[arg-type]
            forward=False,
            higher=False,
            exchange=exchanged(originals, at),
            protect=at,
            make=partial(SecondOrderPropagation, at, draws, **options),
        )
