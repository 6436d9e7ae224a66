"""The mistakes of newcomers: what `verify` and `report` say of what a user's function returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secorder_func import Batches, functional_loss, verify
from secorder_func.report.subject import Subject
from secorder_func.report.user import subject_of
from secorder_func.verify import command
from secorder_func.verify.target import TargetError

W = torch.ones(4)
X, Y = torch.ones(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def model() -> nn.Module:
    return nn.Linear(4, 3)


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=3)


def dicts(**tensors: Tensor) -> DataLoader[Any]:
    rows: Any = [{k: t[i] for k, t in tensors.items()} for i in range(len(X))]
    return DataLoader(rows, batch_size=3)


def by_verify(returned: Any, monkeypatch: pytest.MonkeyPatch) -> command.UserProblem:
    monkeypatch.setattr(command, "call_target", lambda target: returned)
    return command.load("m:f")


READABLE = {
    "dicts": (
        lambda: (model(), F.cross_entropy, dicts(x=X, label=Y)),
        "the batches are dicts with the keys 'x', 'label'. Give [(b[\"x\"], b[\"label\"]) for b in loader], "
        "or (f, params, loader) with f(params, batch)",
    ),
    "labels come first": (
        lambda: (model(), F.cross_entropy, dicts(labels=Y, ids=X, mask=X)),
        "the keys 'labels', 'ids', 'mask'. Give [(b[\"ids\"], b[\"labels\"]) for b in loader]",
    ),
    "one dict": (
        lambda: (model(), F.cross_entropy, {"x": X, "y": Y}),
        "the batch is a dict with the keys 'x', 'y'. Give (b[\"x\"], b[\"y\"])",
    ),
    "triplets": (
        lambda: (model(), nn.TripletMarginLoss(), loader(X, X, X)),
        "the batches have 3 parts. With a module they must be inputs and targets; inputs may be a tuple: "
        "((a, b), targets). For other losses give (f, params, batches) with f(params, *batch)",
    ),
    "three parts of one batch": (
        lambda: (model(), F.cross_entropy, X, X, Y),
        "the batch has 3 parts. With a module they must be inputs and targets",
    ),
    "no targets": (
        lambda: (model(), F.cross_entropy, X),
        "got one tensor: expected (model, loss_fn, inputs, targets)",
    ),
    "a list of both": (
        lambda: (model(), F.cross_entropy, [X, Y]),
        "must be inputs and targets. The first batch is one tensor; pass a tuple for one batch",
    ),
    "a data set": (
        lambda: (model(), F.cross_entropy, TensorDataset(X, Y)),
        "the data are a TensorDataset. Make batches of it: DataLoader(dataset, batch_size=...)",
    ),
    "an iterator": (
        lambda: (model(), F.cross_entropy, iter(loader(X, Y))),
        "which can be read once. Pass a list, or the DataLoader itself",
    ),
    "no batches": (lambda: (model(), F.cross_entropy, []), "there are no batches"),
    "swapped": (
        lambda: (nn.CrossEntropyLoss(), model(), loader(X, Y)),
        "the model and the loss function are swapped: Linear has the parameters. "
        "Write (Linear, CrossEntropyLoss)",
    ),
    "swapped with a function": (
        lambda: (F.cross_entropy, model(), loader(X, Y)),
        "the second item is the module Linear. A model comes first",
    ),
    "without parameters": (
        lambda: (nn.ReLU(), F.cross_entropy, loader(X, Y)),
        "the model, ReLU, has no parameters",
    ),
    "no loss, a loader": (
        lambda: (model(), loader(X, Y)),
        "the loss function is missing: expected (model, loss_fn, batches), got (Linear, DataLoader)",
    ),
    "no loss, tensors": (lambda: (model(), X, Y), "the loss function is missing"),
    "no data": (
        lambda: (model(), F.cross_entropy),
        "the data are missing: expected (model, loss_fn, batches), got (Linear, function)",
    ),
    "the name of a loss": (
        lambda: (model(), "mse", loader(X, Y)),
        "the second item must be a loss function, got str",
    ),
    "the class of a loss": (
        lambda: (model(), nn.MSELoss, loader(X, Y)),
        "the loss function is the class MSELoss. Make one of it: MSELoss()",
    ),
    "the class of a model": (
        lambda: (nn.Linear, F.cross_entropy, loader(X, Y)),
        "the model is the class Linear. Make one of it: Linear(...)",
    ),
    "parameters of a module": (
        lambda: (lambda p, x: x.sum(), model().parameters(), X),
        "the parameters are a generator, which can be read once. Give dict(model.named_parameters())",
    ),
    "no parameters": (
        lambda: (lambda p, x: x.sum(), loader(X)),
        "the parameters are missing: expected (f, params, batches), got a DataLoader second",
    ),
    "nothing": (lambda: None, "expected (f, params, batches) or (model, loss_fn, batches), got no"),
}


@pytest.mark.parametrize(("returned", "said"), READABLE.values(), ids=list(READABLE))
def test_what_cannot_be_read_is_said_by_both_commands(
    returned: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match=re.escape(said)):
        by_verify(returned(), monkeypatch)
    with pytest.raises(TargetError, match=re.escape(said)):
        subject_of(returned(), "t")


class Outputs(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


def _on_meta() -> tuple[Any, ...]:
    return model(), F.cross_entropy, X.to("meta"), Y


RAISING = {
    "float labels": (
        lambda: (model(), F.cross_entropy, X, Y.float()),
        ("targets are float32, class numbers must be int64", "Use targets.long()."),
    ),
    "int labels": (
        lambda: (model(), F.cross_entropy, X, Y.int()),
        ("targets are int32, class numbers must be int64", "Use targets.long()."),
    ),
    "whole numbers for floats": (
        lambda: (nn.Linear(4, 1), F.binary_cross_entropy_with_logits, X, (Y > 0).long()[:, None]),
        ("targets are int64, the parameters float32", "Use targets.float()."),
    ),
    "double inputs": (
        lambda: (model(), F.cross_entropy, X.double(), Y),
        ("inputs are float64, the parameters float32", "Use inputs.float(), or model.double()."),
    ),
    "whole inputs": (
        lambda: (model(), F.cross_entropy, X.long(), Y),
        ("inputs are int64, the parameters float32", "Use inputs.float()."),
    ),
    "float indices": (
        lambda: (nn.Embedding(4, 3), F.cross_entropy, Y.float(), Y),
        ("inputs are float32, indices must be int64", "Use inputs.long()."),
    ),
    "names of a loss": (
        lambda: (lambda w, x, y: (x @ w - y).square().mean(), torch.ones(4), X.double(), Y),
        ("x are float64, the parameters float32", "Use x.float()"),
    ),
    "another device": (
        _on_meta,
        ("inputs are on meta, the parameters on cpu", "the meta device has no numbers"),
    ),
    "too few outputs": (
        lambda: (model(), F.cross_entropy, X, Y + 1),
        ("a class number is 3: they count from 0", "Give the last layer an output for each class"),
    ),
    "a tuple": (
        lambda: (Outputs(lambda o: (o, o)), F.cross_entropy, X, Y),
        ("the model returns a tuple", "lambda outputs, targets: loss_fn(outputs[0], targets)"),
    ),
    "a dict": (
        lambda: (Outputs(lambda o: {"logits": o}), nn.CrossEntropyLoss(), X, Y),
        ("the model returns a dict", 'loss_fn(outputs["logits"], targets)'),
    ),
    "arrays": (
        lambda: (model(), F.cross_entropy, X.numpy(), Y.numpy()),
        ("the data are NumPy arrays", "Pass torch.from_numpy(x)."),
    ),
    "a batch that is not spread": (
        lambda: (lambda w, x, y: (x @ w - y).square().mean(), torch.ones(4), [{"x": X}]),
        ("the batch is one argument, a dict", "Pass its parts: f(params, x, y)."),
    ),
}


@pytest.mark.parametrize(("returned", "said"), RAISING.values(), ids=list(RAISING))
def test_the_cause_of_an_error_of_the_loss_is_said_by_both_commands(
    returned: Callable[[], Any], said: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = by_verify(returned(), monkeypatch)
    check = verify(problem.f, problem.params, *problem.args)["loss"]
    assert check.passed is False
    assert said[0] in check.causes[0].what
    assert said[1] in check.causes[0].mend
    with pytest.raises(TargetError, match=r"raises .*\. Likely cause: ") as raised:
        subject_of(returned(), "t")
    assert all(words in str(raised.value) for words in said)


def test_an_error_that_says_enough_has_no_cause() -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        raise RuntimeError("mine")

    assert verify(f, torch.ones(3), X)["loss"].causes == ()
    with pytest.raises(TargetError) as raised:
        subject_of((f, torch.ones(3), X), "t")
    assert "cause" not in str(raised.value)


# ------------------------------------------------------------------- what only a report refuses


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            lambda: (nn.Linear(4, 1), F.mse_loss, X, X[:, 0]),
            r"outputs of shape \(6, 1\) and targets of shape \(6,\) to \(6, 6\).*targets.unsqueeze",
        ),
        (
            lambda: (model(), lambda o, y: (o.argmax(1) == y).sum(), X, Y),
            "real and floating, got torch.int64. Likely cause: the loss is a count",
        ),
        (lambda: (model(), _accuracy, X, Y), "does not depend on any parameter.*argmax has no der"),
        (
            lambda: (model(), F.cross_entropy, X / 0, Y),
            "is nan. Likely cause: .*infinity in inputs",
        ),
    ],
    ids=["broadcast", "count", "accuracy", "nan"],
)
def test_a_loss_of_which_there_is_nothing_to_report_is_refused(
    returned: Callable[[], Any], said: str
) -> None:
    with pytest.raises(TargetError, match=said):
        subject_of(returned(), "t")


def test_data_of_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        x = torch.ones(6, 4)
    assert subject_of((model(), F.cross_entropy, x, Y), "t").num_samples == 6


def _summed(data: Any) -> Subject:
    return subject_of((model(), nn.CrossEntropyLoss(reduction="sum"), data), "t")


def test_a_sum_over_a_loader_is_refused_with_what_takes_the_place_of_the_loader() -> None:
    said = (
        r"give Batches\(loader, reduction='sum'\) in place of the loader; if .* Batches\(loader, w"
    )
    with pytest.raises(ValueError, match=said):
        _summed(loader(X, Y)).loss_and_gradient()
    _summed(Batches(loader(X, Y), reduction="sum")).loss_and_gradient()


@pytest.mark.parametrize(
    ("module", "fact"),
    [
        (nn.Sequential(model(), nn.Dropout()), "training mode (dropout is active)"),
        (nn.Sequential(model(), nn.Dropout()).eval(), "evaluation mode"),
        (model(), "training mode"),
    ],
    ids=["dropout", "eval", "no difference"],
)
def test_the_headline_says_what_training_mode_changes(module: nn.Module, fact: str) -> None:
    assert subject_of((module, F.cross_entropy, X, Y), "t").facts == (fact,)


def _needs_two(p: Any, q: Any) -> Any:
    return p * q


NEAR_MISSES = {
    "an argument is missing further in": lambda: (lambda p, x: _needs_two(p), W, [(X,)]),  # type: ignore[call-arg]
    "a method of parameters in a list": lambda: (lambda p, x: p.sum(), [W], [(X,)]),
    "an attribute of parameters in a dict": lambda: (lambda p, x: p.w.sum(), {"w": W}, [(X,)]),
    "an error of the loss itself": lambda: (_refuses, W, [X, X]),
}


def _refuses(p: Any, x: Any) -> Any:
    raise ValueError("temperature must be positive")


@pytest.mark.parametrize("returned", NEAR_MISSES.values(), ids=list(NEAR_MISSES))
def test_no_cause_is_named_that_is_not_there(
    returned: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = by_verify(returned(), monkeypatch)
    assert verify(problem.f, problem.params, *problem.args)["loss"].causes == ()
    with pytest.raises(TargetError) as caught:
        subject_of(returned(), "a near miss")
    assert "Likely cause" not in str(caught.value)
    assert "one tensor" not in str(caught.value)


def test_a_label_below_zero_is_not_taken_for_too_few_outputs() -> None:
    f, params = functional_loss(nn.Linear(3, 2), nn.CrossEntropyLoss())
    check = verify(f, params, torch.randn(4, 3), torch.tensor([0, 1, -1, 0]))["loss"]
    assert "-1: they count from 0" in check.causes[0].what
    assert "ignore_index" in check.causes[0].mend


def test_looking_at_the_first_batch_changes_neither_buffers_nor_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def f(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    state = torch.get_rng_state()
    subject_of((f, dict(model.named_parameters()), (X, Y)), "a module within a function")
    assert bool((torch.get_rng_state() == state).all())
    assert all(bool((t == before[name]).all()) for name, t in model.state_dict().items())
