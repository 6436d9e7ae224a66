"""The global random state around evaluations of a loss.

A retry, a second point of a difference and a product that evaluates the loss again must draw the random numbers
(dropout masks, say) that the first evaluation drew, and leave the generators as one evaluation leaves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The states of the CPU generator and of the default generators of some devices."""

    cpu: Tensor
    others: tuple[tuple[torch.device, Tensor], ...]

    @staticmethod
    def now(tensors: Iterable[Tensor]) -> RandomState:
        """Return the present state, for the devices on which `tensors` are."""
        devices = {t.device for t in tensors if not (t.is_cpu or t.is_meta)}
        others = tuple(
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        )
        return RandomState(torch.get_rng_state(), others)

    @staticmethod
    def seeded(seed: int, tensors: Iterable[Tensor]) -> RandomState:
        """Return the state that a seed gives, for the devices on which `tensors` are."""
        devices = {t.device for t in tensors if not (t.is_cpu or t.is_meta)}
        others = tuple(
            (device, torch.Generator(device).manual_seed(seed).get_state()) for device in devices
        )
        return RandomState(torch.Generator().manual_seed(seed).get_state(), others)

    def has_changed(self) -> bool:
        """Say whether random numbers were drawn since."""
        drawn = not torch.equal(torch.get_rng_state(), self.cpu)
        return drawn or any(
            not torch.equal(torch.get_device_module(device).get_rng_state(device), state)
            for device, state in self.others
        )

    def restore(self) -> None:
        """Make this state the present one."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw inside as was drawn from this state; leave the present state as it was."""
        present = RandomState(
            torch.get_rng_state(),
            tuple((d, torch.get_device_module(d).get_rng_state(d)) for d, _ in self.others),
        )
        self.restore()
        try:
            yield
        finally:
            present.restore()
