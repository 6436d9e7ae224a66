"""What a loss writes while it is differentiated does not outlive the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from secorder_func import (
    finite_difference_hvp,
    ggn_operator,
    ggnvp,
    hessian_operator,
    hvp,
    hvp_and_grad,
)
from secorder_func.compat.core.hvp import exact_hvp
from tests import oracles, problems

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _ggn_operator_product(problem: problems.Problem, mode: Any) -> Callable[..., Any]:
    def product(params: Any, v: Any, *args: Any) -> Any:
        op = ggn_operator(problem.model_fn, problem.loss_fn, params, *args, mode=mode)
        op.dense()
        return op @ v

    return product


def _hessian_operator_product(problem: problems.Problem, mode: Any) -> Callable[..., Any]:
    def product(params: Any, v: Any, *args: Any) -> Any:
        op = hessian_operator(problem.f, params, *args, mode=mode)
        op.dense()
        return op @ v

    return product


ENTRY: dict[str, Callable[[problems.Problem, Any], Callable[..., Any]]] = {
    "hvp": lambda problem, mode: hvp(problem.f, mode=mode),
    "hvp_and_grad": lambda problem, mode: hvp_and_grad(problem.f, mode=mode),
    "ggnvp": lambda problem, mode: ggnvp(problem.model_fn, problem.loss_fn, mode=mode),
    "hessian_operator": _hessian_operator_product,
    "ggn_operator": _ggn_operator_product,
    "finite_difference_hvp": lambda problem, mode: finite_difference_hvp(problem.f),
}


def test_raw_torch_cannot_pass_batch_norm_in_training_mode() -> None:
    problem = problems.load("cnn_batchnorm_train")
    v = oracles.random_like(problem.params, 1)
    gradient = torch.func.grad(lambda p: problem.f(p, *problem.args))
    with pytest.raises(RuntimeError, match="in-place"):
        torch.func.jvp(gradient, (problem.params,), (v,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRY)
@pytest.mark.parametrize("name", ["cnn_batchnorm_train", "cnn_batchnorm_eval", "instance_norm"])
def test_buffers_are_bit_identical_and_the_same_objects_afterwards(
    name: str, entry: str, mode: Any
) -> None:
    problem = problems.load(name)
    before = {k: (b, b.clone(), b._version) for k, b in problem.model.named_buffers()}
    assert any(k.endswith("num_batches_tracked") for k in before)
    product = ENTRY[entry](problem, mode)
    product(problem.params, oracles.random_like(problem.params, 1), *problem.args)
    for k, b in problem.model.named_buffers():
        original, values, version = before[k]
        assert b is original
        assert torch.equal(b, values)
        assert b._version == version


class Counting(nn.Module):
    """A module that writes to a buffer, a plain tensor and its own attributes in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.full((2,), 0.5))
        self.plain = torch.zeros(2)
        self.history: Any = "untouched"
        self.calls = 0
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.linear(x))
        self.calls += 1
        self.history = out
        self.added_in_forward = out.sum()
        self.mean.mul_(0.9).add_(out.mean(0).detach(), alpha=0.1)
        self.plain += 1.0
        if self.fail:
            raise ArithmeticError("the user's own")
        return out * self.mean


def _counting() -> tuple[Counting, problems.Problem]:
    model = Counting().double()
    model.plain = model.plain.double()
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def model_fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    def f(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model_fn(params, x), y)

    return model, problems.Problem("counting", f, params, (x, y), model_fn, F.mse_loss)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRY)
def test_what_forward_writes_is_put_back(entry: str, mode: Any, fails: bool) -> None:
    model, problem = _counting()
    model.fail = fails
    product = ENTRY[entry](problem, mode)
    call = lambda: product(  # noqa: E731
        problem.params, oracles.random_like(problem.params, 1), *problem.args
    )
    if fails:
        with pytest.raises(ArithmeticError, match="the user's own"):
            call()
    else:
        call()
    assert model.history == "untouched"
    assert model.calls == 0
    assert not hasattr(model, "added_in_forward")
    assert torch.equal(model.mean, torch.full((2,), 0.5).double())
    assert torch.equal(model.plain, torch.zeros(2).double())
    assert not is_wrapped(model.mean)


