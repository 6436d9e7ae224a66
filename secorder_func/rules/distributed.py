"""Modules that torch.distributed has wrapped: their forward does more than compute."""

from __future__ import annotations

import sys

from torch import nn

from secorder_func.errors import ArgumentError

__all__ = ["refuse_sharded", "without_reducer"]


def without_reducer(module: nn.parallel.DistributedDataParallel) -> None:
    """Let the forward of the wrapper be that of its module, until its attributes are put back.

    Its reducer would wait for the `backward()` of a training step (with `static_graph`, for ever), and its buffers
    would be broadcast into, on all processes together.
    """
    module.__dict__["_use_python_reducer"] = True


def refuse_sharded(module: nn.Module) -> None:
    """Refuse a module whose parameters are gathered in its forward: no derivative reaches the shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
        raise ArgumentError(
            "The loss runs a fully sharded module (FSDP), which computes with gathered copies of its parameters: "
            "torch has no second derivative through them. Use the module unsharded, or DistributedDataParallel."
        )
