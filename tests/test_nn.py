"""`functional_loss` and `functional_model` against the modules that they are made from."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import functional_loss, functional_model, hvp
from tests import oracles, problems

WITH_MODULE = [n for n in problems.model_names() if problems.load(n).model is not None]


@pytest.mark.parametrize("name", [n for n in WITH_MODULE if n != "bfloat16"])
def test_the_loss_is_that_of_the_module(name: str) -> None:
    problem = problems.load(name)
    f, params = functional_loss(problem.model, problem.loss_fn)
    with oracles.untouched(problem.model), torch.no_grad():
        torch.manual_seed(1)
        expected = problem.loss_fn(problem.model(problem.args[0]), problem.args[1])
    torch.manual_seed(1)
    oracles.assert_same(f(params, *problem.args), expected, 1e-14)


@pytest.mark.parametrize("name", [n for n in WITH_MODULE if n != "bfloat16"])
def test_the_product_is_that_of_double_backward(name: str) -> None:
    problem = problems.load(name)
    f, params = functional_loss(problem.model, problem.loss_fn)
    v = oracles.random_like(params, 1)
    torch.manual_seed(5)
    hv = hvp(f)(params, v, *problem.args)
    torch.manual_seed(5)
    expected = oracles.hvp(problem.f, problem.params, v, *problem.args, model=problem.model)
    oracles.assert_same(hv, expected)


def test_the_model_function_returns_what_the_module_returns() -> None:
    problem = problems.load("tree_outputs")
    model_fn, params = functional_model(problem.model)
    outputs = model_fn(params, problem.args[0])
    expected = problem.model(problem.args[0])
    assert outputs["two"][1] is None
    torch.testing.assert_close(outputs["one"], expected["one"].detach(), rtol=0, atol=0)


def test_the_model_function_depends_on_the_parameters_it_is_given() -> None:
    model = nn.Linear(2, 1, bias=False)
    model_fn, _ = functional_model(model)
    x = torch.tensor([[1.0, 2.0]])
    assert float(model_fn({"weight": torch.tensor([[3.0, 4.0]])}, x)) == 11.0


# -------------------------------------------------------------------------------- which parameters


def test_the_names_are_those_of_named_parameters_in_their_order() -> None:
    model = problems.load("encoder_train").model
    _, params = functional_loss(model, F.mse_loss)
    assert list(params) == [name for name, _ in model.named_parameters()]


def test_parameters_are_detached_and_share_memory() -> None:
    model = nn.Linear(2, 2)
    _, params = functional_loss(model, F.mse_loss)
    assert not any(p.requires_grad for p in params.values())
    assert params["weight"].data_ptr() == model.weight.data_ptr()


def test_tied_parameters_appear_once() -> None:
    _, params = functional_loss(problems.load("tied_embeddings").model, F.cross_entropy)
    assert set(params) == {"embedding.weight", "mix.weight", "mix.bias"}


def test_both_uses_of_a_tied_parameter_follow_the_one_given() -> None:
    model = problems.load("tied_embeddings").model
    model_fn, params = functional_model(model)
    doubled = {**params, "embedding.weight": 2 * params["embedding.weight"]}
    tokens = torch.tensor([0, 3])
    w = doubled["embedding.weight"]
    expected = torch.tanh(model.mix(w[tokens])) @ w.T
    torch.testing.assert_close(model_fn(doubled, tokens), expected.detach())


def test_frozen_parameters_are_left_out_and_read_when_called() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.requires_grad_(False)
    model_fn, params = functional_model(model)
    assert list(params) == ["1.weight"]
    before = model_fn(params, torch.ones(1, 2))
    model[0].weight.mul_(2)
    torch.testing.assert_close(model_fn(params, torch.ones(1, 2)), 2 * before)


def test_a_parameter_that_the_model_does_not_use_is_there() -> None:
    _, params = functional_loss(problems.load("frozen_and_unused").model, F.mse_loss)
    assert "unused" in params
    assert "first.weight" not in params


# ------------------------------------------------------------------------------------------- state


def _batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_a_plain_evaluation_leaves_running_statistics_alone() -> None:
    model = _batch_norm()
    before = {k: b.clone() for k, b in model.named_buffers()}
    f, params = functional_loss(model, F.mse_loss)
    f(params, torch.randn(5, 3).double(), torch.zeros(5, 4).double())
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    assert int(model[1].num_batches_tracked) == 0


def test_buffers_are_read_when_called() -> None:
    model = _batch_norm().eval()
    model_fn, params = functional_model(model)
    x = torch.randn(5, 3).double()
    before = model_fn(params, x)
    model[1].running_mean.add_(1.0)
    after = model_fn(params, x)
    assert oracles.relative_error(after, before) > 1e-2
    torch.testing.assert_close(after, model(x).detach())


def test_training_and_evaluation_mode_are_read_when_called() -> None:
    model = _batch_norm()
    model_fn, params = functional_model(model)
    x = torch.randn(5, 3).double()
    training = model_fn(params, x)
    model.eval()
    torch.testing.assert_close(model_fn(params, x), model(x).detach())
    assert oracles.relative_error(model_fn(params, x), training) > 1e-2


class Remembers(nn.Module):
    """A module that keeps what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


