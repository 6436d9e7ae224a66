"""Curvature along training: right numbers, a training that is not changed by a bit, a budget that is held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import Batches, CurvatureTracker, functional_loss, tree
from secorder_func import tracker as module
from tests.oracles import hessian as dense_hessian


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def plain(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def samples(count: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=generator).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


# ------------------------------------------------------------------------------- the numbers


def test_numbers_are_those_of_the_dense_hessian() -> None:
    model, (x, y) = plain(), samples(20, 4, torch.float64)
    tracker = CurvatureTracker(
        model,
        F.cross_entropy,
        (x, y),
        budget=None,
        every=1,
        num_probes=400,
        num_eigenvalues=2,
        direction="gradient",
    )
    record = tracker.step()
    assert record is not None
    f, params = functional_loss(model, F.cross_entropy)
    H = dense_hessian(lambda p: f(p, x, y), params)
    at = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss = f(at, x, y)
    names = sorted(at)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, [at[n] for n in names])])
    values = torch.linalg.eigvalsh(H).flip(0)[:2]
    assert record.loss == pytest.approx(float(loss.detach()))
    assert record.gradient_norm == pytest.approx(float(g.norm()))
    assert record.form == pytest.approx(float(g @ H @ g / (g @ g)))
    assert record.trace_error is not None
    assert abs(record.trace - float(H.trace())) < 5 * record.trace_error  # type: ignore[operator]
    assert record.eigenvalues == pytest.approx(values.tolist(), rel=1e-3)
    assert len(record.residuals) == 2


def test_batches_and_functions_are_tracked_alike() -> None:
    model, (x, y) = plain(), samples(20, 4, torch.float64)
    options: dict[str, Any] = {"budget": None, "num_probes": 4}
    whole = CurvatureTracker(model, F.cross_entropy, (x, y), **options).record()
    batches = Batches([(x[:13], y[:13]), (x[13:], y[13:])])
    parts = CurvatureTracker(model, F.cross_entropy, batches, **options).record()
    f, params = functional_loss(model, F.cross_entropy)
    function = CurvatureTracker.of_function(f, (x, y), **options).record(params)
    for other in (parts, function):
        assert other.loss == pytest.approx(whole.loss, rel=1e-10)
        assert other.trace == pytest.approx(whole.trace, rel=1e-10)
        assert other.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-3)


def test_probes_are_the_same_and_searches_go_on_from_the_last() -> None:
    model, (x, y) = plain(), samples(20, 4, torch.float64)
    products = []

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        products.append(1)
        return F.cross_entropy(outputs, targets)

    tracker = CurvatureTracker(model, counted, (x, y), budget=None, num_probes=4)
    first = tracker.record()
    again = tracker.record()
    assert again.trace == first.trace
    assert again.eigenvalues == pytest.approx(first.eigenvalues, rel=1e-4)
    other = CurvatureTracker(model, counted, (x, y), budget=None, num_probes=4, seed=1).record()
    assert other.trace != first.trace
    assert again.residuals[0] <= first.residuals[0] * 1.01


def test_a_direction_of_the_users() -> None:
    model, (x, y) = plain(), samples(20, 4, torch.float64)
    f, params = functional_loss(model, F.cross_entropy)
    H = dense_hessian(lambda p: f(p, x, y), params)
    one = torch.ones(H.shape[0]).double()
    tracker = CurvatureTracker(
        model,
        F.cross_entropy,
        (x, y),
        budget=None,
        num_eigenvalues=0,
        direction=lambda params: tree.map(torch.ones_like, params),
    )
    record = tracker.record()
    assert record.form == pytest.approx(float(one @ H @ one / len(one)))
    assert record.eigenvalues == []


# --------------------------------------------------------------- the training is not changed


def trained(kind: str, tracked: Callable[[nn.Module], CurvatureTracker | None]) -> list[Tensor]:
    """Train for some steps; return everything that a training leaves."""
    model = network()
    if kind == "frozen":
        model[0].weight.requires_grad_(False)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    if kind == "momentum":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "amp")
    tracker = tracked(model)
    torch.manual_seed(3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        for _ in range(3 if kind == "accumulation" else 1):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "amp"):
                loss = F.cross_entropy(model(x), y)
                if kind == "amp" and tracker is not None:
                    tracker.record()  # also where autocast is on
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if tracker is not None:
            tracker.step()
        losses.append(loss.detach())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.state_dict().values(), *state, *gradients, *losses, torch.get_rng_state()]


@pytest.mark.parametrize("kind", ["adam", "momentum", "accumulation", "amp", "frozen"])
def test_a_training_is_the_same_bit_for_bit(kind: str) -> None:
    data = samples(16, 6)
    trackers = []

    def tracked(model: nn.Module) -> CurvatureTracker:
        tracker = CurvatureTracker(
            model, F.cross_entropy, data, every=2, budget=None, num_probes=2, direction="gradient"
        )
        trackers.append(tracker)
        return tracker

    without = trained(kind, lambda model: None)
    found = trained(kind, tracked)
    assert len(without) == len(found)
    assert all(map(torch.equal, without, found))
    records = trackers[0].records
    assert len({record.loss for record in records}) > 3
    assert all(record.trace is not None and record.eigenvalues for record in records)


def test_a_record_inside_of_autocast_is_in_the_dtype_of_the_parameters() -> None:
    model, data = plain(torch.float32), samples(16, 4)
    tracker = CurvatureTracker(model, F.cross_entropy, data, budget=None)
    outside = tracker.record()
    with torch.autocast("cpu", torch.bfloat16):
        inside = tracker.record()
    assert inside.loss == outside.loss
    assert inside.trace == outside.trace


# ---------------------------------------------------------------------------------- budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_the_budget_is_held_from_the_second_record_on(
    budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return (x * p**2).sum()

    tracker = CurvatureTracker.of_function(loss, (torch.ones(2),), every=5, budget=budget)
    measured = tracker._measured

    def takes_three_seconds(f: Any, params: Any) -> dict[str, Any]:
        clock.now += 3.0
        return measured(f, params)

    monkeypatch.setattr(tracker, "_measured", takes_three_seconds)
    for _ in range(400):
        tracker.step(torch.ones(2))
        clock.now += 1.0
    first, *others = tracker.records
    assert first.step == 0
    assert len(others) > 3
    assert all(record.share <= budget + 1e-12 for record in others)
    assert all(record.cost == 3.0 for record in tracker.records)
    assert all(record.step % 5 == 0 for record in tracker.records)
    assert tracker.skipped + len(tracker.records) == 80
    assert tracker.share == pytest.approx(3 * len(tracker.records) / (clock.now - 100.0))
    # It uses most of what it is given.
    assert others[-1].share > 0.8 * budget


# --------------------------------------------------------------------------- files and states


def test_records_are_lines_of_json_that_can_be_read_while_they_are_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "folder" / "curvature.jsonl"
    model, data = plain(torch.float32), samples(16, 4)
    tracker = CurvatureTracker(model, F.cross_entropy, data, budget=None, every=1, path=path)
    for step in range(3):
        tracker.step(step=step)
        assert CurvatureTracker.read(path) == tracker.records
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert CurvatureTracker.read(path) == tracker.records
    path.write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no record"):
        CurvatureTracker.read(path)


def test_a_loss_that_is_not_finite_is_recorded_as_such(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return (x * p.log()).sum()

    tracker = CurvatureTracker.of_function(loss, (torch.ones(2),), budget=None, path=path)
    good = tracker.record(torch.ones(2))
    bad = tracker.record(torch.zeros(2))
    assert good.trace == pytest.approx(-2.0)
    assert bad.loss is None
    assert bad.trace is None
    assert "not finite" in str(bad.problem)
    assert CurvatureTracker.read(path)[1] == bad


def test_a_state_is_gone_on_from() -> None:
    model, data = plain(torch.float32), samples(16, 4)
    options: dict[str, Any] = {"budget": None, "every": 2, "num_probes": 2}
    tracker = CurvatureTracker(model, F.cross_entropy, data, **options)
    for _ in range(3):
        tracker.step()
    other = CurvatureTracker(model, F.cross_entropy, data, **options)
    other.load_state_dict(tracker.state_dict())
    assert other.records == tracker.records
    assert other.step() is None
    record, same = other.step(), [tracker.step(), tracker.step()][1]
    assert record is not None
    assert same is not None
    assert (record.step, record.trace) == (same.step, same.trace)
    assert record.eigenvalues == pytest.approx(same.eigenvalues, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda m, d: CurvatureTracker(m, F.cross_entropy, 3), "data must be a batch"),
        (lambda m, d: CurvatureTracker(m, F.cross_entropy, d, every=0), "every"),
        (lambda m, d: CurvatureTracker(m, F.cross_entropy, d, budget=-1.0), "budget"),
        (lambda m, d: CurvatureTracker(m, F.cross_entropy, d, num_probes=0), "num_probes"),
        (lambda m, d: CurvatureTracker(m, F.cross_entropy, d, direction="down"), "direction"),  # type: ignore[arg-type]
        (lambda m, d: CurvatureTracker(3, F.cross_entropy, d), "model must be an nn.Module"),  # type: ignore[arg-type]
        (
            lambda m, d: CurvatureTracker(m, F.cross_entropy, d).step(torch.ones(1)),
            "knows its model",
        ),
        (lambda m, d: CurvatureTracker.of_function(abs, d).step(), "params are missing"),
        (
            lambda m, d: CurvatureTracker(
                m, F.cross_entropy, d, direction=lambda p: torch.ones(1)
            ).step(),
            r"direction\(params\)",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        call(plain(torch.float32), samples(8, 4))


# -------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_training_by_lightning_is_tracked(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from secorder_func.lightning_callback import CurvatureCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, number: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(*samples(48, 6))

    def fit(tracked: bool) -> tuple[Classifier, CurvatureTracker | None]:
        classifier = Classifier()
        torch.manual_seed(5)
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        tracker = None
        callbacks = []
        if tracked:
            tracker = CurvatureTracker(
                classifier.model, F.cross_entropy, samples(16, 6), every=2, budget=None
            )
            callbacks = [CurvatureCallback(tracker)]
        trainer = lightning.Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            default_root_dir=tmp_path,
        )
        trainer.fit(classifier, loader)
        return classifier, tracker

    with_it, tracker = fit(True)
    without, _ = fit(False)
    pairs = zip(with_it.state_dict().values(), without.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert tracker is not None
    assert [record.step for record in tracker.records] == [0, 2, 4]
    assert all(record.trace is not None for record in tracker.records)
    callback = CurvatureCallback(tracker)
    other = CurvatureCallback(
        CurvatureTracker(with_it.model, F.cross_entropy, samples(16, 6), every=2)
    )
    other.load_state_dict(callback.state_dict())
    assert other.tracker.records == tracker.records
    with pytest.raises(TypeError, match="must be a CurvatureTracker, got int"):
        CurvatureCallback(3)