@pytest.mark.parametrize("mode", MODES)
def test_what_forward_writes_is_seen_by_the_rest_of_the_evaluation(mode: Any) -> None:
    model, problem = _counting()
    v = oracles.random_like(problem.params, 1)
    hv = hvp(problem.f, mode=mode)(problem.params, v, *problem.args)
    plain = model.plain.clone()
    expected = oracles.hvp(problem.f, problem.params, v, *problem.args, model=model)
    model.plain.copy_(plain)
    oracles.assert_same(hv, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_tensor_written_in_place_is_untouched(mode: Any) -> None:
    log = torch.zeros(3).double()
    p = torch.tensor([1.0, 2.0, 3.0]).double()

    def f(p: Tensor) -> Tensor:
        log.add_(1.0)
        log[1] = 5.0
        torch.mul(log, 2.0, out=log)
        return (p**3).sum()

    oracles.assert_same(hvp(f, mode=mode)(p, torch.ones_like(p)), 6 * p)
    assert torch.equal(log, torch.zeros(3).double())


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_tensor_written_through_a_view_is_untouched(mode: Any) -> None:
    log = torch.zeros(3).double()
    p = torch.tensor([1.0, 2.0, 3.0]).double()

    def f(p: Tensor) -> Tensor:
        log[0] += 1.0
        log[1:].add_(1.0)
        return (p**3).sum()

    oracles.assert_same(hvp(f, mode=mode)(p, torch.ones_like(p)), 6 * p)
    assert torch.equal(log, torch.zeros(3).double())


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_written_in_place_is_untouched(mode: Any) -> None:
    x = torch.tensor([1.0, 2.0]).double()
    p = torch.tensor([0.5, -0.5]).double()

    def f(p: Tensor, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return ((p * x) ** 3).sum()

    hv = hvp(f, mode=mode)(p, torch.ones_like(p), x)
    oracles.assert_same(hv, 6 * p * torch.tensor([8.0, 64.0]).double())
    assert torch.equal(x, torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize("mode", MODES)
def test_in_place_operations_on_intermediates_are_exact(mode: Any) -> None:
    def f(p: Tensor) -> Tensor:
        h = p**2
        h.mul_(p)
        h[0] += p[1] ** 2
        out = torch.zeros(3).double()
        out.copy_(h)
        return out.sin_().sum()

    p, v = torch.tensor([0.5, -1.0, 2.0]).double(), torch.ones(3).double()
    oracles.assert_same(hvp(f, mode=mode)(p, v), oracles.hvp(f, p, v))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "write", [lambda p: p.mul_(2), lambda p: p.data.mul_(2), lambda p: p.detach().zero_()]
)
def test_a_loss_that_writes_to_its_parameters_is_refused(write: Any, mode: Any) -> None:
    def f(p: Tensor) -> Tensor:
        write(p)
        return (p**3).sum()

    p = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match=r"writes to a parameter|in-place|inplace"):
        hvp(f, mode=mode)(p, torch.ones(2))
    assert torch.equal(p, torch.tensor([1.0, 2.0]))


def test_spectral_norm_keeps_its_vectors_and_holds_no_wrapper() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    before = {k: b.clone() for k, b in model.named_buffers()}
    x = torch.randn(4, 3).double()
    f = lambda p: functional_call(model, p, (x,)).pow(3).sum()  # noqa: E731
    v = oracles.random_like(params, 1)
    hv = hvp(f)(params, v)
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    oracles.assert_same(hv, oracles.hvp(f, params, v, model=model))


@pytest.mark.parametrize("error", [ArithmeticError, KeyError, ValueError, RuntimeError])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRY)
def test_the_users_own_exception_reaches_the_caller(
    entry: str, mode: Any, error: type[Exception]
) -> None:
    own = type("Own", (error,), {})

    def f(p: Tensor, *args: Any) -> Tensor:
        raise own("no such luck")

    problem = problems.Problem("failing", f, torch.ones(2), (None, None), f, lambda z, y: z.sum())
    with pytest.raises(own, match="no such luck"):
        ENTRY[entry](problem, mode)(problem.params, torch.ones(2), None, None)


def test_torchs_own_error_of_a_plain_mistake_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        hvp(lambda p: (p + torch.ones(3)).sum())(torch.ones(2), torch.ones(2))


# ------------------------------------------------------------------- memory under two names


def _by_slice(flat: Tensor, part: Tensor, p: Tensor) -> Tensor:
    with torch.no_grad():
        flat[:3].copy_(p * 2)
    return (part * p**2).sum()


def _by_item(flat: Tensor, part: Tensor, p: Tensor) -> Tensor:
    flat[:3] = p.detach() * 2
    return (part * p**2).sum()


@pytest.mark.parametrize("kind", [_by_slice, _by_item])
@pytest.mark.parametrize("way", ["hvp", "operator", "adapter", "double_backward"])
def test_what_is_written_by_one_name_is_read_by_another(kind: Any, way: str) -> None:
    p, v = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 3.0, -1.0]).double()
    flat = torch.zeros(6, dtype=torch.float64)
    part = flat[:3]
    f = lambda q: kind(flat, part, q)  # noqa: E731
    if way == "adapter":
        w = p.clone().requires_grad_()
        hv = exact_hvp(lambda: f(w), [w], v)
    elif way == "operator":
        hv = hessian_operator(f, p) @ v
    else:
        hv = hvp(f, mode="auto" if way == "hvp" else way)(p, v)
    oracles.assert_same(hv, 4 * p * v)  # the Hessian of 2 c p^2, c held constant at p
    assert not flat.any()


def test_memory_that_is_only_partly_written_is_refused() -> None:
    flat = torch.zeros(6, dtype=torch.float64)
    part = flat[:3]

    def f(p: Tensor) -> Tensor:
        part.copy_(p.detach() ** 2)
        return (flat[:3] * p).sum()

    with pytest.raises(RuntimeError, match="through another one"):
        hvp(f)(torch.ones(3).double(), torch.ones(3).double())


def test_neighbours_in_one_memory_do_not_disturb_each_other() -> None:
    flat = torch.zeros(6, dtype=torch.float64)
    one, two = flat[:3], flat[3:]

    def f(p: Tensor) -> Tensor:
        one.copy_(p.detach())
        two.copy_(p.detach() * 2)
        return (one * p**2 + two * p**2).sum()

    p, v = torch.tensor([1.0, -2.0, 0.5]).double(), torch.ones(3).double()
    oracles.assert_same(hvp(f)(p, v), 6 * p * v)
