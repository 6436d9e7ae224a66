"""The values of a closure at many values of its parameters.

As in `_closure`, every parameter is exchanged, by identity, for the value at which the loss is wanted. One that hides
from the exchange holds other data while the closure runs, so that a surface is never flat along it by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secorder_func.compat._arguments import Leaves
from secorder_func.compat._difference import other_data
from secorder_func.compat._gradient import freed
from secorder_func.compat._visibility import reached
from secorder_func.errors import CurvatureFallbackWarning, message, warn_user
from secorder_func.rules import SecondOrderRules
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import FlatLoss
from secorder_func.transforms.loss_surface import default_chunk_size, swept

__all__ = ["closure_surface"]


class _Hidden(Exception):  # noqa: N818 - a signal, not an error
    """Further parameters hide, by index."""

    def __init__(self, indices: frozenset[int]) -> None:
        super().__init__()
        self.indices = indices


def closure_surface(
    func: Callable[[], Tensor],
    params: Leaves,
    directions: Sequence[Leaves],
    points: Tensor,
    where: str,
    *,
    data: Any = (),
    aside: Iterable[int] = (),
) -> Tensor:
    """Return the loss at `params + sum_i points[:, i] directions[i]`, `(len(points),)`.

    `data` is what the closure works on, for the choice of a chunk; `aside` are parameters that are known to hide, by
    index.
    """
    point = tuple(p.detach() for p in params)
    directions = [tuple(leaf.detach() for leaf in direction) for direction in directions]
    size = default_chunk_size(point, data)
    hidden = frozenset(aside)
    known_hidden = set(hidden)

    def sweep(hidden: frozenset[int]) -> Tensor:
        def verify(rules: SecondOrderRules, loss: Tensor) -> None:
            in_history = reached([loss], params)
            known_hidden.update(in_history)
            unmet = frozenset(i for i, p in enumerate(params) if id(p) not in rules.seen)
            if (unmet | in_history) - hidden:
                raise _Hidden(unmet | in_history)

        loss = FlatLoss(
            evaluate=lambda leaves: func(),
            leaves=point,
            unflatten=tuple,
            has_aux=False,
            where=where,
            originals=params,
            verify=verify,
        )
        exchanged = loss.at(forward=False, higher=False)
        if not hidden:
            return swept(
                lambda at: exchanged(at)[0], point, directions, points, chunk_size=size, exact=False
            )
        moved = tuple(params[i] for i in sorted(hidden))

        def value(at: Leaves) -> Tensor:
            with other_data(moved, tuple(at[i] for i in sorted(hidden))):
                return exchanged(at)[0]

        return swept(value, point, directions, points, chunk_size=1, exact=False)

    state = RandomState.now(params)
    # Frozen parameters, too, leave their trace in the history of a loss that reaches them directly.
    traced = freed(p for p in params if not p.is_inference())
    with out_of_inference_mode(), torch.enable_grad(), traced:
        while True:
            try:
                losses = sweep(hidden).detach()
                break
            except _Hidden as further:
                state.restore()
                hidden |= further.indices
    if known_hidden:
        warn_user(
            message(
                where,
                f"parameter {min(known_hidden)} of the model is reached by a path on which it cannot be exchanged. "
                "Its data were set aside during the evaluations instead",
                "Do not use the model in other threads meanwhile",
            ),
            CurvatureFallbackWarning,
        )
    return losses
