"""Sums over batches against the whole batch by plain autograd; reading, randomness, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secorder_func import (
    Batches,
    eigsh,
    empirical_fisher_operator,
    exact_diagonal,
    exact_trace,
    fisher_operator,
    functional_loss,
    functional_model,
    ggn_operator,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    likelihoods,
    tree,
    xtrace,
)
from tests.oracles import flat, relative_error
from tests.oracles import hessian as dense_hessian

IGNORED = -100


class Digits:
    """A classifier of samples or tokens, its data, and the same data in unequal batches."""

    def __init__(self, cuts: tuple[int, ...], *, tokens: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
        shape = (7, 3) if tokens else (7,)
        self.x = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, shape, generator=generator)
        if tokens:
            self.y[0, 1:] = self.y[2] = self.y[5, 0] = IGNORED
        edges = [0, *cuts, 7]
        self.parts = [(self.x[a:b], self.y[a:b]) for a, b in pairwise(edges)]

    def loss(self, reduction: str) -> Callable[..., Tensor]:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction=reduction)

        return loss_fn


def kept(inputs: Any, targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum()


CUTS = [(3,), (5,), (6,), (1, 2, 3, 4, 5, 6), ()]


def dense(op: Any) -> Tensor:
    return op.dense()


# ------------------------------------------------------------------------ equal to the whole batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_hessian_and_gauss_newton_of_batches_are_those_of_the_whole(
    cuts: tuple[int, ...], tokens: bool, reduction: Any
) -> None:
    problem = Digits(cuts, tokens=tokens)
    loss = problem.loss(reduction)
    f, params = functional_loss(problem.model, loss)
    model_fn, _ = functional_model(problem.model)
    weight = kept if tokens and reduction == "mean" else None
    batches = Batches(problem.parts, reduction=reduction, weight=weight)

    expected = dense_hessian(lambda p: f(p, problem.x, problem.y), params)
    op = batches.hessian_operator(f, params)
    assert relative_error(op.dense(), expected) < 1e-12
    v = tree.random_like(params, generator=torch.Generator().manual_seed(0))
    assert relative_error(flat(op @ v), expected @ flat(v)) < 1e-12

    # The Gauss-Newton matrix from the Jacobian and the Hessian in the outputs, both by torch.func.
    outputs = model_fn(params, problem.x)
    names = sorted(params)
    jacobian = torch.func.jacrev(lambda p: model_fn(p, problem.x).flatten())(params)
    J = torch.cat([jacobian[name].reshape(outputs.numel(), -1) for name in names], 1)
    H = torch.func.hessian(lambda z: loss(z.reshape(outputs.shape), problem.y))(outputs.flatten())
    expected = J.T @ H @ J
    assert expected.norm() > 0.1
    op = batches.ggn_operator(model_fn, loss, params)
    assert relative_error(op.dense(), expected) < 1e-12
    assert relative_error(exact_trace(op), expected.trace()) < 1e-12
    assert relative_error(flat(exact_diagonal(op)), expected.diagonal()) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_fisher_matrices_of_batches_are_those_of_the_whole(
    cuts: tuple[int, ...], tokens: bool, reduction: Any
) -> None:
    problem = Digits(cuts, tokens=tokens)
    full, params = functional_model(problem.model)

    def model_fn(params: Any, inputs: Any) -> Tensor:
        x, kept = inputs
        return full(params, x)[kept]

    data = [((x, y != IGNORED), y[y != IGNORED]) for x, y in problem.parts]
    x, y = (problem.x, problem.y != IGNORED), problem.y[problem.y != IGNORED]
    count = len(y) if reduction == "mean" else 1
    names = sorted(params)

    def rows(function: Callable[[Any], Tensor]) -> Tensor:
        found = torch.func.jacrev(function)(params)
        return torch.cat([found[name].flatten(1) for name in names], 1)

    J = rows(lambda p: model_fn(p, x).flatten()).reshape(len(y), 3, -1)
    probs = model_fn(params, x).softmax(1).detach()
    information = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
    expected = torch.einsum("nai,nab,nbj->ij", J, information, J) / count
    batches = Batches(data, reduction=reduction, check_weights=False)
    op = batches.fisher_operator(model_fn, likelihoods.categorical(), params)
    assert relative_error(op.dense(), expected) < 1e-12
    assert relative_error(exact_trace(op), expected.trace()) < 1e-12
    whole = fisher_operator(model_fn, likelihoods.categorical(), params, x, reduction=reduction)
    assert relative_error(op.dense(), whole.dense()) < 1e-12

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    G = rows(lambda p: losses(model_fn(p, x), y))
    op = batches.empirical_fisher_operator(model_fn, losses, params)
    assert relative_error(op.dense(), G.T @ G / count) < 1e-12
    whole = empirical_fisher_operator(model_fn, losses, params, x, y, reduction=reduction)
    assert relative_error(op.dense(), whole.dense()) < 1e-12


def test_ignored_tokens_as_losses_of_zero_are_divided_out_by_the_weight() -> None:
    problem = Digits((3,), tokens=True)
    model_fn, params = functional_model(problem.model)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")

    op = Batches(problem.parts, weight=kept).empirical_fisher_operator(model_fn, losses, params)
    jacobian = torch.func.jacrev(lambda p: losses(model_fn(p, problem.x), problem.y))(params)
    G = torch.cat([jacobian[name].flatten(1) for name in sorted(params)], 1)
    expected = G.T @ G / int((problem.y != IGNORED).sum())
    assert relative_error(op.dense(), expected) < 1e-12


def test_loss_and_gradient_are_those_of_the_whole() -> None:
    problem = Digits((5,), tokens=True)
    f, params = functional_loss(problem.model, problem.loss("mean"))
    batches = Batches(problem.parts, weight=kept)
    at = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = f(at, problem.x, problem.y)
    gradients = torch.autograd.grad(expected, list(at.values()))
    value, gradient = batches.loss_and_gradient(f, params)
    assert relative_error(value, expected.detach()) < 1e-13
    assert relative_error(batches.loss(f, params), expected.detach()) < 1e-13
    assert list(gradient) == list(params)
    for found, g in zip(gradient.values(), gradients, strict=True):
        assert relative_error(found, g) < 1e-12


@pytest.mark.parametrize("num_samples", [2, 400])
def test_drawn_fisher_matrices_are_the_same_at_every_pass_and_near_the_exact(
    num_samples: int,
) -> None:
    problem = Digits((3,), tokens=False)
    model_fn, params = functional_model(problem.model)

    def make(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (
            Batches(problem.parts)
            .fisher_operator(
                model_fn,
                likelihoods.categorical(),
                params,
                num_samples=num_samples,
                generator=generator,
            )
            .dense()
        )

    first = make(0)
    assert torch.equal(first, first.T.contiguous().T)
    assert relative_error(make(0), first) == 0
    assert relative_error(make(1), first) > 1e-3
    exact = ggn_operator(model_fn, F.cross_entropy, params, problem.x, problem.y).dense()
    assert relative_error(first, exact) < (0.2 if num_samples > 100 else 3.0)


# ---------------------------------------------------------------- algorithms, unchanged


def test_algorithms_give_what_they_give_for_the_whole_batch() -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    whole = hessian_operator(f, params, problem.x, problem.y)
    op = Batches(problem.parts).hessian_operator(f, params)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    for estimate in (hutchinson_trace, hutchinson_diagonal, xtrace):
        a, b = (estimate(o, 20, generator=generator()) for o in (op, whole))
        assert relative_error(a.value, b.value) < 1e-10
        assert relative_error(a.standard_error, b.standard_error) < 1e-8
    values = torch.linalg.eigvalsh(whole.dense())
    found = eigsh(op, 2, which="LA", generator=generator())
    assert relative_error(found.eigenvalues, values.flip(0)[:2]) < 1e-9
    block = op.block("2")
    assert relative_error(block.dense(), whole.block("2").dense()) < 1e-12
    assert relative_error(exact_trace(block), whole.block("2").dense().trace()) < 1e-12
    trace = hutchinson_trace(block, 8, generator=generator())
    assert trace.by_propagation
    exact = whole.block("2").dense()
    assert abs(float(trace.value - exact.trace())) < 6 * float(trace.standard_error)


class Counted:
    """Data that count how often each batch was read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.read = batches, [0] * len(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            self.read[index] += 1
            yield batch


@pytest.mark.parametrize("mode", ["auto", "double_backward"])
@pytest.mark.parametrize("propagates", [True, False])
def test_many_probes_read_each_batch_once(mode: Any, propagates: bool) -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    data = Counted(problem.parts)
    op = Batches(data, check_weights=False).hessian_operator(
        f, params, mode=mode, check_finite=not propagates
    )
    whole = hessian_operator(f, params, problem.x, problem.y)
    for compute in (
        lambda op: hutchinson_trace(op, 32, generator=torch.Generator().manual_seed(0)).value,
        lambda op: hutchinson_diagonal(op, 32, generator=torch.Generator().manual_seed(0)).value,
        lambda op: op.mm(tree.map(lambda t: torch.ones(32, *t.shape).to(t), params)),
    ):
        compute(op)  # whether there are forms may be asked once
        data.read = [0, 0]
        found = compute(op)
        assert data.read == [1, 1]
        assert relative_error(found, compute(whole)) < 1e-10


def test_vectors_that_do_not_fit_take_further_passes() -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    data = Counted(problem.parts)
    op = Batches(data, check_weights=False).hessian_operator(f, params)
    vectors = tree.map(lambda t: torch.ones(6, *t.shape).to(t), params)
    found = op.mm(vectors, chunk_size=2)
    assert data.read == [3, 3]
    assert relative_error(found, op.mm(vectors)) < 1e-12


# --------------------------------------------------------------- reading, randomness, state


def loader(**options: Any) -> DataLoader[Any]:
    problem = Digits((3,), tokens=False)
    return DataLoader(TensorDataset(problem.x, problem.y), batch_size=3, **options)


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_a_shuffling_loader_gives_the_same_order_at_every_pass(own: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own else None
    data = loader(shuffle=True, generator=generator)
    before = None if generator is None else generator.get_state()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches = Batches(data)
    first = [y.tolist() for _, y in batches.read()]
    second = [y.tolist() for _, y in batches.read()]
    assert first == second
    assert sorted(map(len, first)) == [1, 3, 3]
    assert torch.equal(torch.get_rng_state(), state)
    if generator is not None:
        assert torch.equal(generator.get_state(), before)
    batches.check()


def test_dropout_is_the_same_at_every_pass_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    y = torch.randn(9, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 1)).double()
    f, params = functional_loss(model, F.mse_loss)
    state = torch.get_rng_state()
    op = Batches([(x[:4], y[:4]), (x[4:], y[4:])]).hessian_operator(f, params)
    first = op.dense()
    assert torch.equal(op.dense(), first)
    assert relative_error(first, first.T) < 1e-12
    v = tree.random_like(params, generator=torch.Generator().manual_seed(0))
    assert relative_error(flat(op @ v), first @ flat(v)) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other = Batches([(x[:4], y[:4]), (x[4:], y[4:])]).hessian_operator(f, params).dense()
    assert relative_error(other, first) > 1e-3


def test_batches_without_samples_or_weight_do_not_count() -> None:
    problem = Digits((3,), tokens=True)
    f, params = functional_loss(problem.model, problem.loss("mean"))
    x, y = problem.x, problem.y
    nothing = (x[:0], y[:0])
    ignored = (x[:2], torch.full_like(y[:2], IGNORED))
    data = [nothing, *problem.parts, ignored, nothing]
    op = Batches(data, weight=kept).hessian_operator(f, params)
    expected = dense_hessian(lambda p: f(p, x, y), params)
    assert relative_error(op.dense(), expected) < 1e-12


def test_dicts_and_other_batches_are_prepared() -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    data = [{"x": x, "y": y, "name": "a"} for x, y in problem.parts]
    expected = dense_hessian(lambda p: f(p, problem.x, problem.y), params)
    prepared = Batches(data, prepare=lambda batch: (batch["x"], batch["y"]))
    assert relative_error(prepared.hessian_operator(f, params).dense(), expected) < 1e-12
    whole = Batches(data, weight=lambda batch: len(batch["x"]))
    op = whole.hessian_operator(lambda p, batch: f(p, batch["x"], batch["y"]), params)
    assert relative_error(op.dense(), expected) < 1e-12


def test_half_precision_is_summed_up_in_single() -> None:
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    data = [(x[i : i + 1],) for i in range(4096)]
    f = lambda p, x: 0.5 * ((x * p) ** 2).sum()  # noqa: E731
    op = Batches(data, reduction="sum").hessian_operator(f, torch.ones(1, dtype=torch.bfloat16))
    assert float(op @ torch.ones(1, dtype=torch.bfloat16)) == 4096.0  # in bfloat16 it ends at 256


def test_a_product_can_be_differentiated_and_mapped() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    batches = Batches([x[:2], x[2:]], check_weights=False)
    f = lambda p, x: (x * p**3).mean()  # noqa: E731

    def curvature(p: Tensor) -> Tensor:
        return batches.hessian_operator(f, p) @ torch.ones_like(p)

    p = torch.tensor(0.5, dtype=torch.float64)
    assert float(torch.func.grad(curvature)(p)) == pytest.approx(12.0)  # mean(x) = 2, 6 x p
    vectors = torch.tensor([1.0, 2.0], dtype=torch.float64)
    op = batches.hessian_operator(f, p)
    mapped = torch.func.vmap(lambda v: op @ v)(vectors)
    assert mapped.tolist() == pytest.approx([6.0, 12.0])


def test_parameters_that_change_in_place_are_noticed() -> None:
    p = torch.ones(2)
    op = Batches([torch.ones(2)]).hessian_operator(lambda p, x: (x * p**2).mean(), p)
    p.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        op @ torch.ones(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        hutchinson_trace(op, 2)


def test_an_error_of_the_loss_passes_and_nothing_is_left() -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        if float(x.sum()) > 2:
            raise ZeroDivisionError("mine")
        return (x * p**2).mean()

    state = torch.get_rng_state()
    op = Batches([torch.ones(1), 3 * torch.ones(1)]).hessian_operator(f, torch.ones(1))
    for compute in (
        lambda: op @ torch.ones(1),
        lambda: hutchinson_trace(op, 3, generator=torch.Generator()),
    ):
        with pytest.raises(ZeroDivisionError, match="mine"):
            compute()
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------- refusals


def mean_of_tokens(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((x @ p).flatten(0, 1), y.flatten())


def test_weights_that_the_losses_contradict_are_refused() -> None:
    problem = Digits((4,), tokens=True)
    f, params = functional_loss(problem.model, problem.loss("mean"))
    with pytest.raises(ValueError, match="not the mean of the losses of its first"):
        Batches(problem.parts).hessian_operator(f, params) @ params
    with pytest.raises(ValueError, match="weight="):
        Batches(problem.parts).loss(f, params)
    with pytest.raises(ValueError, match="not the mean"):
        Batches(problem.parts, weight=kept).ggn_operator(
            functional_model(problem.model)[0], problem.loss("sum"), params
        ) @ params
    plain = Digits((4,), tokens=False)
    mean, params = functional_loss(plain.model, F.cross_entropy)
    with pytest.raises(ValueError, match="not the sum"):
        Batches(plain.parts, reduction="sum").hessian_operator(mean, params) @ params


@pytest.mark.parametrize(("said", "meant"), [("mean", "sum"), ("sum", "mean")])
def test_the_message_names_the_other_reduction_before_rarer_causes(said: Any, meant: str) -> None:
    problem = Digits((4,), tokens=False)
    f, params = functional_loss(problem.model, problem.loss(meant))
    with pytest.raises(
        ValueError,
        match=rf"If the loss is a {meant}, take Batches\(data, reduction='{meant}'\).*batch normalis",
    ):
        Batches(problem.parts, reduction=said).loss(f, params)


def test_samples_that_influence_each_other_are_refused_unless_meant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    f, params = functional_loss(model, F.mse_loss)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.raises(ValueError, match="batch normalisation"):
        Batches(parts).hessian_operator(f, params) @ params
    op = Batches(parts, check_weights=False).hessian_operator(f, params)
    expected = dense_hessian(lambda p: (f(p, *parts[0]) + f(p, *parts[1])) / 2, params)
    assert relative_error(op.dense(), expected) < 1e-10


def test_samples_of_different_shapes_need_a_weight() -> None:
    p = torch.zeros(3, 2, dtype=torch.float64)
    data = [
        (torch.ones(2, length, 3).double(), torch.zeros(2, length, dtype=torch.int64))
        for length in (4, 6)
    ]
    op = Batches(data).hessian_operator(mean_of_tokens, p)
    with pytest.raises(ValueError, match="samples of different batches have different shapes"):
        op @ p
    op = Batches(data, weight=lambda x, y: y.numel()).hessian_operator(mean_of_tokens, p)
    assert float((op @ torch.ones_like(p)).abs().max()) < 1e-12


class Fewer:
    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter([torch.ones(2)] * (3 if self.reads < 3 else 2))


def test_data_that_change_between_passes_are_noticed() -> None:
    op = Batches(Fewer(), check_weights=False).hessian_operator(
        lambda p, x: (x * p**2).mean(), torch.ones(2)
    )
    op @ torch.ones(2)
    op @ torch.ones(2)
    with pytest.raises(RuntimeError, match=r"read 2 batches .* first one 3"):
        op @ torch.ones(2)


class Noisy:
    """Data whose batch 2 differs whenever it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        for index in range(4):
            yield torch.full((2,), float(self.reads if index == 2 else index))


def test_check_names_the_batch_that_differs() -> None:
    with pytest.raises(RuntimeError, match="batch 2 is another one"):
        Batches(Noisy()).check()
    seen: list[Tensor] = []

    def f(p: Tensor, x: Tensor) -> Tensor:
        seen.append(x)
        return (x * p).mean() + (len(seen) if float(x[0]) == 1 else 0)

    data = [torch.zeros(2), torch.ones(2), torch.zeros(2)]
    with pytest.raises(RuntimeError, match=r"loss of batch 1 is 3.0 and then 4.0"):
        Batches(data).check(f, torch.zeros(2))
    Batches(data).check(lambda p, x: F.dropout(x * p).mean(), torch.ones(2))
    with pytest.raises(RuntimeError, match="there are 2 batches, and 1 when"):
        Batches(Shrinking()).check()


class Shrinking:
    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter([torch.ones(2)] * (3 - self.reads))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Batches(iter([1])), "can be read once"),
        (lambda: Batches(torch.zeros(3)), "got a tensor"),
        (lambda: Batches(5), "must be iterable"),
        (lambda: Batches([1], reduction="max"), "reduction"),
        (lambda: Batches([1], weight=3), "weight must be a function"),
        (lambda: Batches([1], reduction="sum", weight=len), "a sum has no weights"),
        (lambda: list(Batches([1], prepare=lambda b: b).read()), "prepare must return a tuple"),
        (lambda: Batches([]).loss(lambda p: p.sum(), torch.ones(2)), "nothing to sum"),
        (
            lambda: Batches([torch.ones(2)], weight=lambda x: -1.0).loss(
                lambda p, x: (p * x).sum(), torch.ones(2)
            ),
            "from 0 on",
        ),
        (
            lambda: Batches([torch.ones(2)], weight=lambda x: x).loss(
                lambda p, x: (p * x).sum(), torch.ones(2)
            ),
            "must return a number",
        ),
        (
            lambda: (
                Batches([torch.ones(2)]).ggn_operator(
                    lambda p, x: p * x, lambda o, y: o.sum(), torch.ones(2)
                )
                @ torch.ones(2)
            ),
            "must be .inputs, targets.",
        ),
        (
            lambda: Batches([torch.ones(())]).loss(lambda p, x: (p * x).sum(), torch.ones(2)),
            "no leading axis",
        ),
        (
            lambda: Batches([torch.ones(2)]).operator(lambda x: x, torch.ones(2)) @ torch.ones(2),
            "must return a LinearOperator",
        ),
    ],
)
def test_refusals_say_what_is_wrong(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises((ValueError, TypeError), match=problem):
        make()


# ------------------------------------------------------------------ one operator, used again


USES: dict[str, Callable[[Any], Any]] = {
    "trace": lambda op: hutchinson_trace(op, 256, generator=torch.Generator().manual_seed(0)).value,
    "diagonal": lambda op: (
        hutchinson_diagonal(op, 20, generator=torch.Generator().manual_seed(0)).value
    ),
    "exact trace": exact_trace,
    "exact diagonal": exact_diagonal,
    "forms": lambda op: op.quadratic_forms(op.basis(slice(0, 20))),
    "dense": dense,
    "block": lambda op: exact_diagonal(op.block("2")),
    "trace of a block": lambda op: (
        hutchinson_trace(op.block("2"), 64, generator=torch.Generator().manual_seed(0)).value
    ),
}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("first", USES)
def test_what_was_computed_before_does_not_matter(first: str, kind: str) -> None:
    problem = Digits((5,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    model_fn, _ = functional_model(problem.model)

    def make() -> Any:
        if kind == "hessian":
            return Batches(problem.parts).hessian_operator(f, params)
        return Batches(problem.parts).ggn_operator(model_fn, F.cross_entropy, params)

    op = make()
    USES[first](op)
    for use in USES.values():
        assert relative_error(use(op), use(make())) < 1e-12


def test_exact_numbers_take_one_pass() -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    model_fn, _ = functional_model(problem.model)
    data = Counted(problem.parts)
    batches = Batches(data)
    for op in (
        batches.hessian_operator(f, params),
        batches.ggn_operator(model_fn, F.cross_entropy, params),
        batches.fisher_operator(model_fn, likelihoods.categorical(), params),
        batches.hessian_operator(f, params, check_finite=True),
    ):
        for compute in (exact_trace, exact_diagonal, dense):
            data.read = [0, 0]
            compute(op)
            assert data.read == [1, 1]


class Turned:
    """Batches of unequal sizes that come in another order every second time."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter(self.batches if self.reads % 2 else self.batches[::-1])


def test_weights_belong_to_batches_in_whatever_order_they_come() -> None:
    problem = Digits((2,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    expected = dense_hessian(lambda p: f(p, problem.x, problem.y), params)
    op = Batches(Turned(problem.parts)).hessian_operator(f, params)
    for _ in range(3):
        assert relative_error(op.dense(), expected) < 1e-12


def test_what_prepare_draws_is_the_same_at_every_pass() -> None:
    x = torch.ones(6, 2).double()
    noisy = Batches(
        [x[:4], x[4:]], prepare=lambda b: (b + torch.randn(b.shape).double(),), check_weights=False
    )
    op = noisy.hessian_operator(lambda p, x: ((x @ p) ** 2).mean(), torch.ones(2).double())
    state = torch.get_rng_state()
    first = op.dense()
    assert torch.equal(op.dense(), first)
    assert torch.equal(torch.get_rng_state(), state)


class Augmented(torch.utils.data.Dataset[Any]):
    """Samples with noise from a generator of the data set's own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.randn(2, generator=self.generator).double()


def test_generators_of_data_sets_and_samplers_are_put_back() -> None:
    data = Augmented()
    before = data.generator.get_state()
    for subset in (data, torch.utils.data.Subset(data, range(6))):
        batches = Batches(DataLoader(subset, batch_size=4))
        op = batches.hessian_operator(lambda p, x: ((x @ p) ** 2).mean(), torch.ones(2).double())
        assert torch.equal(op.dense(), op.dense())
        batches.check()
        assert torch.equal(data.generator.get_state(), before)
    sampler = torch.utils.data.RandomSampler(
        range(6), replacement=True, num_samples=5, generator=data.generator
    )
    batches = Batches(DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, sampler=sampler))
    both = list(zip(batches.read(), batches.read(), strict=True))
    assert len(both) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in both)


def test_persistent_workers_are_refused() -> None:
    data = DataLoader(TensorDataset(torch.ones(4)), num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        Batches(data)


def test_workers_give_the_same_data_at_every_pass() -> None:
    data = DataLoader(TensorDataset(torch.arange(8.0)), 3, shuffle=True, num_workers=2)
    first, second = ([x.tolist() for (x,) in Batches(data).read()] for _ in range(2))
    torch.manual_seed(0)
    batches = Batches(data)
    first, second = ([x.tolist() for (x,) in batches.read()] for _ in range(2))
    assert first == second
    assert sorted(number for numbers in first for number in numbers) == list(range(8))


def test_what_little_is_left_of_a_fitted_loss_does_not_contradict_weights() -> None:
    x = torch.linspace(50, 150, 90)

    def loss(p: Tensor, x: Tensor) -> Tensor:  # of rounding, where it was fitted
        return ((p * x - x).square() + 1000).mean() - 1000

    batches = Batches([x[:40], x[40:]])
    fitted = torch.tensor(1.0001)
    assert 0 < abs(float(loss(fitted, x))) < 1e-3
    product = batches.hessian_operator(loss, fitted) @ torch.ones(())
    assert float(product) == pytest.approx(2 * float(x.double().square().mean()), rel=1e-5)
    summed = batches.hessian_operator(lambda p, x: len(x) * loss(p, x), fitted)
    with pytest.raises(ValueError, match="is not the mean"):
        summed @ torch.ones(())


def test_a_batch_with_a_list_beside_its_tensors_is_taken_as_a_whole() -> None:
    factor = {"a": 1.0, "b": 100.0}

    def f(p: Tensor, x: Tensor, names: list[str]) -> Tensor:
        return torch.stack(
            [factor[n] * (p * v).square() for n, v in zip(names, x, strict=True)]
        ).mean()

    x = torch.linspace(1, 2, 5).double()
    names = ["a", "a", "b", "a", "b"]
    op = Batches([(x, names)]).hessian_operator(f, torch.ones(()).double())
    weights = torch.tensor([factor[n] for n in names]).double()
    assert float(op @ torch.ones(()).double()) == pytest.approx(float(2 * (weights * x**2).mean()))


def test_a_sum_is_no_mean_though_elsewhere_it_is_zero() -> None:
    x = torch.linspace(0.5, 1.5, 6)
    for factor in (1.0, -1.0):  # of one sign the unit is dead
        batches = Batches([x * factor, x[:3] * factor])
        with pytest.raises(ValueError, match="is not the mean"):
            batches.loss_and_gradient(
                lambda p, x: torch.relu(x * p).square().sum(), torch.tensor(factor)
            )


def test_weights_that_only_later_batches_contradict_are_refused() -> None:
    problem = Digits((2, 4), tokens=True)
    f, params = functional_loss(problem.model, problem.loss("mean"))
    x, y = problem.x, problem.y.clone().clamp(min=0)
    later = y.clone()
    later[5, 1:] = IGNORED
    data = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], later[4:])]
    with pytest.raises(ValueError, match="loss of batch 2 is not the mean"):
        Batches(data).hessian_operator(f, params) @ params


def test_a_loss_of_all_data_is_not_differentiated_to_zeros() -> None:
    batches = Batches([torch.ones(2)])
    f = lambda p, x: (p * x).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="loss_and_gradient"):
        torch.func.grad(lambda p: batches.loss(f, p))(torch.ones(2))


def test_operators_are_mapped_over_parameters() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    batches = Batches([x[:2], x[2:]], check_weights=False)
    f = lambda p, x: ((x @ p) ** 4).mean()  # noqa: E731
    points = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    v = torch.ones(3).double()
    mapped = torch.func.vmap(lambda p: batches.hessian_operator(f, p) @ v)(points)
    for p, found in zip(points, mapped, strict=True):
        assert relative_error(found, dense_hessian(lambda p: f(p, x), p) @ v) < 1e-12


def test_buffers_stay_as_they_are_also_in_check() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    f, params = functional_loss(model, F.mse_loss)
    data = [(torch.randn(4, 3).double(), torch.randn(4, 1).double()) for _ in range(2)]
    before = {name: b.clone() for name, b in model.named_buffers()}
    batches = Batches(data, check_weights=False)
    batches.check(lambda p, x, y: F.mse_loss(model(x), y), params)
    batches.loss_and_gradient(f, params)
    batches.hessian_operator(f, params) @ params
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_batches_of_batches_and_sums_of_operators() -> None:
    problem = Digits((3,), tokens=False)
    f, params = functional_loss(problem.model, F.cross_entropy)
    inner = [Batches([part]).hessian_operator(f, params) for part in problem.parts]
    outer = Batches([0, 1], reduction="sum").operator(lambda i: inner[i], params)
    expected = sum(dense_hessian(lambda p, x=x, y=y: f(p, x, y), params) for x, y in problem.parts)
    assert relative_error(outer.dense(), expected) < 1e-12
    trace = hutchinson_trace(outer, 40, generator=torch.Generator().manual_seed(0))
    assert trace.by_propagation
    assert abs(float(trace.value - expected.trace())) < 6 * float(trace.standard_error)
    assert relative_error((inner[0] + inner[1]).dense(), expected) < 1e-12
    with pytest.raises((TypeError, ValueError), match=r"make\(\*batch\).like"):
        Batches([0], reduction="sum").operator(
            lambda i: hessian_operator(lambda p: p.sum() ** 2, torch.ones(2)), params
        ) @ params
