"""Interrupted runs end with the numbers of uninterrupted ones; what does not belong to a run is refused."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import (
    Batches,
    Checkpoint,
    CheckpointError,
    LinearOperator,
    cg,
    eigsh,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    interruptible,
    minres,
    per_sample_hessian_operator,
    running,
    spectral_density,
    tree,
    xtrace,
)
from secorder_func.errors import CheckpointWarning, ConvergenceWarning, NoExactRouteError
from tests.algorithms import interrupted

ROOT = Path(__file__).parents[2]


def start(folder: Path, result: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.algorithms.interrupted"]
    process = subprocess.Popen(
        [*command, str(folder), str(result), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def finished(process: subprocess.Popen[str]) -> float:
    begun = time.monotonic()
    process.communicate(timeout=300)
    assert process.returncode == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_ends_with_the_same_numbers(
    kills: int, tmp_path: Path
) -> None:
    truth, result, folder = tmp_path / "truth.pt", tmp_path / "result.pt", tmp_path / "kept"
    seconds = finished(start(folder, truth, "--without"))
    delays = random.Random(kills)
    killed = 0
    while killed < kills:
        process = start(folder, result)
        try:
            process.wait(delays.uniform(0, 2 * seconds / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        else:  # it came to its end: begin anew
            for file in folder.iterdir():
                file.unlink()
        process.communicate()
    finished(start(folder, result))
    expected, found = (torch.load(path, weights_only=True) for path in (truth, result))
    assert set(expected) == set(interrupted.jobs())
    for name, tensors in expected.items():
        assert len(tensors) > 1
        assert all(map(torch.equal, found[name], tensors)), name


# ----------------------------------------------------------- within a process, at every moment


class StoppedError(Exception):
    pass


class Stops:
    """Data of three batches that fail at one reading of a batch, counted over all passes."""

    def __init__(self, at: int | None) -> None:
        self.at, self.read = at, 0
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(4, 5, generator=generator).double() for _ in range(3)]

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.read += 1
            if self.read == self.at:
                raise StoppedError
            yield batch


def loss(p: Tensor, x: Tensor) -> Tensor:
    return ((x @ p).tanh() ** 2).mean() + (x @ p).exp().mean()


def operator(data: Any, dtype: torch.dtype = torch.float64, **options: Any) -> LinearOperator:
    if dtype != torch.float64:
        data.batches = [batch.to(dtype) for batch in data.batches]
    return Batches(data, check_weights=False).hessian_operator(
        loss, torch.linspace(-1, 1, 5).to(dtype), **options
    )


COMPUTATIONS: dict[str, Callable[..., Any]] = {
    "trace": lambda op, **o: hutchinson_trace(op, 40, **o),
    "trace of a sum": lambda op, **o: hutchinson_trace(op + 2.0 * op.damped(0.1), 8, **o),
    "trace to a tolerance": lambda op, **o: hutchinson_trace(op, rtol=0.3, max_matvecs=40, **o),
    "diagonal": lambda op, **o: hutchinson_diagonal(op, 12, chunk_size=4, **o),
    "xtrace": lambda op, **o: xtrace(op, 4, **o),
    "hutchpp": lambda op, **o: hutchpp_trace(op, 4, chunk_size=1, **o),
    "eigsh": lambda op, **o: eigsh(op, 2, rtol=1e-3, **o),
    "density": lambda op, **o: spectral_density(op, 4, num_steps=3, memory_budget=240, **o),
}


@pytest.mark.filterwarnings("ignore:hutchinson_trace. the interval:UserWarning")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float64, {"check_finite": True}),
    ],
    ids=["double", "single", "by products"],
)
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_an_interruption_at_any_batch_does_not_show(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    def compute(at: int | None, checkpoint: Any) -> tuple[list[Tensor], int]:
        data = Stops(at)
        generator = torch.Generator().manual_seed(0)
        op = operator(data, dtype, **options)
        found = COMPUTATIONS[name](op, generator=generator, checkpoint=checkpoint)
        return interrupted.numbers(found), data.read

    expected, reads = compute(None, None)
    for at in range(2, reads + 1):
        checkpoint = Checkpoint(tmp_path / f"{at}.pt", minutes=0)
        with pytest.raises(StoppedError):
            compute(at, checkpoint)
        found, read = compute(None, checkpoint)
        assert all(map(torch.equal, found, expected))
        # No pass was made again, though the batches of the interrupted one were read again.
        assert read <= reads - at + 1 + 3 + 4


def test_what_was_computed_is_not_computed_again(tmp_path: Path) -> None:
    evaluated: list[int] = []

    def counted(p: Tensor, x: Tensor) -> Tensor:
        evaluated.append(int(x[0]))
        return (x * p**3).mean()

    def run(stop: int | None) -> Tensor:
        def data() -> Any:
            for index in range(1, 6):
                if index == stop:
                    raise StoppedError
                yield torch.full((2,), float(index))

        batches = Batches(Again(data), check_weights=False)
        op = batches.hessian_operator(counted, torch.ones(()))
        generator = torch.Generator().manual_seed(0)
        return hutchinson_trace(
            op, 4, generator=generator, checkpoint=Checkpoint(tmp_path / "c.pt", minutes=0)
        ).value

    with pytest.raises(StoppedError):
        run(4)
    evaluated.clear()
    assert float(run(None)) == pytest.approx(18.0)
    assert set(evaluated[1:]) <= {1, 4, 5}  # of the first, one product, by which it is known again
    assert {4, 5} <= set(evaluated)


class Again:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> Any:
        return self.make()


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "trace.pt"
    products: list[int] = []

    def product(v: Tensor) -> Tensor:
        products.append(1)
        return torch.tensor([1.0, 2.0, 3.0]) * v + v.sum()

    op = LinearOperator(product, torch.zeros(3))
    for target in ({"num_matvecs": 50}, {"rtol": 0.3, "max_matvecs": 10_000}):
        generator = torch.Generator().manual_seed(0)
        first = hutchinson_trace(op, **target, generator=generator, checkpoint=path)
        spent = len(products)
        generator.manual_seed(0)
        second = hutchinson_trace(op, **target, generator=generator, checkpoint=path)
        assert len(products) == spent + 1
        assert torch.equal(first.value, second.value)
        assert first.converged == second.converged
        assert first.num_matvecs == second.num_matvecs
        path.unlink()


def test_without_a_generator_the_seed_of_the_run_is_kept(tmp_path: Path) -> None:
    op = operator(Stops(None))
    torch.manual_seed(0)
    expected = hutchinson_trace(op, 20).value
    torch.manual_seed(0)
    with pytest.raises(StoppedError):
        hutchinson_trace(operator(Stops(3)), 20, checkpoint=tmp_path / "c.pt")
    torch.manual_seed(0)
    found = hutchinson_trace(op, 20, checkpoint=Checkpoint(tmp_path / "c.pt", minutes=0))
    assert torch.equal(found.value, expected)
    torch.manual_seed(99)
    assert torch.equal(hutchinson_trace(op, 20, checkpoint=tmp_path / "c.pt").value, expected)


def test_per_sample_estimates_are_kept_too(tmp_path: Path) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    op = per_sample_hessian_operator(
        lambda p, x: ((x @ p) ** 4).sum(0), torch.ones(3, 1).double(), x
    )
    generator = torch.Generator().manual_seed(0)
    first = hutchinson_trace(op, 8, generator=generator, checkpoint=tmp_path / "c.pt")
    generator.manual_seed(0)
    again = hutchinson_trace(op, 8, generator=generator, checkpoint=tmp_path / "c.pt")
    assert first.value.shape == (6,)
    assert torch.equal(first.value, again.value)


# ------------------------------------------------------------------------------- refusals


def diagonal(*entries: float) -> LinearOperator:
    d = torch.tensor(entries, dtype=torch.float32)
    return LinearOperator(lambda v: d * v, d)


def trace(op: LinearOperator, path: Path, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    return hutchinson_trace(op, 9, generator=generator, checkpoint=path, **options)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda p: trace(diagonal(1, 2, 4), p), "operator"),
        (lambda p: trace(diagonal(1, 2, 3.0001), p), "operator"),
        (lambda p: trace(diagonal(1, 2, 3).damped(1e-3), p), "operator"),
        (lambda p: trace(diagonal(-1, -2, -3), p), "operator"),
        (lambda p: trace(diagonal(1, 2, 3, 4), p), "shapes"),
        (lambda p: trace(diagonal(1, 2, 3), p, seed=1), "seed"),
        (lambda p: trace(diagonal(1, 2, 3), p, chunk_size=2), "chunk_size"),
        (lambda p: hutchinson_trace(diagonal(1, 2, 3), 10, checkpoint=p), "num_matvecs|seed"),
        (lambda p: hutchinson_diagonal(diagonal(1, 2, 3), 9, checkpoint=p), "function"),
        (lambda p: eigsh(diagonal(1, 2, 3), 1, checkpoint=p), "function"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    call: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    trace(diagonal(1, 2, 3), path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"its ({reason}).* is (.*here it is|another one)"):
        call(path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    trace(diagonal(1, 2, 3), path)
    with monkeypatch.context() as patch:
        patch.setattr("secorder_func.algorithms.checkpoint.__version__", "0.0.9")
        with pytest.raises(CheckpointError, match=r"version of secorder_func is '.*', here it is"):
            trace(diagonal(1, 2, 3), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        with pytest.raises(CheckpointError, match="version of torch is"):
            trace(diagonal(1, 2, 3), path)
    with monkeypatch.context() as patch:
        patch.setattr("secorder_func.algorithms.checkpoint._FORMAT", 2)
        with pytest.raises(CheckpointError, match="format 1, this version writes 2"):
            trace(diagonal(1, 2, 3), path)
    assert float(trace(diagonal(1, 2, 3), path).value) == 6.0


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    trace(diagonal(1, 2, 3), path)
    whole = path.read_bytes()
    damaged = [whole[: len(whole) * k // 10] for k in range(10)]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        for place in range(0, len(whole), 7)
    ]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = trace(diagonal(1, 2, 3), path)
        except CheckpointError:
            refused += 1
        else:  # of what the file system and pickles leave unused
            assert float(found.value) == 6.0
            assert found.num_matvecs == 9
    assert refused > len(damaged) / 4
    torch.save({"mine": 1}, path)
    with pytest.raises(CheckpointError, match="the file of something else"):
        trace(diagonal(1, 2, 3), path)
    path.write_text("print('hello')")
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        trace(diagonal(1, 2, 3), path)


def test_other_data_are_refused_where_they_differ(tmp_path: Path) -> None:
    data, other = Stops(3), Stops(None)
    other.batches[1] = other.batches[1] + 1
    path = tmp_path / "c.pt"
    kept = Checkpoint(path, minutes=0)

    def compute(data: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return hutchinson_trace(operator(data), 20, generator=generator, checkpoint=kept)

    data.at = 4  # the first batch was read once to know the operator by
    with pytest.raises(StoppedError):
        compute(data)
    with pytest.raises(ValueError, match="batch 1 is another one"):
        compute(other)
    changed = Stops(None)
    changed.batches[0] = -changed.batches[0]
    with pytest.raises(CheckpointError, match="operator is another one"):
        compute(changed)


def test_a_bad_path_or_time_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="name of a file, got int"):
        Checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minutes"):
        Checkpoint("a", minutes=-1)
    with pytest.raises(IsADirectoryError):
        trace(diagonal(1, 2), tmp_path)  # a folder


# ----------------------------------------------------------------------------- cancellation


def stopping_after(
    count: int, matrix: Tensor
) -> tuple[LinearOperator, list[Callable[[], None]], list[int]]:
    """Return an operator that calls `stop[0]` at one of its products, `stop`, and how many products there were."""
    stop: list[Callable[[], None]] = []
    calls = [0]

    def product(v: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == count:
            stop[0]()
        return matrix @ v

    return LinearOperator(product, matrix[0]), stop, calls


def test_cancelled_estimates_are_those_of_the_products_that_were_made() -> None:
    d = torch.linspace(1, 2, 40).double()
    dense = torch.diag(d) + torch.ones(40, 40).double()
    for estimate, count in (
        (hutchinson_trace, 20),
        (hutchinson_diagonal, 20),
        (xtrace, 35),
        (hutchpp_trace, 32),
    ):
        op, stop, calls = stopping_after(count, dense)
        generator = torch.Generator().manual_seed(0)
        with interruptible() as cancel:
            stop.append(cancel)
            with pytest.warns(ConvergenceWarning, match="cancelled after"):
                found = estimate(op, 39, generator=generator, chunk_size=1)
        assert 0 < found.num_matvecs < 39
        assert found.converged is False
        assert calls[0] == count
        exact = dense.diagonal() if estimate is hutchinson_diagonal else dense.trace()
        assert float((found.value - exact).norm()) < 6 * float(found.standard_error.norm()) + 1e-9
        whole = estimate(LinearOperator(lambda v: dense @ v, d), 39, resume=found, chunk_size=1)
        generator.manual_seed(0)
        expected = estimate(
            LinearOperator(lambda v: dense @ v, d), 39, generator=generator, chunk_size=1
        )
        assert torch.allclose(whole.value, expected.value, rtol=1e-10)


def test_cancelled_eigensolvers_densities_and_solvers_return_what_they_have() -> None:
    d = torch.linspace(1, 1000, 200).double()
    ones = torch.ones(200).double()
    op, stop, _ = stopping_after(12, torch.diag(d))
    with interruptible() as cancel:
        stop.append(cancel)
        with pytest.warns(ConvergenceWarning, match="above the tolerance"):
            pairs = eigsh(op, 2, generator=torch.Generator().manual_seed(0))
    assert pairs.num_matvecs == 12
    assert not pairs.converged
    assert 900 < float(pairs.eigenvalues[0]) <= 1000
    op, stop, _ = stopping_after(10, torch.diag(d))
    with interruptible() as cancel:
        stop.append(cancel)
        with pytest.warns(ConvergenceWarning, match="cancelled after"):
            density = spectral_density(op, 1, num_steps=30)
    assert density.num_matvecs == 10
    assert float(density.mean_of(lambda x: x).value) == pytest.approx(500, rel=0.3)
    for solver in (cg, minres):
        op, stop, _ = stopping_after(10, torch.diag(d))
        with interruptible() as cancel:
            stop.append(cancel)
            with pytest.warns(ConvergenceWarning, match="was cancelled"):
                solution = solver(op, ones, rtol=1e-12)
        assert not bool(solution.converged)
        rest = ones - d * solution.x
        assert float(solution.residual_norm) == pytest.approx(float(rest.norm()), rel=1e-9)
        assert float(rest.norm()) < float(ones.norm())


def test_nothing_to_return_is_an_interruption_and_the_checkpoint_is_written(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    stop: list[Callable[[], None]] = []
    data = Stops(None)

    def stops(p: Tensor, x: Tensor) -> Tensor:
        if torch.equal(x, data.batches[1]) and stop:
            stop.pop()()
        return loss(p, x)

    def make() -> LinearOperator:
        return Batches(data, check_weights=False).hessian_operator(
            stops, torch.linspace(-1, 1, 5).double()
        )

    def compute(checkpoint: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return hutchinson_trace(make(), 20, generator=generator, checkpoint=checkpoint).value

    expected = compute(None)
    with interruptible() as cancel:
        stop.append(cancel)
        with pytest.raises(KeyboardInterrupt, match="cancelled after 2 batches"):
            compute(path)
    assert path.exists()
    data.read = 0
    assert torch.equal(compute(path), expected)


def test_ctrl_c_ends_the_run_and_a_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    calls = [0]

    def product(v: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            signal.raise_signal(signal.SIGINT)
        return 2 * v

    op = LinearOperator(product, torch.zeros(3))
    with interruptible(), pytest.warns(ConvergenceWarning, match="cancelled after 5 of 100"):
        assert float(hutchinson_trace(op, 100, chunk_size=1).value) == 6.0
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_tree_of_parameters_is_kept(tmp_path: Path) -> None:
    params = {"b": torch.ones(2), "a": [torch.ones(()), torch.ones(1, 2)]}
    op = LinearOperator(lambda v: tree.scale(3.0, v), params)
    generator = torch.Generator().manual_seed(0)
    found = hutchinson_diagonal(op, 6, generator=generator, checkpoint=tmp_path / "c.pt")
    generator.manual_seed(0)
    again = hutchinson_diagonal(op, 6, generator=generator, checkpoint=tmp_path / "c.pt")
    assert found.value["a"][1].tolist() == again.value["a"][1].tolist() == [[3.0, 3.0]]


def test_fewer_data_are_refused_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    data = Stops(5)
    kept = Checkpoint(tmp_path / "c.pt", minutes=0)

    def compute(data: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return hutchinson_trace(operator(data), 20, generator=generator, checkpoint=kept)

    data.at = 4
    with pytest.raises(StoppedError):
        compute(data)
    fewer = Stops(None)
    fewer.batches = fewer.batches[:1]
    with pytest.raises(CheckpointError, match="of 2 batches that were done there are 1"):
        compute(fewer)


def test_a_distribution_of_the_users_is_known_by_what_it_draws(tmp_path: Path) -> None:
    def make(value: float) -> Any:
        return lambda seed, rows, like: torch.full((len(rows), *like.shape), value)

    op = diagonal(1, 2, 3)
    path = tmp_path / "c.pt"
    generator = torch.Generator().manual_seed(0)
    found = hutchinson_trace(op, 4, distribution=make(1.0), generator=generator, checkpoint=path)
    assert float(found.value) == 6.0
    generator.manual_seed(0)
    with pytest.raises(ValueError, match="drawn"):
        hutchinson_trace(op, 4, distribution=make(2.0), generator=generator, checkpoint=path)
    with pytest.raises(ValueError, match="drawn"):
        hutchinson_trace(op, 8, distribution=make(2.0), resume=found)


def test_a_file_that_cannot_be_written_is_said_at_once_or_warned_of(tmp_path: Path) -> None:
    op = diagonal(1, 2, 3)
    with pytest.raises(OSError, match=r"too long"):
        trace(op, tmp_path / ("a" * 252))
    folder = tmp_path / "folder"
    folder.mkdir()

    def product(v: Tensor) -> Tensor:
        if folder.exists() and calls.pop():
            folder.rmdir()
        return torch.tensor([1.0, 2.0, 3.0]) * v

    calls = [True, False]  # the first product is that by which the operator is known
    lost = LinearOperator(product, torch.zeros(3))
    with pytest.warns(CheckpointWarning, match="could not be written"):
        found = trace(lost, folder / "c.pt", chunk_size=1)
    assert float(found.value) == 6.0


def test_a_checkpoint_records_no_derivatives_and_refuses_transforms(tmp_path: Path) -> None:
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    op = LinearOperator(lambda v: p * v, torch.zeros(2))
    assert hutchinson_trace(op, 4).value.requires_grad
    assert not trace(op, tmp_path / "c.pt").value.requires_grad
    with pytest.raises(NoExactRouteError, match=r"torch\.func"):
        torch.func.grad(lambda p: trace(op, tmp_path / "d.pt").value * p)(torch.tensor(1.0))


def test_an_inner_computation_is_cancelled_as_a_whole(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(30, 30, generator=generator).double()
    matrix = root @ root.T + 30 * torch.eye(30).double()
    calls = [0]
    stop: list[Callable[[], None]] = []

    def product(v: Tensor) -> Tensor:
        calls[0] += 1
        if stop and calls[0] == 140:
            stop.pop()()
        return matrix @ v

    inner = LinearOperator(product, matrix[0])
    inverse = LinearOperator(lambda v: cg(inner, v, rtol=1e-12).x, matrix[0])

    def compute(checkpoint: Any) -> Any:
        calls[0] = 0
        return hutchinson_trace(
            inverse,
            10,
            generator=torch.Generator().manual_seed(0),
            chunk_size=1,
            checkpoint=checkpoint,
        )

    expected = compute(None)
    with interruptible() as cancel:
        stop.append(cancel)
        with pytest.warns(ConvergenceWarning, match="cancelled after") as warned:
            found = compute(tmp_path / "c.pt")
    assert len(warned) == 1
    done = found.num_matvecs
    assert 0 < done < 10
    first = hutchinson_trace(
        inverse, done, generator=torch.Generator().manual_seed(0), chunk_size=1
    )
    assert torch.equal(found.value, first.value)
    assert torch.equal(compute(tmp_path / "c.pt").value, expected.value)


def test_cancelled_hutchpp_goes_on_with_no_more_products_than_asked_for() -> None:
    matrix = torch.diag(torch.linspace(1, 2, 90)).double() + 0.1
    op, stop, _ = stopping_after(45, matrix)
    with interruptible() as cancel:
        stop.append(cancel)
        with pytest.warns(ConvergenceWarning, match="cancelled after"):
            found = hutchpp_trace(op, 60, chunk_size=1)
    assert found.num_matvecs == 45
    plain = LinearOperator(lambda v: matrix @ v, matrix[0])
    for total in (45, 48, 54, 60):
        assert hutchpp_trace(plain, total, resume=found).num_matvecs == total


def test_what_nobody_looks_for_is_an_interruption_at_the_end() -> None:
    op = diagonal(1, 2, 3)

    def nobody_looks() -> None:
        with interruptible() as cancel:
            cancel()
            op @ torch.ones(3)

    with pytest.raises(KeyboardInterrupt):
        nobody_looks()
    done: list[int] = []
    with interruptible() as cancel:
        cancel()
        with pytest.raises(KeyboardInterrupt, match="cancelled"):
            op.dense()
        done.append(1)
    assert done


def test_an_outer_block_is_cancelled_with_an_inner_one() -> None:
    op = diagonal(1, 2, 3)
    with interruptible():
        with interruptible() as cancel:
            cancel()
            with pytest.raises(KeyboardInterrupt):
                hutchinson_trace(op, 4)
        with pytest.raises(KeyboardInterrupt):
            hutchinson_trace(op, 4)


def test_handlers_of_the_user_are_kept_and_ignored_signals_stay_ignored() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is mine
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            assert float(hutchinson_trace(diagonal(1, 2, 3), 4).value) == 6.0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_context_left_in_another_order_leaves_nothing() -> None:
    def block() -> Any:
        with interruptible() as cancel:
            yield cancel

    generator = block()
    next(generator)
    with interruptible():
        generator.close()
        assert len(running.watchers()) == 1
    assert not running.watchers()


def test_digests_tell_values_apart() -> None:
    from secorder_func.digest import digest

    values = [
        [1, 23],
        [12, 3],
        {"s": [1, 11]},
        {"s": [11, 1]},
        ["a", "bc"],
        ["ab", "c"],
        [[1], [2]],
        [[1, 2], []],
        [1.0],
        [1],
        [True],
        [torch.ones(1)],
        [torch.ones(1).double()],
        [torch.ones(1, 1)],
        [-torch.zeros(1)],
        [torch.zeros(1)],
        [torch.zeros(0)],
        [torch.zeros(0, 2)],
        [torch.ones(3)[::2].numpy()],
        [torch.ones(3)[:2].double().numpy()],
        [None],
        [],
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(torch.arange(6.0).reshape(2, 3).T) == digest(
        torch.arange(6.0).reshape(2, 3).T.contiguous()
    )
