"""Seeds of random streams, drawn from a generator."""

from __future__ import annotations

import torch

from secorder_func.errors import ArgumentTypeError, message

__all__ = ["draw_seed"]


def draw_seed(generator: torch.Generator | None) -> int:
    """Return the next value of a generator (torch's global one if None) as the seed of a stream."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(
            message(
                "generator",
                f"expected a torch.Generator, got {generator!r}",
                "Pass torch.Generator().manual_seed(...)",
            )
        )
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
