"""Several processes give what one gives, the same bits in each; one that fails ends the others, and is named."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from secorder_func import Batches, LinearOperator, share_vectors
from tests.oracles import relative_error
from tests.processes import programs

ROOT = Path(__file__).parents[2]
gloo = dist.is_available() and dist.is_gloo_available()
pytestmark = pytest.mark.skipif(not gloo, reason="this torch has no gloo")


def start(program: str, size: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Start the processes with what torchrun tells its own; without it, nobody ends those that are left."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes.programs", program, str(folder)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def results(program: str, size: int, folder: Path) -> list[dict[str, Tensor]]:
    assert ended(start(program, size, folder)) == [0] * size, errors(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def errors(folder: Path) -> dict[int, str]:
    return {int(path.stem): path.read_text() for path in folder.glob("*.error")}


def assert_equal(
    found: list[dict[str, Tensor]], expected: dict[str, Tensor], extra: set[str]
) -> None:
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensor in other.items():
            assert torch.equal(tensor, found[0][name]), name
    assert found[0].keys() == expected.keys() | extra
    for name, tensor in expected.items():
        assert found[0][name].shape == tensor.shape
        assert relative_error(found[0][name], tensor) < 1e-10, name


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_what_one_gives(size: int, tmp_path: Path) -> None:
    expected = programs.everything(tmp_path)
    found = results("everything", size, tmp_path)
    assert_equal(found, expected, {"ddp", "unseeded"})
    assert relative_error(found[0]["ddp"], expected["data: dense"]) < 1e-10


def test_data_and_vectors_are_shared_together(tmp_path: Path) -> None:
    assert_equal(results("both_plans", 4, tmp_path), programs.both_plans(tmp_path), set())


def test_torchrun_starts_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.processes.programs"]
    done = subprocess.run(
        [*command, "interrupted", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "1.pt", weights_only=True)["eigenvalues"]
    expected = programs.interrupted(tmp_path)["eigenvalues"]
    assert relative_error(found, expected) < 1e-10


def test_a_training_of_several_is_tracked_and_not_changed(tmp_path: Path) -> None:
    expected = programs.trained(tmp_path)
    found = results("trained", 2, tmp_path)
    assert torch.equal(found[0]["tracked True"], found[0]["tracked False"])
    assert torch.equal(found[1]["traces"], found[0]["traces"])
    assert relative_error(found[0]["traces"], expected["traces"]) < 1e-6
    assert relative_error(found[0]["eigenvalues"], expected["eigenvalues"]) < 1e-3
    lines = (tmp_path / "several.jsonl").read_text().splitlines()
    assert len(lines) == 3  # the first process alone writes


def test_products_take_sharded_parameters_and_the_rest_refuses_them(tmp_path: Path) -> None:
    assert_equal(results("sharded", 2, tmp_path), programs.sharded(tmp_path), set())
    texts = ast.literal_eval((tmp_path / "sharded-0.txt").read_text())
    assert len(texts) == 5
    assert all("is a DTensor" in text and "full_tensor()" in text for text in texts)


# ------------------------------------------------------------------------------- failures


def test_all_learn_what_happened_to_one(tmp_path: Path) -> None:
    found = results("failures", 3, tmp_path)
    texts: list[dict[str, str]] = [
        ast.literal_eval((tmp_path / f"failures-{rank}.txt").read_text()) for rank in range(3)
    ]
    for rank, text in enumerate(texts):
        for name in ("product", "trace"):
            if rank == 1:
                assert text[name] == "ZeroDivisionError: mine"
            else:
                assert text[name].startswith("RankError")
                assert "rank 1 failed with ZeroDivisionError: mine" in text[name]
        for name in ("vectors", "data"):
            assert "vectors differ between the processes" in text[name]
        assert "the parameters differ between the processes" in text["parameters"]
        assert ("from 0 on, got -1" in text["weight"]) or rank != 1
        assert "ArgumentError" in text["weight"]
        assert "nothing to sum" in text["nothing"]
        assert "must be a process group or True, got 'all'" in text["group"]
        for name in ("scaled", "turned", "number of probes"):
            assert text[name].startswith("RankError"), name
        assert "no derivative" in text["gradients"]
        assert "neither mapped nor differentiated" in text["mapped"]
        if rank != 1:
            assert "rank 1 failed with OutOfMemoryError: mine" in text["memory"]
            assert "rank 1 failed with RuntimeError" in text["changed"]
            assert "rank 1 failed with RuntimeError" in text["check"]
            assert "rank 1 failed with OSError: no disk" in text["loader"]
        else:
            assert "this process is out of memory" in text["memory"]
            assert "changed in place" in text["changed"]
            assert "another one when the data are read again" in text["check"]
            assert text["loader"] == "OSError: no disk"
        assert "cancelled" in text["cancelled"]
    # One process alone cannot propagate: then none does.
    assert not any(bool(one["by propagation"]) for one in found)
    assert torch.equal(found[0]["trace"], found[2]["trace"])
    forms, exact = found[0]["forms"], found[0]["exact forms"]
    assert relative_error(forms, torch.cat([exact[:1]] * 3 + [exact])) < 1e-10


def test_a_killed_process_is_named_inside_of_the_timeout(tmp_path: Path) -> None:
    processes = start("killed", 3, tmp_path)
    assert ended(processes) == [1, 1, -9]
    when = float((tmp_path / "when.txt").read_text())
    texts = errors(tmp_path)
    assert sorted(texts) == [0, 1]
    for rank, text in texts.items():
        last = text.strip().splitlines()[-1]
        assert "RankError" in last
        assert f"rank 2 (process {processes[2].pid} on " in last
        assert "is gone or frozen" in last
        assert "rank 0" not in last.replace("rank 0 (", "")
        took = float((tmp_path / f"{rank}.time").read_text()) - when
        assert took < 2 * programs.SECONDS + 3  # of a wait that may follow another one's


def test_a_process_that_does_something_else_is_named(tmp_path: Path) -> None:
    processes = start("hangs", 3, tmp_path)
    codes = ended(processes)
    assert codes[0] == codes[2] == 1
    when = float((tmp_path / "when.txt").read_text())
    texts = errors(tmp_path)
    assert sorted(texts) == [0, 2]
    for rank, text in texts.items():
        last = text.strip().splitlines()[-1]
        assert "RankError" in last
        assert f"rank 1 (process {processes[1].pid} on " in last
        assert "is alive, but did not make this call in time" in last
        took = float((tmp_path / f"{rank}.time").read_text()) - when
        assert took < 2 * programs.SECONDS + 3


def test_an_interrupted_run_of_several_goes_on(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert ended(start("interrupted", 2, tmp_path)) == [1, 1]
    assert "rank 0 failed with ZeroDivisionError" in errors(tmp_path)[1]
    (tmp_path / "stop").unlink()
    found = results("interrupted", 2, tmp_path)
    assert torch.equal(found[0]["eigenvalues"], found[1]["eigenvalues"])
    again = tmp_path / "again"
    again.mkdir()
    fresh = results("interrupted", 2, again)
    assert torch.equal(found[0]["eigenvalues"], fresh[0]["eigenvalues"])
    assert int(found[0]["evaluations"]) < int(fresh[0]["evaluations"])


def test_without_a_process_group_it_is_said_how_to_make_one() -> None:
    op = LinearOperator(lambda v: v, torch.ones(1))
    for call in (lambda: Batches([1], group=True), lambda: share_vectors(op)):
        with pytest.raises(ValueError, match=r"not initialized.*torchrun"):
            call()
    not_one: Any = 3
    with pytest.raises(TypeError, match=r"must be a LinearOperator, got int"):
        share_vectors(not_one)
