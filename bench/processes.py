"""How do time, messages and bytes of a product, of a trace and of eigenvalues go with the number of processes?

Command: `python -m bench processes` (`--quick` only sees that it runs).

An MLP of two layers of 416, 204,682 parameters in float32, over 24 batches of 64; every process has one thread and all
are on this machine, connected by gloo. The unit is the same call in one process without a group. All four processes
live from beginning to end and those that have no part in a call wait, so that every number of processes takes its turn
in every round. A call begins at a barrier, and the slowest process says how long it took. Messages are calls of
`all_reduce`, `broadcast_object_list` and `all_gather_object`; bytes are what one process gives into them, that of the
most.

Expected story, written before the first run of this file, for two cores. One process without a group takes 110 ms a
product, 1.0 s for 32 probes, 2.3 s for eigenvalues by 20 products. A group of one costs 1 to 2% more, for copies of
the sums and the number by which vectors are compared. Data shared: a product is one message of 1.64 MB, since the
weight of the batches is a float64 and makes the whole message one, twice what the float32 products would take; that
is 2 to 4 ms, so that two processes take 0.54, and three and four 0.60, as they share two cores and wait for the
last. A trace is two messages, the seed and 14 numbers, less than 200 bytes: 0.51, 0.57, 0.57. Eigenvalues are 21
messages of 32.8 MB in all; every process makes all vectors orthogonal, 4% of the time that is not shared: 0.57, 0.66,
0.67. Vectors shared: a product is made by the first process and sent as 0.82 MB: 1.02, 1.03, 1.04, and eigenvalues, 21
messages of 16.4 MB, 1.04, 1.08, 1.12, for the others gain nothing. A trace is two messages as well; its 8 groups of 4
probes go as 4 and 4, 2 and 3 and 3, 2 each, and every process evaluates the loss for itself: 0.54, 0.65, 0.65. Nothing
grows with the number of processes but the waiting. Errors against one process: 1e-7 for a product and a trace of
shared data, 1e-6 for eigenvalues, and 0 where vectors are shared, but for the trace, 1e-7.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import secorder_func as sf
from bench.data_growth import Data
from bench.harness import described, leaves, relative_error, summary
from secorder_func.errors import ConvergenceWarning

QUESTION = (
    "How do time, messages and bytes of a product, of a trace and of eigenvalues go with the number of "
    "processes?"
)
PROBES, PRODUCTS, MOST = 32, 20, 4
NOTES = (
    "Every process has one thread, and all are on this machine; the unit is one process without a group.",
    "More processes than the machine has cores share the cores: there the numbers say what the overhead is, and not "
    "what a machine for each would gain.",
    f"The trace is `hutchinson_trace` of {PROBES} probes, the eigenvalues are `eigsh` with k=2 by {PRODUCTS} products.",
    "Messages are calls of functions of `torch.distributed`; to send an object is one, with its size before.",
)
_TOLERANCE = 1e-5
_SECONDS = 300
"""How long a process waits for the others."""


def _product(p: Data, op: sf.LinearOperator) -> Any:
    return op @ dict(zip(op.like, p.vector, strict=True))


def _trace(p: Data, op: sf.LinearOperator) -> Any:
    return sf.hutchinson_trace(op, PROBES, generator=torch.Generator().manual_seed(0)).value


def _eigenvalues(p: Data, op: sf.LinearOperator) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        generator = torch.Generator().manual_seed(0)
        pairs = sf.eigsh(op, 2, max_matvecs=PRODUCTS, generator=generator)
    if pairs.num_matvecs != PRODUCTS:
        raise AssertionError(f"eigsh made {pairs.num_matvecs} products, not {PRODUCTS}")
    return pairs.eigenvalues


@dataclass(frozen=True)
class Task:
    """What is computed, and in how many rounds it is timed."""

    name: str
    call: Callable[[Data, sf.LinearOperator], Any]
    rounds: int


TASKS = (
    Task("product", _product, 25),
    Task("trace", _trace, 9),
    Task("eigenvalues", _eigenvalues, 7),
)


@dataclass(frozen=True)
class Way:
    """What is shared, among how many processes; nothing in one without a group."""

    shared: str | None
    processes: int

    @property
    def name(self) -> str:
        if self.shared is None:
            return "one process, no group"
        return f"{self.shared} shared, processes: {self.processes}"

    def operator(self, p: Data, group: Any) -> sf.LinearOperator:
        """Return the operator, in a process that has a part in it."""
        f, params = sf.functional_loss(p.model, F.cross_entropy)
        if self.shared == "data":
            own = p.data[dist.get_rank() :: self.processes]
            return sf.Batches(own, group=group).hessian_operator(f, params)
        op = sf.Batches(p.data).hessian_operator(f, params)
        return op if self.shared is None else sf.share_vectors(op, group)


WAYS = (
    Way(None, 1),
    *(Way(shared, count) for shared in ("data", "vectors") for count in range(1, MOST + 1)),
)


# ------------------------------------------------------------------------------------- messages


@dataclass
class Given:
    """What this process gave into collective calls."""

    calls: int = 0
    size: int = 0


@contextmanager
def counted() -> Iterator[Given]:
    """Count the calls of `torch.distributed` that secorder_func makes inside, and the bytes given into them."""
    given = Given()

    def counting(name: str, size: Callable[..., int]) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            given.calls += 1
            given.size += size(*args)
            return function(*args, **options)

        return call

    sizes: dict[str, Callable[..., int]] = {
        "all_reduce": lambda tensor: tensor.numel() * tensor.element_size(),
        "broadcast_object_list": lambda held, first: _pickled(held) * (first == dist.get_rank()),
        "all_gather_object": lambda values, value: _pickled([value]),
    }
    with mock.patch.multiple(dist, **{name: counting(name, size) for name, size in sizes.items()}):
        yield given


def _pickled(values: Sequence[Any]) -> int:
    return sum(len(pickle.dumps(value)) for value in values)


# ------------------------------------------------------------------------------------- one of the processes


def _records(task: Task, p: Data, groups: dict[int, Any], rounds: int) -> list[dict[str, Any]]:
    """Return the records of all ways, in all processes together."""
    rank = dist.get_rank()
    operators = {
        way: way.operator(p, groups[way.processes]) for way in WAYS if rank < way.processes
    }
    facts = {way: _checked(task, p, operators.get(way), way) for way in WAYS}
    errors = _errors({way: result for way, (result, _) in facts.items()}, task) if rank == 0 else {}
    times: dict[Way, list[float]] = {way: [] for way in WAYS}
    for turn in (number % len(WAYS) for number in range(rounds)):
        for way in WAYS[turn:] + WAYS[:turn]:
            times[way].append(_timed(task, p, operators.get(way)))
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, [(given, times[way]) for way, (_, given) in facts.items()])
    of_ways = list(zip(*seen, strict=True))
    slowest = [[max(of_all) for of_all in zip(*(t for _, t in w), strict=True)] for w in of_ways]
    return [
        {
            "name": way.name,
            "peer": False,
            "shared": way.shared,
            "processes": way.processes,
            "milliseconds": summary([1e3 * t for t in own]),
            "to_one": summary([t / one for t, one in zip(own, slowest[0], strict=True)]),
            "calls": max(given.calls for given, _ in of_way),
            "bytes": max(given.size for given, _ in of_way),
            "relative_error": float(f"{errors.get(way, 0.0):.2g}"),
        }
        for way, own, of_way in zip(WAYS, slowest, of_ways, strict=True)
    ]


def _checked(
    task: Task, p: Data, op: sf.LinearOperator | None, way: Way
) -> tuple[list[Tensor], Given]:
    """Call it once to warm up, and once more to count; return what came of it, if this process has a part in it."""
    dist.barrier()
    if op is None:
        return [], Given()
    result = leaves(task.call(p, op))
    with counted() as given:
        task.call(p, op)
    if bool(given.calls) != (way.shared is not None):
        raise AssertionError(f"{task.name}, {way.name}: {given.calls} messages were counted")
    return result, given


def _errors(results: dict[Way, list[Tensor]], task: Task) -> dict[Way, float]:
    """Return the relative errors against one process; refuse what is too large."""
    errors = {way: relative_error(result, results[WAYS[0]]) for way, result in results.items()}
    for way, error in errors.items():
        if not error <= _TOLERANCE:
            raise AssertionError(f"{task.name}, {way.name}: relative error {error:.2g}")
    return errors


def _timed(task: Task, p: Data, op: sf.LinearOperator | None) -> float:
    dist.barrier()
    begin = time.perf_counter()
    if op is not None:
        task.call(p, op)
    return time.perf_counter() - begin


def _problem(quick: bool) -> Data:
    return Data(16, 4, 8) if quick else Data(416, 24, 64)


def _run(path: Path, quick: bool) -> None:
    """Measure together with the other processes; the first one writes the entries."""
    p = _problem(quick)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, MOST + 1)}
    entries = []
    for task in TASKS:
        records = _records(task, p, groups, 2 if quick else task.rounds)
        entries.append({**described(p, records, axis="processes"), "name": task.name})
    if dist.get_rank() == 0:
        path.write_text(json.dumps(entries))


# ------------------------------------------------------------------------------------- all of them


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every task."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "entries.json"
        _together([sys.executable, "-m", "bench.processes", str(path), *["--quick"] * quick], path)
        problems = json.loads(path.read_text())
    return {"question": QUESTION, "notes": NOTES, "problems": problems}


def _together(command: list[str], path: Path) -> None:
    """Start the processes with what torchrun tells its own; if one fails, end the others and raise."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(MOST), "OMP_NUM_THREADS": "1"}
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in range(MOST):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running[rank] = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=env)
        while any(process.poll() is None for process in running.values()):
            failed = [rank for rank, process in running.items() if process.poll()]
            if failed:
                break
            time.sleep(0.5)
        codes = {rank: process.poll() for rank, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    if any(codes.values()):  # the others fail because the first is gone
        told = sorted(path.parent.glob(f"{path.stem}.[0-9]"), key=lambda file: file.stat().st_mtime)
        reason = f"process {told[0].suffix[1:]}:\n{told[0].read_text()}" if told else "killed"
        raise RuntimeError(f"a process failed, {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__)
    parser.add_argument("path", type=Path, help="where the first process writes")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_SECONDS))
    try:
        _run(options.path, options.quick)
    except BaseException:
        options.path.with_suffix(f".{dist.get_rank()}").write_text(traceback.format_exc())
        os._exit(1)  # destroying the group might wait for who is gone
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
