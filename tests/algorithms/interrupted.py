"""A program that is killed: long estimates of a data set, each with a checkpoint, whose results are written at the end.

`python -m tests.algorithms.interrupted FOLDER RESULT [--without]`
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secorder_func import (
    Batches,
    Checkpoint,
    eigsh,
    functional_loss,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    spectral_density,
    xdiag,
    xnystrace,
    xtrace,
)

PAUSE = 0.001


def problem() -> tuple[Any, Any]:
    """Return a model's loss, which takes its time, and data that are shuffled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return F.cross_entropy(outputs, targets)

    f, params = functional_loss(model, loss_fn)
    data = TensorDataset(torch.randn(70, 6).double(), torch.randint(3, (70,)))
    return (f, params), DataLoader(data, batch_size=8, shuffle=True)


def jobs() -> dict[str, Callable[..., Any]]:
    """Return what is computed, by name."""
    (f, params), loader = problem()
    batches = Batches(loader, check_weights=False)
    op = batches.hessian_operator(f, params)
    by_products = batches.hessian_operator(f, params, check_finite=True)
    one = hessian_operator(f, params, *next(iter(batches.read())))
    ggn = batches.operator(lambda x, y: hessian_operator(f, params, x, y).damped(5.0), params)

    def seeded(estimate: Callable[..., Any], op: Any, *args: Any, **options: Any) -> Any:
        def compute(checkpoint: Any) -> Any:
            generator = torch.Generator().manual_seed(7)
            return estimate(op, *args, generator=generator, checkpoint=checkpoint, **options)

        return compute

    return {
        "trace": seeded(hutchinson_trace, op, 200),
        "trace in chunks": seeded(hutchinson_trace, op, 24, chunk_size=5),
        "trace by products": seeded(hutchinson_trace, by_products, 24),
        "trace of a batch": seeded(hutchinson_trace, one, 200, chunk_size=7),
        "trace to a tolerance": seeded(hutchinson_trace, op, rtol=0.1, max_matvecs=300),
        "diagonal": seeded(hutchinson_diagonal, op, 24),
        "diagonal of a batch": seeded(hutchinson_diagonal, one, 60, chunk_size=5),
        "xtrace": seeded(xtrace, op, 24),
        "xnystrace": seeded(xnystrace, ggn, 16),
        "hutchpp": seeded(hutchpp_trace, op, 24),
        "xdiag": seeded(xdiag, one, 24, chunk_size=5),
        "eigsh": seeded(eigsh, op, 2, rtol=1e-8),
        "density": seeded(spectral_density, op, 6, num_steps=12, memory_budget=30_000),
    }


def numbers(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    from secorder_func import tree

    names = ("value", "standard_error", "eigenvalues", "eigenvectors", "nodes", "weights")
    return [t for name in names for t in tree.tensors_in(getattr(result, name, ()))] + [
        torch.tensor(result.num_matvecs)
    ]


def main(folder: Path, result: Path, *, kept: bool) -> None:
    found = {}
    computations = jobs()
    print("begun", flush=True)
    for name, compute in computations.items():
        checkpoint = Checkpoint(folder / f"{name}.pt", minutes=0) if kept else None
        found[name] = numbers(compute(checkpoint))
    torch.save(found, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), kept="--without" not in sys.argv)
