"""How do time and memory over a data set grow with samples, batches and parameters?

Command: `python -m bench data_growth` (`--quick` only sees that it runs); one peak of memory:
`python -m bench.data_growth METHOD WIDTH BATCHES BATCH`.

An MLP of two equal hidden layers over a list of batches. The unit is the gradient of the whole data set, in a plain
loop over its batches. Memory is what a fresh process adds at its peak, when parameters, data and the vector are there.

Expected story, written before the first run of this file. Everything is linear in the samples, so that ratios to the
gradient are flat: 2.3 gradients a product and 0.8 to 1.0 a probe of a trace in one pass, while the batches are of 128.
Memory does not depend on their number. The same samples in more batches cost more, as overhead of a call is shared by
fewer samples: with 16 samples a batch a product takes 3.5 gradients, a probe 0.4, since 32 of them share an evaluation
that is bound by overhead, and the gradient grows too. With parameters a product stays at 2.3 up to 100 million and its
memory is 5 copies of the parameters: sum, product of a batch, gradient, and two terms; 2 GiB at 100 million, beside
0.8 for parameters and vector. A trace draws its probes in chunks, and takes 3 to 6 GiB there: probes and terms of one
layer. curvlinops takes twice the time of ours, as double backward does, and the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secorder_func as sf
from bench.growth import exponent
from bench.harness import Candidate, Run, compare, described, leaves, relative_error, rounded
from bench.memory import ALLOCATOR, peak_bytes, reset_peak, resident
from bench.products import function_of

QUESTION = "How do time and memory over a data set grow with samples, batches and parameters?"
NOTES = (
    "An exponent is the slope of a least-squares line through the logarithms, over the range that is shown.",
    "The gradient is that of the whole data set, in a plain loop over its batches.",
)
PROBES = 32
_INPUTS, _CLASSES = 64, 10


@dataclass(frozen=True)
class Data:
    """A model and its data."""

    width: int
    batches: int
    batch: int

    @property
    def name(self) -> str:
        return f"data-{self.width}-{self.batches}x{self.batch}"

    @property
    def description(self) -> str:
        return f"MLP, two layers of {self.width}, {self.batches} batches of {self.batch}"

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        width = self.width
        return nn.Sequential(
            nn.Linear(_INPUTS, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, _CLASSES),
        )

    @cached_property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return [
            (
                torch.randn(self.batch, _INPUTS, generator=generator),
                torch.randint(_CLASSES, (self.batch,), generator=generator),
            )
            for _ in range(self.batches)
        ]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @cached_property
    def vector(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(p.shape, generator=generator) for p in self.parameters]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


def _gradient(p: Data) -> Run:
    def run() -> list[Tensor]:
        total = [torch.zeros_like(q) for q in p.parameters]
        for x, y in p.data:
            for t, g in zip(total, torch.autograd.grad(p.loss(x, y), p.parameters), strict=True):
                t.add_(g, alpha=1 / p.batches)
        return total

    return run


def _double_backward(p: Data) -> list[Tensor]:
    """Return the product by plain autograd, batch by batch."""
    total = [torch.zeros_like(q) for q in p.parameters]
    for x, y in p.data:
        grads = torch.autograd.grad(p.loss(x, y), p.parameters, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(grads, p.vector, strict=True))
        for t, h in zip(total, torch.autograd.grad(dot, p.parameters), strict=True):
            t.add_(h, alpha=1 / p.batches)
    return total


def _operator(p: Data) -> sf.LinearOperator:
    f, params = sf.functional_loss(p.model, F.cross_entropy)
    return sf.Batches(p.data).hessian_operator(f, params)


def _product(p: Data) -> Run:
    op = _operator(p)
    v = dict(zip(op.like, p.vector, strict=True))
    return lambda: op @ v


def _trace(p: Data) -> Run:
    op = _operator(p)
    return lambda: sf.hutchinson_trace(op, PROBES, generator=torch.Generator().manual_seed(0))


def _curvlinops(p: Data) -> Run:
    make = function_of("curvlinops", "HessianLinearOperator")
    op = make(p.model, nn.CrossEntropyLoss(), p.parameters, p.data, check_deterministic=False)
    return lambda: op @ p.vector


_PRODUCT = Candidate("Batches.hessian_operator @ v", _product)
_TRACE = Candidate(
    "hutchinson_trace, a probe of 32", _trace, read=lambda estimate: [estimate.value]
)
_PEER = Candidate("curvlinops Hessian @ v", _curvlinops, peer=True)
METHODS = {
    "gradient": Candidate("gradient", _gradient),
    "product": _PRODUCT,
    "trace": _TRACE,
    "curvlinops": _PEER,
}


@dataclass(frozen=True)
class Axis:
    """What grows, and how many of it there are."""

    name: str
    points: tuple[Data, ...]
    number: Callable[[Data], int]


AXES = (
    Axis(
        "samples",
        tuple(Data(256, count, 128) for count in (2, 8, 32, 128)),
        lambda p: p.batches * p.batch,
    ),
    Axis(
        "batches",
        tuple(Data(256, 2048 // batch, batch) for batch in (1024, 256, 64, 16)),
        lambda p: p.batches,
    ),
    Axis(
        "parameters",
        tuple(Data(width, 4, 64) for width in (100, 316, 1000, 3162, 10_000)),
        lambda p: p.num_parameters,
    ),
)


def _measured(axis: Axis, p: Data, seconds: float) -> dict[str, Any]:
    truth = _double_backward(p)

    def check(result: Sequence[Tensor]) -> float:
        return relative_error(result, truth)

    unit = _gradient(p)
    options: dict[str, Any] = {"tolerance": 1e-4, "seconds": seconds}
    records = compare(p, unit, [_PRODUCT, _PEER], check, **options)
    if p.num_parameters < 2e7:  # beyond that the check alone takes minutes
        records += compare(p, unit, [_TRACE], _trace_check(p), per=PROBES, **options)[1:]
    entry = described(p, records, axis=axis.name, number=axis.number(p))
    return entry | {"name": f"{axis.name} {entry['number']}"}


def _trace_check(p: Data) -> Callable[[Any], float]:
    """Return the error in units of what six standard errors of plain forms allow, so that 1e-4 is the limit."""
    generator = torch.Generator().manual_seed(5)
    forms = []
    for _ in range(PROBES):
        signs = [torch.randint(2, q.shape, generator=generator) * 2.0 - 1 for q in p.parameters]
        other = Data(p.width, p.batches, p.batch)
        other.__dict__.update(model=p.model, data=p.data, parameters=p.parameters, vector=signs)
        products = _double_backward(other)
        forms.append(sum(float((h * v).sum()) for h, v in zip(products, signs, strict=True)))
    values = torch.tensor(forms)
    allowed = 6 * float(values.std()) * (2 / PROBES) ** 0.5
    return lambda result: 1e-4 * abs(float(leaves(result)[0]) - float(values.mean())) / allowed


def _lines(axis: Axis, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    xs = [entry["number"] for entry in entries]
    by: dict[str, tuple[bool, list[tuple[int, float]]]] = {}
    for x, entry in zip(xs, entries, strict=True):
        for record in entry["candidates"]:
            if "milliseconds" in record:
                found = by.setdefault(record["name"], (record["peer"], []))
                found[1].append((x, record["milliseconds"]["median"]))
    return [_line(name, peer, points) for name, (peer, points) in by.items()]


def _line(name: str, peer: bool, points: list[tuple[int, float]]) -> dict[str, Any]:
    xs, ys = (list(column) for column in zip(*points, strict=True))
    return {"name": name, "peer": peer, "x": xs, "y": ys, "exponent": exponent(xs, ys)}


# ------------------------------------------------------------------------------------- memory


def _peak_here(key: str, p: Data) -> float:
    """Return the MiB that a method adds in this process, which should be fresh."""
    warm = Data(8, 2, 4)
    METHODS[key].make(warm)()
    _ = p.model, p.data, p.parameters, p.vector
    before = resident()
    reset_peak()
    METHODS[key].make(p)()
    return rounded(max(0.0, peak_bytes() - before) / 2**20)


def _memory(axis: Axis, points: Sequence[Data]) -> list[dict[str, Any]]:
    lines = []
    for key, candidate in METHODS.items():
        peaks = []
        for p in points:
            command = [sys.executable, "-m", "bench.data_growth", key]
            command += [str(number) for number in (p.width, p.batches, p.batch)]
            done = subprocess.run(
                [*command, "--threads", str(torch.get_num_threads())],
                env={**os.environ, **ALLOCATOR},
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{candidate.name} on {p.name}: {reason}")
            peaks.append((axis.number(p), float(json.loads(done.stdout.splitlines()[-1]))))
        lines.append(_line(candidate.name, candidate.peer, peaks))
    return lines


def measure(*, quick: bool) -> dict[str, Any]:
    """Return time and memory along every axis, with exponents; `problems` has the records of all points."""
    problems, axes = [], []
    for axis in AXES:
        points = axis.points[:2] if quick else axis.points
        entries = [_measured(axis, p, 0.2 if quick else 3.0) for p in points]
        problems += entries
        peaks = [] if quick and axis.name != "batches" else _memory(axis, points)
        axes.append({"name": axis.name, "time": _lines(axis, entries), "memory": peaks})
    return {"question": QUESTION, "notes": NOTES, "axes": axes, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data_growth", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    for name in ("width", "batches", "batch"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    p = Data(options.width, options.batches, options.batch)
    print(json.dumps(_peak_here(options.method, p)))


if __name__ == "__main__":
    main()
