"""Hessian-vector products estimated from gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_count, check_like, check_number
from secorder_func.errors import ArgumentError
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import grad
from secorder_func.transforms.double_backward import plain_gradient
from secorder_func.transforms.loss import Leaves, flat_loss
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.typing import LossFn, Tree

__all__ = ["base_step", "central_difference", "finite_difference_hvp"]


def finite_difference_hvp(
    f: LossFn, *, num_steps: int = 1, damping: float = 0.0
) -> Callable[..., Tree]:
    r"""Transform `f` into an estimate of `H v + damping * v` by central differences of its gradient.

    With one step `h` it is `(g(p + h v) - g(p - h v)) / 2h`. More steps are combined so that the leading error
    term cancels and rounding averages out.

    Parameters
    ----------
    f
        `f(params, *args, **kwargs) -> loss` with one element; a sum or a mean as `f` says.
    num_steps
        How many step sizes; the cost is two gradients each.
    damping
        Multiple of `v` to add.

    Returns
    -------
    Callable
        `(params, v, *args, **kwargs) -> estimate`, a tree like `params`.

    Raises
    ------
    TypeError, ValueError
        As for `hvp`; also `num_steps` below one.

    Notes
    -----
    Needs no second derivative and no more memory than a gradient. For smooth losses the relative error is about
    1e-9 in float64 and 1e-4 in float32; more under autocast, whose rounding is that of its dtype. Where the gradient
    jumps (ReLU, max pooling) a difference across a kink measures the jump, which the Hessian does not contain: expect
    agreement only where no unit changes its state between the two points. What `detach` and `no_grad` hold constant
    moves with the parameters here. Random numbers are the same at all points. Parameters are never written to.

    References
    ----------
    J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., section 8.1, 2006.
    https://doi.org/10.1007/978-0-387-40065-5

    Examples
    --------
    >>> import torch
    >>> from secorder_func import finite_difference_hvp
    >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> finite_difference_hvp(lambda p: (p**3).sum())(p, torch.ones_like(p)).round(decimals=6)
    tensor([ 6., 12.], dtype=torch.float64)
    """
    check_callable(f, "finite_difference_hvp")
    check_count(num_steps, "finite_difference_hvp", name="num_steps")
    check_number(damping, "finite_difference_hvp", name="damping")

    def estimate(params: Tree, v: Tree, /, *args: Any, **kwargs: Any) -> Tree:
        where = "finite_difference_hvp"
        loss = flat_loss(f, params, args, kwargs, has_aux=False, where=where)
        check_like(v, params, where)
        vector = tuple(tree.flatten(without_inference_tensors(v))[0])

        def gradient(leaves: Leaves) -> Leaves:
            result: Leaves = grad(loss.at(forward=False, higher=False), has_aux=True)(leaves)[0]
            return result

        def plain(leaves: Leaves) -> Leaves:
            return plain_gradient(loss.plain, leaves, differentiable=outside)

        outside = differentiated_outside(params, v, args, tuple(kwargs.values()))
        state = RandomState.now(loss.leaves)
        difference = partial(central_difference, num_steps=num_steps, damping=damping)
        with out_of_inference_mode():
            try:
                leaves = difference(gradient, loss.leaves, vector)
            except ArgumentError:
                raise
            except RuntimeError:  # what only plain autograd differentiates
                if in_transform():
                    raise
                state.restore()
                leaves = difference(plain, loss.leaves, vector)
        return loss.unflatten(leaves)

    return estimate


def central_difference(
    gradient: Callable[[Leaves], Leaves],
    leaves: Leaves,
    vector: Leaves,
    *,
    num_steps: int,
    damping: float,
) -> Leaves:
    """Return the combined central differences of `gradient` along `vector`, plus `damping * vector`.

    `gradient` is called twice per step, always from the random state that the first call found.
    """
    unit = base_step(leaves, vector)
    state = RandomState.now(leaves)
    after: RandomState | None = None
    total: Leaves = tuple(torch.zeros_like(leaf) for leaf in leaves)
    for multiple, weight in _steps(num_steps):
        step = unit * multiple
        ends = []
        for signed in (step, -step):
            state.restore()
            ends.append(gradient(tree.axpy(signed, vector, leaves)))
            after = after or RandomState.now(leaves)
        total = tree.axpy(weight / (2 * step), tree.sub(*ends), total)
    assert after is not None
    after.restore()
    return tree.axpy(damping, vector, total) if damping else total


def base_step(leaves: Leaves, vector: Leaves) -> Tensor:
    """Return the step that balances truncation (step²) against rounding (1 / step), a 0-dim tensor.

    That balance is at the cube root of the unit roundoff, relative to the scale of the parameters. The more entries
    share a direction, the less the gradient bends along it, and a longer step serves: the length grows with the eighth
    root of the participation ratio `|v|_2^4 / |v|_4^4`, between 1 (one entry) and the number of entries. Measured on
    tanh, GELU and Mish networks of 300 to 270,000 parameters along random, unit and leading eigenvectors.
    """
    eps = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
    sizes = [leaf.detach().abs().to(_at_least_single(leaf)) for leaf in leaves]
    entries = [leaf.detach().abs().to(_at_least_single(leaf)) for leaf in vector]
    rms = (_total([(x * x).sum() for x in sizes]) / max(1, tree.numel(leaves))).sqrt()
    longest = _largest(entries)
    scaled = [
        x / torch.where(longest > 0, longest, torch.ones_like(longest)).to(x) for x in entries
    ]
    second = _total([(x * x).sum() for x in scaled])
    fourth = _total([(x * x * x * x).sum() for x in scaled])
    spread = torch.where(fourth > 0, second * second / fourth, torch.ones_like(fourth))
    length = longest * second.sqrt()
    unit = eps ** (1 / 3) * rms.clamp(min=1.0) * spread**0.125
    return torch.where(length > 0, unit / length, torch.ones_like(length))


def _steps(count: int) -> list[tuple[float, float]]:
    """Return multiples of the base step and their weights.

    Several steps lie between sqrt(2) and 2 sqrt(2). Among the weights that sum to one and cancel the error in
    step², these carry the least rounding noise, which is proportional to weight / step.
    """
    if count == 1:
        return [(1.0, 1.0)]
    multiples = [2**0.5 * (1 + k / (count - 1)) for k in range(count)]
    second, fourth, sixth = (sum(s**power for s in multiples) for power in (2, 4, 6))
    scale = second * sixth - fourth * fourth
    return [(s, s * s * (sixth - fourth * s * s) / scale) for s in multiples]


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def _largest(entries: list[Tensor]) -> Tensor:
    maxima = [x.amax() if x.numel() else x.new_zeros(()) for x in entries]
    return torch.stack([x.to(maxima[0]) for x in maxima]).amax()