def test_what_a_module_assigns_to_itself_is_put_back() -> None:
    model = Remembers()
    f, params = functional_loss(model, F.mse_loss)
    f(params, torch.ones(1, 2), torch.zeros(1, 2))
    hvp(f)(params, params, torch.ones(1, 2), torch.zeros(1, 2))
    assert model.last is None


def test_the_modules_own_parameters_are_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    f, params = functional_loss(model, F.mse_loss)
    with pytest.raises(RuntimeError):
        f(params, torch.ones(1, 3), torch.zeros(1, 2))
    assert model.weight is weight
    assert type(model.weight) is nn.Parameter


# ------------------------------------------------------------------------------------------ inputs


class Several(nn.Module):
    """A module of three inputs, one by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor | None = None, *, z: float = 0.0) -> Tensor:
        return self.a * x - (0 if y is None else y) + z


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.tensor(5.0), 10.0),
        ((torch.tensor(5.0),), 10.0),
        ((torch.tensor(5.0), torch.tensor(1.0)), 9.0),
        ({"x": torch.tensor(5.0), "z": 3.0}, 13.0),
        ({"y": torch.tensor(1.0), "x": torch.tensor(5.0)}, 9.0),
    ],
)
def test_a_tuple_is_spread_over_positions_and_a_mapping_over_keywords(
    inputs: Any, expected: float
) -> None:
    model_fn, params = functional_model(Several())
    assert float(model_fn(params, inputs)) == expected


# --------------------------------------------------------------------------------------- bad input

MAKERS = {
    "functional_loss": lambda model: functional_loss(model, F.mse_loss),
    "functional_model": functional_model,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_no_module_is_refused(maker: str) -> None:
    with pytest.raises(TypeError, match=f"^{maker}: model must be an nn.Module, got function"):
        MAKERS[maker](lambda x: x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("maker", MAKERS)
def test_a_script_module_is_refused(maker: str) -> None:
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(
        TypeError, match=f"^{maker}: .*ScriptModule.*nn.Module that it was made from"
    ):
        MAKERS[maker](scripted)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.ReLU(), "the model, ReLU, has no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), r"no parameter .*requires_grad_\(\)"),
    ],
    ids=["none", "frozen"],
)
def test_a_module_with_nothing_to_differentiate_is_refused(
    maker: str, model: nn.Module, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{maker}: {said}"):
        MAKERS[maker](model)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), F.mse_loss])
def test_a_model_in_the_place_of_its_loss_is_named(loss_fn: Any) -> None:
    with pytest.raises(
        TypeError, match=r"are swapped: Linear has the parameters\. Write \(Linear, "
    ):
        functional_loss(loss_fn, nn.Linear(2, 2))


def test_a_loss_with_parameters_of_its_own_is_taken() -> None:
    f, params = functional_loss(nn.Linear(2, 2), nn.Bilinear(2, 2, 1))
    assert list(params) == ["weight", "bias"]
    assert f(params, torch.ones(1, 2), torch.ones(1, 2)).shape == (1, 1)


def test_one_module_in_several_threads_gives_right_products_and_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    own = list(model.parameters())
    f, params = functional_loss(model, nn.functional.mse_loss)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    points = [{k: (1 + 0.1 * i) * p for k, p in params.items()} for i in range(4)]
    v = oracles.random_like(params, 1)
    product = hvp(f, mode="reverse_over_reverse")
    expected = [product(point, v, x, y) for point in points]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(25):
            found = product(points[i], v, x, y)
            if any(not torch.allclose(found[k], expected[i][k]) for k in found):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


def test_a_compiled_module_is_taken_as_the_module_in_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    compiled(x)
    f, params = functional_loss(compiled, nn.functional.mse_loss)
    g, plain = functional_loss(model, nn.functional.mse_loss)
    assert list(params) == list(plain)
    v = oracles.random_like(params, 2)
    oracles.assert_same(hvp(f)(params, v, x, y), oracles.hvp(g, plain, v, x, y))


def test_an_unknown_name_is_refused_and_a_missing_one_keeps_its_value() -> None:
    model = nn.Linear(3, 2).double()
    f, params = functional_loss(model, nn.functional.mse_loss)
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    misspelt = {"weigth": params["weight"], "bias": params["bias"]}
    with pytest.raises(
        ValueError, match=r"no free parameter of the model: 'weigth'.*'bias', 'weight'"
    ):
        f(misspelt, x, y)
    with pytest.raises(TypeError, match="params must be a dict by parameter name, got list"):
        f(list(params.values()), x, y)
    part = {"weight": params["weight"]}
    v = {"weight": torch.ones_like(params["weight"])}
    full = oracles.hvp(f, params, {**v, "bias": torch.zeros_like(params["bias"])}, x, y)
    oracles.assert_same(hvp(f)(part, v, x, y), {"weight": full["weight"]})
