"""Chunks by a budget of memory: how many vectors are multiplied at once, and what happens when it runs out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    exact_diagonal,
    exact_trace,
    functional_loss,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
)
from secorder_func.operators.memory import with_peak_bytes

ENTRIES = 1000
BYTES = 8 * ENTRIES
SCALE = torch.linspace(-1, 2, ENTRIES, dtype=torch.float64)


class Recorded:
    """A diagonal matrix whose product takes two vectors' memory, and fails for more vectors than a limit."""

    def __init__(self, limit: int = 10**9, error: type[Exception] | None = None) -> None:
        self.sizes: list[int] = []
        self.limit = limit
        self.error = error or torch.OutOfMemoryError

    def __call__(self, vectors: Tensor) -> Tensor:
        if len(vectors) > self.limit:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        self.sizes.append(len(vectors))
        return (vectors * SCALE) * 1.0

    def operator(self) -> LinearOperator:
        return LinearOperator(lambda v: v * SCALE, SCALE, matmat=self)


def _vectors(count: int) -> Tensor:
    return torch.randn(
        count, ENTRIES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def test_the_first_product_is_counted_and_the_rest_fill_the_budget() -> None:
    product = Recorded()
    vectors = _vectors(12)
    found = product.operator().mm(vectors, memory_budget=4 * 2 * 3 * BYTES)
    assert product.sizes == [1, 4, 4, 3]
    torch.testing.assert_close(found, vectors * SCALE)


def test_what_was_counted_serves_the_next_call() -> None:
    product = Recorded()
    op = product.operator()
    for _ in range(2):
        op.mm(_vectors(6), memory_budget=8 * 2 * 3 * BYTES)
    assert product.sizes == [1, 5, 6]


def test_a_budget_below_one_product_takes_one_at_a_time() -> None:
    product = Recorded()
    product.operator().mm(_vectors(3), memory_budget=1)
    assert product.sizes == [1, 1, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_chunk_is_halved_when_memory_runs_out(error: type[Exception]) -> None:
    product = Recorded(limit=3, error=error)
    vectors = _vectors(12)
    found = product.operator().mm(vectors)
    assert product.sizes == [1, 2, 2, 2, 2, 2, 1]
    torch.testing.assert_close(found, vectors * SCALE)


def test_memory_that_runs_out_for_one_vector_or_a_given_chunk_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Recorded(limit=0).operator().mm(_vectors(2))
    with pytest.raises(torch.OutOfMemoryError):
        Recorded(limit=3).operator().mm(_vectors(8), chunk_size=4)


def test_an_error_of_the_product_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(vectors: Tensor) -> Tensor:
        if len(vectors) > 1:
            raise RuntimeError("another mistake")
        return vectors * SCALE

    with pytest.raises(RuntimeError, match="another mistake"):
        LinearOperator(lambda v: v * SCALE, SCALE, matmat=broken).mm(_vectors(4))


@pytest.mark.parametrize(("chunk_size", "sizes"), [(None, [7]), (3, [3, 3, 1]), (100, [7])])
def test_a_given_chunk_is_taken(chunk_size: Any, sizes: list[int]) -> None:
    product = Recorded()
    product.operator().mm(_vectors(7), chunk_size=chunk_size)
    assert product.sizes == sizes


@pytest.mark.parametrize("estimate", [hutchinson_trace, hutchinson_diagonal])
def test_an_estimate_says_its_chunk_and_does_not_depend_on_it(estimate: Any) -> None:
    def run(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return estimate(Recorded(limit=5).operator(), 16, generator=generator, **options)

    auto, single = run(), run(chunk_size=1)
    assert (auto.chunk_size, single.chunk_size) == (3, 1)  # 15 halved until it fits
    torch.testing.assert_close(auto.value, single.value)


def test_exact_algorithms_shrink_their_chunks_too() -> None:
    op = Recorded(limit=40).operator()
    torch.testing.assert_close(exact_diagonal(op), SCALE)
    torch.testing.assert_close(exact_trace(op), SCALE.sum())
    torch.testing.assert_close(op.dense(), SCALE.diag())


def test_the_peak_is_that_of_tensors_that_live_together() -> None:
    def compute() -> Tensor:
        x = torch.ones(ENTRIES, dtype=torch.float64)
        y = x.view(10, -1) + 1  # a view takes nothing
        del x
        z = y * 2
        del y
        return z + 1

    result, peak = with_peak_bytes(compute)
    assert peak == 2 * BYTES
    assert bool((result == 5).all())


def test_chunks_are_joined_without_a_second_copy() -> None:
    op = LinearOperator(lambda v: 2 * v, SCALE, matmat=lambda vectors: 2 * vectors)
    vectors = _vectors(50)
    found, peak = with_peak_bytes(lambda: op.mm(vectors, chunk_size=2))
    torch.testing.assert_close(found, 2 * vectors)
    assert peak < 60 * BYTES


def test_joined_chunks_can_be_differentiated() -> None:
    scale = SCALE.clone().requires_grad_()
    op = LinearOperator(lambda v: v * scale, SCALE, matmat=lambda vectors: vectors * scale)
    (gradient,) = torch.autograd.grad(op.mm(_vectors(7), chunk_size=3).sum(), scale)
    torch.testing.assert_close(gradient, _vectors(7).sum(0))


def test_views_of_what_was_there_before_take_nothing() -> None:
    x = torch.ones(ENTRIES, dtype=torch.float64)
    _, peak = with_peak_bytes(lambda: x.view(10, 100)[1:].t())
    assert peak == 0


def test_inside_a_transform_nothing_is_counted() -> None:
    sizes: list[int] = []

    def matmat(vectors: Tensor) -> Tensor:
        sizes.append(len(vectors))
        return vectors * SCALE

    op = LinearOperator(lambda v: v * SCALE, SCALE, matmat=matmat)
    vectors = _vectors(100)
    found = torch.func.vmap(op.mm)(torch.stack([vectors, -vectors]))
    assert sizes == [64, 36]
    torch.testing.assert_close(found[1], -vectors * SCALE)


def test_a_vector_of_a_deep_model_counts_its_activations() -> None:
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())))
    f, params = functional_loss(model, nn.MSELoss())
    wide = torch.randn(4096, 8), torch.randn(4096, 8)
    op = hessian_operator(f, params, *wide)
    _, peak = with_peak_bytes(lambda: op.mm({n: p[None] for n, p in params.items()}))
    assert 4096 * 8 * 4 < peak < 20 * 4096 * 8 * 4


SCRIPT = r"""
import re, torch
from pathlib import Path
from torch import nn
from secorder_func import LinearOperator, functional_loss, hessian_operator, hutchinson_trace

def peak():  # not that of getrusage, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
layers = [nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)]
f, params = functional_loss(nn.Sequential(*layers), nn.CrossEntropyLoss())
op = hessian_operator(f, params, torch.randn(256, 512), torch.randint(10, (256,)))
op = LinearOperator(op.matvec, op.like, matmat=op.matmat)  # products: a propagation takes less
small = hessian_operator(lambda p: (p**4).sum(), torch.ones(3))
hutchinson_trace(small, 8, chunk_size=4)  # what torch loads when it maps
for _ in range(2):
    hutchinson_trace(op, 1)
before = peak()
estimate = hutchinson_trace(op, 64, memory_budget={budget})
print(estimate.chunk_size, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("budget", [2**28, 2**29])
def test_a_fresh_process_stays_inside_the_budget(budget: int) -> None:
    script = SCRIPT.replace("{budget}", str(budget))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    chunk, extra = map(int, run.stdout.split())
    assert 1 < chunk < 64
    assert budget / 4 < extra <= 1.1 * budget  # what the allocator keeps differs from run to run
