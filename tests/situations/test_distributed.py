"""DistributedDataParallel and fully sharded modules, on one process over gloo."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secorder_func import functional_loss
from secorder_func.compat.core.hvp import approximate_hvp
from secorder_func.errors import ArgumentError
from tests import oracles
from tests.situations.entries import (
    ENTRIES,
    GAUSS_NEWTON,
    Case,
    classification,
    double_backward,
    every_entry,
    gauss_newton,
    mlp,
)
from tests.versions import BEFORE_2_10

gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not gloo, reason="this torch has no gloo")

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}


@pytest.fixture(autouse=True)
def _process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 3)
    ).double()


def _wrapped(options: str) -> Case:
    inner = _network()
    model = DistributedDataParallel(inner, **OPTIONS[options])
    return Case(model, F.cross_entropy, *classification(), truth=inner)


def _step(model: nn.Module, case: Case) -> list[Tensor]:
    """Make a training step without the update; return the gradients."""
    model.zero_grad()
    case.loss_fn(model(case.x), case.y).backward()
    return [p.grad.clone() for p in model.parameters()]


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("options", OPTIONS)
@every_entry
def test_a_product_is_exact_and_training_goes_on_undisturbed(entry: str, options: str) -> None:
    case, twin = _wrapped(options), _network()
    v = case.vector()
    expected = double_backward(case, v)
    for step in range(3):
        if step:
            expected = double_backward(case, v)
        gradients, buffers = [p.grad for p in case.params], _buffers(case.model)
        oracles.assert_same(ENTRIES[entry](case, v), expected)
        assert all(p.grad is g for p, g in zip(case.params, gradients, strict=True))
        assert all(map(torch.equal, _buffers(case.model), buffers))
        oracles.assert_same(_step(case.model, case), _step(twin, case), rtol=1e-14)
        assert all(map(torch.equal, _buffers(case.model), _buffers(twin)))


@pytest.mark.parametrize("entry", GAUSS_NEWTON)
def test_gauss_newton_products_are_exact(entry: str) -> None:
    case = _wrapped("default")
    v = case.vector()
    oracles.assert_same(GAUSS_NEWTON[entry](case, v), gauss_newton(case, v))


@pytest.mark.parametrize("options", OPTIONS)
@every_entry
def test_a_product_between_forward_and_backward_does_not_change_the_gradients(
    entry: str, options: str
) -> None:
    case, twin = _wrapped(options), _network()
    loss = case.closure()
    ENTRIES[entry](case, case.vector())
    loss.backward()
    oracles.assert_same([p.grad for p in case.params], _step(twin, case), rtol=1e-14)


@every_entry
def test_an_exception_in_the_loss_leaves_the_wrapper_fit_for_training(entry: str) -> None:
    case, twin = _wrapped("static graph"), _network()

    def fails(output: Tensor, y: Tensor) -> Tensor:
        raise ArithmeticError("mine")

    failing = Case(case.model, fails, case.x, case.y)
    with pytest.raises(ArithmeticError, match="mine"):
        ENTRIES[entry](failing, case.vector())
    oracles.assert_same(_step(case.model, case), _step(twin, case), rtol=1e-14)


@every_entry
def test_no_hook_of_the_reducer_runs_in_a_product(entry: str) -> None:
    case, calls = _wrapped("default"), []

    def count(state, bucket):  # torch compares annotations, which are strings here
        calls.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    case.model.register_comm_hook(None, count)
    ENTRIES[entry](case, case.vector())
    assert not calls
    _step(case.model, case)
    assert calls


def test_differences_are_close_too() -> None:
    case = _wrapped("static graph")
    v = case.vector()
    expected = double_backward(case, v)
    estimate = approximate_hvp(case.closure, case.params, v)
    oracles.assert_same(estimate, expected, rtol=1e-7)
    _step(case.model, case)


def test_the_wrapped_module_is_taken_under_its_own_names() -> None:
    case = _wrapped("default")
    _, params = functional_loss(case.model, case.loss_fn)
    assert list(params) == [name for name, _ in case.truth.named_parameters()]


# Raised by torch's own FSDP for one process.
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
@every_entry
def test_a_fully_sharded_module_is_refused_and_still_trains(entry: str, kind: str) -> None:
    if kind == "fully_shard" and BEFORE_2_10:
        pytest.skip("fully_shard of torch 2.9 is refused with errors of its own")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = mlp()
    twin = copy.deepcopy(model)
    if kind == "fully_shard":
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model, mesh=mesh)
    else:
        model = fsdp.FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True
        )
    case = Case(model, F.cross_entropy, *classification())
    v = [torch.ones_like(p) for p in case.params]
    with pytest.raises(ArgumentError, match="fully sharded module"):
        ENTRIES[entry](case, v)
    case.closure().backward()
    F.cross_entropy(twin(case.x), case.y).backward()
    found = torch.cat([_whole(p.grad).reshape(-1) for p in case.params])
    oracles.assert_same(found, torch.cat([p.grad.reshape(-1) for p in twin.parameters()]))


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
