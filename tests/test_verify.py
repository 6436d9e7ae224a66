"""`verify` on good problems, which must raise no alarm, and on broken ones, whose cause it must name."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from secorder_func import Verification, functional_loss, verify
from secorder_func.errors import ArgumentError, ArgumentTypeError, VerificationError
from secorder_func.verify import Check
from tests import problems
from tests.broken import ConstantBackward, NoField, OldStyle, WrongBackward, WrongJvp
from tests.versions import BEFORE_2_10

P = torch.tensor([1.2, -0.7, 0.4, 2.1, -1.5], dtype=torch.float64)


def failures(result: Verification) -> list[str]:
    return [check.name for check in result.failed]


def causes(check: Check) -> str:
    return "\n".join(cause.what for cause in check.causes)


# ------------------------------------------------------------------------------ no false alarms


@pytest.mark.parametrize("name", problems.BUILDERS)
def test_a_good_problem_raises_no_alarm_and_leaves_nothing_undecided(name: str) -> None:
    problem = problems.load(name)
    result = verify(problem.f, problem.params, *problem.args)
    assert result.ok, str(result)
    assert result["gradient by differences"].passed
    assert result["product by differences"].passed
    assert result["symmetry"].passed


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


# An LSTM has no exact product in float32 on the CPU: oneDNN's kernel has no second derivative.
MODULES = [n for n in problems.BUILDERS if problems.load(n).model is not None and n != "lstm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_coarse_dtypes_raise_no_alarm(name: str, dtype: torch.dtype) -> None:
    problem = problems.load(name)
    model = copy.deepcopy(problem.model).to(dtype)  # type: ignore[union-attr]
    f, params = functional_loss(model, problem.loss_fn)  # type: ignore[arg-type]
    result = verify(f, params, *_cast(problem.args, dtype))
    assert result.ok, str(result)
    assert result["product by differences"].passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_network_with_kinks_raises_no_alarm(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3), nn.Flatten()
    )
    model.append(nn.Linear(8 * 36, 5)).to(dtype)
    f, params = functional_loss(model, F.cross_entropy)
    x, y = torch.randn(32, 1, 14, 14, dtype=dtype), torch.randint(5, (32,))
    result = verify(f, params, x, y)
    assert result.ok, str(result)
    assert result["product by differences"].passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_of_an_input_that_is_not_contiguous_raises_no_alarm(dtype: torch.dtype) -> None:
    # From one state plain autograd and transforms draw different masks here.
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True, dtype=dtype)
    f, params = functional_loss(layer, F.mse_loss)
    x, y = torch.randn(2, 4, 5, 8, dtype=dtype).unbind()
    result = verify(f, params, x, y)
    assert result.ok, str(result)
    assert result["product by differences"].passed


def test_autocast_raises_no_alarm() -> None:
    w, x = torch.randn(20, 10), torch.randn(16, 20)

    def f(w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.tanh(x @ w).square().mean()

    result = verify(f, w)
    assert result.ok, str(result)
    assert result["agreement of modes"].tolerance == torch.finfo(torch.bfloat16).eps ** 0.5


def test_a_flat_point_raises_no_alarm() -> None:
    result = verify(lambda p: (p**4).sum(), torch.zeros(3))
    assert result.ok
    assert result["product by differences"].passed
    assert result["dependence"].finding == "used, with zero gradient and product: params"


def test_a_loss_that_bends_sharply_raises_no_alarm() -> None:
    assert verify(lambda p: torch.sin(1e6 * p).sum(), P).ok
    assert verify(lambda p: torch.sin(1e4 * p).sum(), P.float()).ok


def test_a_loss_that_rounds_more_than_its_dtype_is_left_undecided() -> None:
    result = verify(lambda p: ((p + 1e8) - 1e8).square().sum(), P)
    assert result.ok
    assert result["product by differences"].passed is None
    assert "2 could not decide" in str(result)


def test_a_float32_loss_close_to_a_kink_is_decided_in_float64() -> None:
    result = verify(lambda p: (p.relu() + p**2).sum(), torch.tensor([1e-8, 1.0, 2.0]))
    assert result["product by differences"].passed
    assert "float64" in result["product by differences"].finding


def test_a_loss_that_ends_nearby_raises_no_alarm() -> None:
    def f(p: Tensor) -> Tensor:
        if bool((p.detach() < 0.9999999).any()):
            raise ValueError("out of the domain")
        return (p**3).sum()

    assert verify(f, torch.ones(2, dtype=torch.float64)).ok


def test_keyword_arguments_reach_the_loss() -> None:
    assert verify(lambda p, *, power: (p.abs() ** power).sum(), P, power=3.0)["loss"].passed


# ------------------------------------------------------------------------------------ the value


def test_an_error_of_the_loss_is_quoted_with_its_place() -> None:
    def broken_loss(p: Tensor, x: Tensor) -> Tensor:
        return (x @ p).sum()

    result = verify(broken_loss, P, torch.zeros(3, 4, dtype=torch.float64))
    assert failures(result) == ["loss"]
    finding = result["loss"].finding
    assert finding.startswith("RuntimeError: size mismatch")
    assert "in broken_loss, test_verify.py line" in finding


@pytest.mark.parametrize(
    ("f", "cause"),
    [
        (lambda p: p**2, "not reduced"),
        (lambda p: (p**2).sum().item(), "converted to a number"),
        (lambda p: ((p**2).sum(), 3), "more than the loss"),
        (lambda p: (p > 0).sum(), "a count or a truth value"),
        (lambda p: p.mul_(0.5).sum(), "changes its own parameters"),
        (lambda p: p.data.mul_(0.5).sum(), "changes its own parameters"),
    ],
    ids=["vector", "number", "tuple", "count", "writes", "writes to data"],
)
def test_a_loss_that_is_not_one_number_of_its_parameters(f: Callable[..., Any], cause: str) -> None:
    before = P.clone()
    result = verify(f, P)
    assert failures(result) == ["loss"]
    assert cause in causes(result["loss"])
    assert torch.equal(P, before)


def test_a_complex_loss_is_refused_with_the_mend() -> None:
    assert "Take .real or .abs()" in verify(lambda p: (1j * p).sum(), P)["loss"].finding


def test_the_function_that_makes_the_first_nan_is_named() -> None:
    result = verify(lambda p: p.log().exp().sum(), P)
    assert result["loss"].finding == "the loss is nan"
    assert causes(result["loss"]).startswith("log is the first function")


def test_parameters_and_arguments_with_nan_are_named() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert "params['w']" in causes(verify(lambda p: p["w"].sum(), {"w": bad})["loss"])
    assert "infinity in x" in causes(verify(lambda p, x: (p * x).sum(), torch.ones(2), bad)["loss"])
    assert "args[0]" in causes(verify(lambda p, *a: (p * a[0]).sum(), torch.ones(2), bad)["loss"])


# ----------------------------------------------------------------------------- shapes and mode


@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.l1_loss, nn.SmoothL1Loss(), nn.HuberLoss()])
def test_outputs_that_are_compared_with_all_targets_are_named(loss_fn: Any) -> None:
    f, params = functional_loss(nn.Linear(3, 1).double(), loss_fn)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = verify(f, params, x, x[:, 0])
    assert failures(result) == ["shapes"]
    finding = "the loss broadcasts outputs of shape (5, 1) and targets of shape (5,) to (5, 5)"
    assert result["shapes"].finding == finding
    assert result["product by differences"].passed


@pytest.mark.parametrize(
    ("outputs", "targets", "mend"),
    [
        ((5, 1), (5,), "targets.unsqueeze(1)"),
        ((5,), (5, 1), "targets.squeeze(1)"),
        ((5, 1), (1, 5), "targets.view_as(outputs)"),
        ((5, 1), (3,), "targets of the shape of the outputs"),
    ],
)
def test_the_mend_of_shapes_gives_targets_the_shape_of_outputs(
    outputs: tuple[int, ...], targets: tuple[int, ...], mend: str
) -> None:
    p, y = torch.arange(5.0).double().reshape(outputs), torch.ones(targets).double()
    (cause,) = verify(F.mse_loss, p, y)["shapes"].causes
    assert cause.mend == f"Use {mend}."


def test_pairs_that_are_meant_are_no_failure() -> None:
    codes = torch.linspace(-1, 1, 3).double()

    def nearest(p: Tensor) -> Tensor:
        return F.mse_loss(p[:, None], codes[None], reduction="none").min(1).values.mean()

    def all_pairs(p: Tensor) -> Tensor:
        return F.mse_loss(p[:, None], codes[None])

    for f in (nearest, all_pairs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            assert verify(f, P).ok


def test_a_target_for_all_outputs_is_no_failure() -> None:
    result = verify(lambda p: F.mse_loss(p, torch.zeros((), dtype=p.dtype)), P)
    assert result.ok
    assert result["shapes"].passed is None
    assert result["shapes"].finding.endswith("targets of shape () to (5,)")


DROPOUT, NORM = "dropout is active", "BatchNorm uses the statistics of each batch"


@pytest.mark.parametrize(
    ("layer", "effects"),
    [
        (nn.Dropout(0.5), DROPOUT),
        (nn.BatchNorm1d(4), NORM),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1)), f"{DROPOUT}, {NORM}"),
        (nn.MultiheadAttention(4, 1, dropout=0.1), DROPOUT),
    ],
    ids=["dropout", "norm", "both", "attention"],
)
def test_training_mode_is_noted_where_it_makes_a_difference(layer: nn.Module, effects: str) -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        assert isinstance(layer, nn.Module)
        return (x @ p).square().mean()

    args = torch.ones(4), torch.ones(5, 4)
    noted = (
        f"the model is in training mode: {effects}. model.eval() gives the function that predicts"
    )
    assert verify(f, *args)["mode"].finding == noted
    assert verify(f, *args).ok
    layer.eval()
    assert "mode" not in [check.name for check in verify(f, *args).checks]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(3, 4), nn.Dropout(0.0), nn.BatchNorm1d(4, track_running_stats=False)],
    ids=["linear", "dropout of nothing", "norm without statistics"],
)
def test_training_mode_is_not_noted_where_it_makes_none(layer: nn.Module) -> None:
    result = verify(lambda p: (p**3).sum() * isinstance(layer, nn.Module), P)
    assert "mode" not in [check.name for check in result.checks]


# -------------------------------------------------------------------------------- repeatability


def _counter() -> Callable[[Tensor], Tensor]:
    count = 0

    def f(p: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return count * (p**2).sum()

    return f


class Counts:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, p: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * (p**2).sum()


def _with_generator() -> Callable[[Tensor], Tensor]:
    own = torch.Generator().manual_seed(1)
    return lambda p: (p**2 * torch.rand(5, dtype=p.dtype, generator=own)).sum()


def _with_iterator() -> Callable[[Tensor], Tensor]:
    batches = iter([P, 2 * P, 3 * P])
    return lambda p: (p * next(batches)).sum()


def _exhausted() -> Callable[[Tensor], Tensor]:
    batches = iter([P])
    return lambda p: (p * next(batches)).sum()


def _with_numpy_generator() -> Callable[[Tensor], Tensor]:
    rng = np.random.default_rng(0)
    return lambda p: (p**2).sum() * rng.random()


@pytest.mark.parametrize(
    ("f", "cause"),
    [
        (_counter(), "count went from 0 to 1"),
        (Counts(), "calls went from 0 to 1"),
        (_with_iterator(), "an iterator, batches"),
        (_exhausted(), "an iterator, batches"),
        (_with_generator(), "the torch.Generator own"),
        (_with_numpy_generator(), "the numpy.random.Generator rng"),
        (lambda p: (p**2).sum() * np.random.rand(), "numpy.random"),
        (lambda p: (p**2).sum() * random.random(), "Python's random module"),
    ],
    ids=["count", "object", "iterator", "end", "generator", "rng", "numpy", "random"],
)
def test_hidden_state_is_found_and_named(f: Callable[[Tensor], Tensor], cause: str) -> None:
    result = verify(f, P)
    assert failures(result) == ["repeatable"]
    assert cause in causes(result["repeatable"])


def test_rounding_of_a_kernel_is_no_failure() -> None:
    signs = iter([1, -1] * 1000)
    result = verify(lambda p: (p**2).sum() * (1 + next(signs) * 2**-52), P)
    assert result["repeatable"].passed
    assert "to rounding" in result["repeatable"].finding


def test_whether_random_numbers_are_drawn_is_said() -> None:
    assert verify(lambda p: (p**2).sum(), P)["random numbers"].finding == "none drawn"
    dropped = verify(lambda p: F.dropout(p**2).sum(), P)
    assert dropped.ok
    assert dropped["random numbers"].finding.startswith("drawn: ")
    unused = verify(lambda p: (p**2).sum() + 0 * torch.rand(()), P)
    assert "does not depend on them" in unused["random numbers"].finding


# ----------------------------------------------------------------------------- wrong derivatives


def test_a_wrong_backward_shows_at_first_order() -> None:
    result = verify(lambda p: WrongBackward.apply(p.sin()).sum(), P)
    assert failures(result) == ["gradient by differences"]
    # 3x in the place of 2x is off by a third of itself.
    assert result["gradient by differences"].measured == pytest.approx(1 / 3, rel=1e-3)
    assert "WrongBackward is not the derivative" in causes(result["gradient by differences"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_backward_is_found_in_coarse_dtypes(dtype: torch.dtype) -> None:
    result = verify(lambda p: WrongBackward.apply(p.sin()).sum(), P.to(dtype))
    assert failures(result) == ["gradient by differences"]


def test_a_gradient_of_no_function_makes_the_product_asymmetric() -> None:
    result = verify(NoField.apply, P)
    assert {"gradient by differences", "symmetry"} <= set(failures(result))
    assert "NoField is not the derivative of any function" in causes(result["symmetry"])


def test_a_backward_of_constants_shows_at_second_order_only() -> None:
    result = verify(lambda p: (ConstantBackward.apply(p) ** 2).sum(), P)
    assert failures(result) == ["product by differences"]
    assert "ConstantBackward is right, but its own" in causes(result["product by differences"])
    # Of d²(e^2x) = 4 e^2x the half that differentiates the backward is missing.
    assert result["product by differences"].measured == pytest.approx(0.5, rel=1e-3)


def test_modes_that_disagree_are_compared_with_differences() -> None:
    result = verify(lambda p: WrongJvp.apply(p).sum(), P)
    assert failures(result) == ["agreement of modes"]
    assert result["agreement of modes"].measured == pytest.approx(1 / 6, rel=1e-3)
    assert "side with reverse_over_reverse" in causes(result["agreement of modes"])


def test_a_function_without_second_derivative_is_named_with_the_reason() -> None:
    result = verify(lambda p: OldStyle.apply(p).sum(), P)
    assert failures(result) == ["exact modes"]
    assert "OldStyle" in causes(result["exact modes"])
    assert result["gradient by differences"].passed


@pytest.mark.skipif(BEFORE_2_10, reason="grid_sample is differentiated once before torch 2.10")
def test_a_mode_that_is_not_possible_is_no_failure() -> None:
    def f(p: Tensor) -> Tensor:
        image, middle = (p**3).reshape(1, 1, 2, 2), torch.zeros(1, 1, 1, 2, dtype=p.dtype)
        return F.grid_sample(image, middle, align_corners=False).sum()

    result = verify(f, P[:4])
    assert result.ok, str(result)
    assert "not forward_over_reverse: " in result["exact modes"].finding
    assert result["product by differences"].passed


# ---------------------------------------------------------------- kinks, and what holds constant


def test_parameters_on_a_kink_are_named() -> None:
    p = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    result = verify(lambda p: (p.relu() + p**2).sum(), p)
    assert failures(result) == ["gradient by differences", "product by differences"]
    assert "on a kink of the loss (relu)" in causes(result["gradient by differences"])
    assert "grow without bound" in result["product by differences"].finding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_detach_is_shown_by_experiment(dtype: torch.dtype) -> None:
    result = verify(lambda p: (p * p.detach()).sum() + (p**3).sum(), P.to(dtype))
    assert "gradient by differences" in failures(result)
    text = causes(result["gradient by differences"])
    assert "detach() in the loss: with nothing held constant the two agree" in text


def test_data_and_no_grad_are_shown_by_experiment() -> None:
    def target(p: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(p)

    by_block = verify(lambda p: (p.sin() - target(p)).square().sum(), P)
    assert "no_grad in the loss" in causes(by_block["gradient by differences"])
    by_data = verify(lambda p: (p.sin() - p.data).square().sum(), P)
    assert ".data in the loss" in causes(by_data["gradient by differences"])


def test_detach_of_what_is_constant_anyway_is_not_blamed() -> None:
    x = P.clone()
    result = verify(lambda p: WrongBackward.apply(p * x.detach()).sum(), P)
    text = causes(result["gradient by differences"])
    assert "WrongBackward" in text
    assert "detach" not in text


def test_a_number_taken_from_the_parameters_is_named() -> None:
    result = verify(lambda p: (p**2).sum() * p.sum().item(), P)
    assert ".item()" in causes(result["gradient by differences"])


def test_a_loss_that_jumps_is_named() -> None:
    p = torch.tensor([0.5, 1.2], dtype=torch.float64)
    result = verify(lambda p: p.round().sum() + (p**2).sum(), p)
    assert "jumps at these parameters: round" in causes(result["gradient by differences"])


def test_a_product_lost_to_rounding_is_named() -> None:
    result = verify(lambda p: (((p.exp() + 2e4) - 2e4) * p).sum().square(), P.float())
    assert result["loss"].passed
    assert "float64" in str(result)


# ------------------------------------------------------------------------ NaN in the derivatives


def test_a_gradient_that_is_not_finite_is_named_by_leaf_and_function() -> None:
    params = {"a": torch.zeros(2), "b": torch.ones(2)}
    result = verify(lambda p: (p["a"] ** 2).sum().sqrt() + p["b"].sum(), params)
    assert failures(result) == ["gradient"]
    assert result["gradient"].finding == "not finite at ['a']"
    assert "derivative of pow" in causes(result["gradient"])


def test_a_product_that_is_not_finite_is_named_by_leaf() -> None:
    params = {"a": torch.zeros(2), "b": torch.ones(2)}
    result = verify(lambda p: (p["a"].abs() ** 1.5).sum() + (p["b"] ** 2).sum(), params)
    assert failures(result) == ["product"]
    assert result["product"].finding.endswith("is not finite at ['a']")


# --------------------------------------------------------------------------- unused parameters


def test_unused_parameters_are_information() -> None:
    result = verify(lambda p: (p["used"] ** 2).sum(), {"used": P, "other": P, "spare": P})
    assert result.ok
    assert result["dependence"].passed is None
    assert result["dependence"].finding == "not used: ['other'] and ['spare']"


def test_a_parameter_in_use_without_effect_is_told_apart() -> None:
    params = {"dead": torch.tensor([-1.0]), "live": torch.tensor([1.0])}
    result = verify(lambda p: (p["dead"].relu() + p["live"] ** 2).sum(), params)
    assert result["dependence"].finding == "used, with zero gradient and product: ['dead']"


def test_a_loss_of_captured_parameters_fails() -> None:
    model = nn.Linear(3, 2)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = verify(lambda p, x: model(x).square().sum(), params, torch.ones(4, 3))
    assert failures(result) == ["dependence"]
    assert "captures" in causes(result["dependence"])


@pytest.mark.parametrize(
    ("count", "function"),
    [
        (lambda out, y: out.argmax(1) == y, "argmax"),
        (lambda out, y: out.max(1)[1] == y, "max"),
        (lambda out, y: (out > 0).any(1) == y, "gt"),
    ],
    ids=["argmax", "max", "comparison"],
)
def test_an_accuracy_for_a_loss_is_told_from_captured_parameters(
    count: Callable[[Tensor, Tensor], Tensor], function: str
) -> None:
    f, params = functional_loss(nn.Linear(3, 2), lambda o, y: count(o, y).float().mean())
    result = verify(f, params, torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    assert failures(result) == ["dependence"]
    text = causes(result["dependence"])
    assert text == (
        f"the loss does not depend differentiably on its parameters: {function} has no derivative"
    )


# ---------------------------------------------------------------------------- what is left behind


def test_parameters_grads_buffers_and_modes_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    params = dict(model.named_parameters())

    def f(params: Any, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().mean()

    result = verify(f, params, torch.randn(8, 3))
    assert result.ok, str(result)
    assert "3 buffers" in result["state"].finding
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())  # type: ignore[union-attr]


def test_a_write_that_torch_does_not_see_is_found_and_undone() -> None:
    model = nn.BatchNorm1d(3)
    view = model.running_mean.numpy()  # type: ignore[union-attr]

    def f(p: Tensor) -> Tensor:
        assert isinstance(model, nn.Module)
        view[0] += 1
        return (p**3).sum()

    result = verify(f, P)
    assert failures(result) == ["state"]
    assert "the buffer running_mean of model" in result["state"].finding
    assert float(model.running_mean[0]) == 0.0  # type: ignore[index]


def test_a_log_that_grows_is_mentioned() -> None:
    log: list[int] = []

    def f(p: Tensor) -> Tensor:
        log.append(1)
        return (p**3).sum()

    result = verify(f, P)
    assert result.ok
    assert "len(log) went from 0 to" in result["state"].finding


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: torch.rand(()) + random.random(),
    ],
    ids=["torch", "random", "numpy", "both"],
)
def test_generators_are_left_as_one_evaluation_leaves_them(draw: Callable[[], Any]) -> None:
    def f(p: Tensor) -> Tensor:
        return (p**2).sum() * draw()

    def after(run: Callable[[], Any]) -> tuple[float, float, float]:
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        run()
        return float(torch.rand(())), random.random(), float(np.random.rand())

    assert after(lambda: verify(f, P)) == after(lambda: f(P))


def test_the_report_is_the_same_every_time() -> None:
    problem = problems.load("mlp_tanh")
    first, second = (str(verify(problem.f, problem.params, *problem.args)) for _ in range(2))
    assert first == second


def test_it_works_in_no_grad_and_in_inference_mode() -> None:
    with torch.no_grad():
        assert verify(lambda p: (p**3).sum(), P)["product by differences"].passed
    with torch.inference_mode():
        result = verify(lambda p: (p**3).sum(), torch.ones(2, dtype=torch.float64))
    assert result["product by differences"].passed


# ------------------------------------------------------------------------------------ the result


def test_a_result_is_true_exactly_where_no_check_failed() -> None:
    assert verify(lambda p: (p**3).sum(), P)
    assert not verify(lambda p: p**3, P)


def test_a_failure_raises_the_report() -> None:
    verify(lambda p: (p**3).sum(), P).raise_if_failed()
    result = verify(lambda p: p.log().sum(), P)
    with pytest.raises(VerificationError, match=r"1 of 2 checks failed: loss\.") as raised:
        result.raise_if_failed()
    assert str(raised.value) == str(result)


def test_a_check_is_found_by_name() -> None:
    result = verify(lambda p: (p**3).sum(), P)
    assert result["loss"] is result.checks[0]
    with pytest.raises(KeyError, match="no check 'los' among"):
        result["los"]


def test_the_report_has_a_line_for_each_check_and_fits_a_terminal() -> None:
    result = verify(NoField.apply, P)
    lines = str(result).splitlines()
    assert max(len(line) for line in lines) <= 100
    starts = ("  ok ", "  note ", "  FAILED ")
    assert sum(line.startswith(starts) for line in lines) == len(result.checks)
    assert sum(line.startswith("          cause") for line in lines) == sum(
        len(check.causes) for check in result.checks
    )


def test_a_tolerance_of_the_user_is_used() -> None:
    result = verify(lambda p: (p**3).sum(), P, rtol=1e-6)
    assert result["symmetry"].tolerance == 1e-6
    assert result["product by differences"].tolerance == pytest.approx(1e-4)


def test_a_generator_draws_the_directions_and_moves_on() -> None:
    generator = torch.Generator().manual_seed(0)
    other = torch.Generator().manual_seed(0)
    verify(lambda p: (p**3).sum(), P, generator=generator)
    assert not torch.equal(generator.get_state(), other.get_state())


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: verify(3, P), ArgumentTypeError, "verify: f must be a function, got int"),
        (lambda: verify(torch.sum, {}), ValueError, "verify: params has no tensor in it"),
        (lambda: verify(torch.sum, [1.0]), TypeError, "every leaf of params must be a tensor"),
        (
            lambda: verify(torch.sum, P, generator=0),
            ArgumentTypeError,
            "generator must be a torch.Generator, got int",
        ),
        (lambda: verify(torch.sum, P, rtol="a"), ArgumentTypeError, "rtol must be a real number"),
        (lambda: verify(torch.sum, P, rtol=2), ArgumentError, "rtol must lie between 0 and 1"),
        (
            lambda: verify(torch.sum, torch.ones(2, device="meta")),
            ArgumentError,
            "params are on the meta device",
        ),
        (
            lambda: vmap(lambda p: torch.ones(()) * verify(torch.sum, p).ok)(torch.ones(2, 3)),
            ArgumentError,
            "cannot run inside a transform",
        ),
    ],
    ids=["f", "empty", "leaf", "generator", "rtol", "range", "meta", "vmap"],
)
def test_bad_arguments_raise(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
