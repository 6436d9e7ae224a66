"""The Laplacian of a function in its inputs, estimated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.algorithms.estimate import Estimate
from secorder_func.algorithms.group_sums import mean_and_error
from secorder_func.algorithms.probes import draw_seed, rademacher
from secorder_func.checks import check_callable, check_count
from secorder_func.operators.forms import Draw, group_size
from secorder_func.operators.input_forms import input_forms
from secorder_func.typing import Tree

__all__ = ["hutchinson_laplacian"]


def hutchinson_laplacian(
    f: Callable[..., Tensor],
    /,
    num_matvecs: int,
    *,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> Callable[..., Estimate]:
    """Transform `f` into the estimate of its Laplacian by random probes, with a standard error for every value.

    Everything else is as for `laplacian` and `hutchinson_trace`; every sample has probes of its own. Where some
    function has no second-order rule, products follow; `by_propagation` of the result tells.

    Parameters
    ----------
    f, per_sample
        As for `laplacian`.
    num_matvecs
        How many probes; each costs one form, or one product.
    generator
        As for `hutchinson_trace`.

    Returns
    -------
    Callable
        `(x, *args, **kwargs) -> Estimate`, whose value is shaped like that of `f`.

    Raises
    ------
    TypeError, ValueError
        As for `laplacian` and `hutchinson_trace`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import hutchinson_laplacian
    >>> hutchinson_laplacian(lambda x: (x**2).sum(-1), 4, per_sample=True)(torch.ones(2, 3)).value
    tensor([6., 6.])
    """
    where = "hutchinson_laplacian"
    check_callable(f, where)
    check_count(num_matvecs, where, name="num_matvecs")

    def transformed(x: Tree, /, *args: Any, **kwargs: Any) -> Estimate:
        found = input_forms(f, x, args, kwargs, per_sample=per_sample, where=where)
        seed = draw_seed(generator)

        def draws(probes: range) -> list[Draw | None]:
            stacks, _ = tree.flatten(rademacher(seed, probes, x))
            return [partial(torch.detach, stack) for stack in stacks]

        plan = found.plan(group_size(num_matvecs))
        parts = list(found.forms.in_groups(draws, range(num_matvecs), plan))
        sizes = [size for part in parts for size in part.sizes]
        if sum(sizes) == num_matvecs:
            mean, error = mean_and_error(torch.cat([part.sums for part in parts]), sizes)
            return Estimate(
                mean, error, num_matvecs, plan.largest, len(sizes) - 1, by_propagation=True
            )
        probes = (rademacher(seed, range(k, k + 1), x) for k in range(num_matvecs))
        rows = [found.product(tree.map(lambda leaf: leaf[0], probe)) for probe in probes]
        mean, error = mean_and_error(torch.stack(rows), [1] * num_matvecs)
        return Estimate(mean, error, num_matvecs, 1, num_matvecs - 1)

    return transformed
