"""Curvature of every sample, against a loop over samples by plain autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    PerSampleOperator,
    exact_diagonal,
    exact_trace,
    functional_loss,
    functional_model,
    ggn_operator,
    hessian_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    hvp,
    likelihoods,
    per_sample_empirical_fisher_operator,
    per_sample_fisher_operator,
    per_sample_ggn_operator,
    per_sample_hessian_operator,
    top_eigenpairs,
    tree,
)
from secorder_func.errors import ConvergenceWarning
from tests import oracles, problems
from tests.algorithms.matrices import generator

MIXING, RANDOM = ("cnn_batchnorm_train",), ("dropout",)
MODELS = [n for n in problems.model_names() if n not in MIXING + RANDOM]


def rows_of(batch: Any, index: int) -> Any:
    """Return a batch of one sample."""
    one = slice(index, index + 1)
    return optree.tree_map(lambda t: t[one] if isinstance(t, Tensor) else t, batch)


def matrices(oracle: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
    """Return the matrix of every sample, one after another."""
    count = oracles.leaves_of(args)[0].shape[0]
    return torch.stack([oracle(*rows_of(args, index)) for index in range(count)])


def flat_rows(stacked: Any, batch_dims: int = 1) -> Tensor:
    """Return the entries of the leaves behind leading axes, side by side."""
    leaves = oracles.leaves_of(stacked)
    return torch.cat(
        [
            leaf.flatten(batch_dims) if leaf.ndim > batch_dims else leaf.unsqueeze(-1)
            for leaf in leaves
        ],
        -1,
    )


def small(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model of the issue with five samples."""
    inputs = torch.randn(5, 1, 6, 6) if name == "cnn" else torch.randn(5, 3, 4)
    if name == "mlp":
        inputs = inputs.flatten(1)
    models: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)),
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        "transformer": lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
    }
    return models[name]().double(), inputs.double(), torch.randint(3, (5,))


# ------------------------------------------------------------------------------- against a loop


@pytest.mark.parametrize("name", MODELS)
def test_hessian_products_and_forms_are_those_of_a_loop(name: str) -> None:
    p = problems.load(name)
    op = per_sample_hessian_operator(p.f, p.params, *p.args)
    H = matrices(lambda *args: oracles.hessian(p.f, p.params, *args, model=p.model), p.args)
    u, v = (oracles.random_like(p.params, seed) for seed in (1, 2))
    tolerance = max(1e-10, p.rtol)
    oracles.assert_same(flat_rows(op @ v), H @ oracles.flat(v), tolerance)
    both = tree.stack([u, v])
    products = torch.stack([H @ oracles.flat(u), H @ oracles.flat(v)])
    oracles.assert_same(flat_rows(op.mm(both), 2), products, tolerance)
    forms = (products * flat_rows(both).unsqueeze(1)).sum(2)
    oracles.assert_same(op.quadratic_forms(both).to(forms), forms, 10 * tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_products_forms_traces_and_diagonals_are_those_of_a_loop(name: str) -> None:
    p = problems.load(name)
    op = per_sample_ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args)
    G = matrices(partial(oracles.ggn, p.model_fn, p.loss_fn, p.params), p.args)
    v = oracles.random_like(p.params, 3)
    tolerance = max(1e-10, 2 * p.rtol)
    oracles.assert_same(flat_rows(op @ v), G @ oracles.flat(v), tolerance)
    forms = (G @ oracles.flat(v)) @ oracles.flat(v)
    oracles.assert_same(op.quadratic_forms(tree.stack([v]))[0].to(forms), forms, 10 * tolerance)
    diagonals = G.diagonal(dim1=1, dim2=2)
    oracles.assert_same(flat_rows(exact_diagonal(op)), diagonals, 10 * tolerance)
    oracles.assert_same(exact_trace(op).to(G), diagonals.sum(1), 10 * tolerance)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_exact_traces_and_diagonals_of_the_hessian(name: str, reduction: str) -> None:
    model, x, y = small(name)
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction=reduction))
    op = per_sample_hessian_operator(f, params, x, y)
    alone, _ = functional_loss(model, nn.CrossEntropyLoss())
    H = matrices(lambda *args: oracles.hessian(alone, params, *args), (x, y))
    diagonals = H.diagonal(dim1=1, dim2=2)
    oracles.assert_same(exact_trace(op), diagonals.sum(1), 1e-10)
    found = exact_diagonal(op)
    oracles.assert_same(flat_rows(found), diagonals, 1e-10)
    shapes = {n: (5, *leaf.shape) for n, leaf in params.items()}
    assert {n: tuple(leaf.shape) for n, leaf in found.items()} == shapes


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_estimates_are_within_their_errors_for_every_sample(reduction: str) -> None:
    model, x, y = small("mlp")
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction=reduction))
    op = per_sample_hessian_operator(f, params, x, y)
    trace = hutchinson_trace(op, 400, generator=generator(0))
    diagonal = hutchinson_diagonal(op, 400, generator=generator(0))
    alone, _ = functional_loss(model, nn.CrossEntropyLoss())
    H = matrices(lambda *args: oracles.hessian(alone, params, *args), (x, y))
    truth = H.diagonal(dim1=1, dim2=2)
    assert trace.by_propagation == (reduction == "none")
    assert trace.value.shape == trace.standard_error.shape == (5,)
    assert ((trace.value - truth.sum(1)).abs() < 5 * trace.standard_error).all()
    assert (trace.standard_error < 0.2 * H.flatten(1).norm(dim=1)).all()
    errors = flat_rows(diagonal.standard_error)
    assert ((flat_rows(diagonal.value) - truth).abs() < 5.5 * errors + 1e-15).all()
    assert float(errors.norm()) < 0.2 * float(H.norm())


def test_a_tolerance_holds_for_all_samples_together() -> None:
    model, x, y = small("mlp")
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    op = per_sample_hessian_operator(f, params, x, y)
    found = hutchinson_trace(op, rtol=0.1, max_matvecs=10**5, generator=generator(0))
    assert found.converged
    assert oracles.relative_error(found.value, exact_trace(op)) < 0.1
    more = hutchinson_trace(op, 2 * found.num_matvecs, resume=found)
    whole = hutchinson_trace(op, 2 * found.num_matvecs, generator=generator(0))
    oracles.assert_same(more.value, whole.value, 1e-12)


def test_the_samples_of_a_mean_loss_add_up_to_the_batch() -> None:
    model, x, y = small("transformer")
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    v = oracles.random_like(params, 5)
    each = per_sample_hessian_operator(f, params, x, y) @ v
    whole = oracles.hvp(f, params, v, x, y)
    oracles.assert_same({n: leaf.mean(0) for n, leaf in each.items()}, whole, 1e-10)


def test_a_vector_of_every_samples_own() -> None:
    model, x, y = small("cnn")
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    op = per_sample_hessian_operator(f, params, x, y)
    vectors = [oracles.random_like(params, seed) for seed in range(5)]
    expected = [oracles.hvp(f, params, vectors[i], x[i : i + 1], y[i : i + 1]) for i in range(5)]
    oracles.assert_same(op.with_own(tree.stack(vectors)), tree.stack(expected), 1e-10)
    some = op.with_own(tree.stack(vectors[1:4]), samples=slice(1, 4))
    oracles.assert_same(some, tree.stack(expected[1:4]), 1e-10)
    with pytest.raises(ValueError, match="expected a vector for each of 5 samples, got 3"):
        op.with_own(tree.stack(vectors[:3]))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100, None])
def test_the_chunk_does_not_change_the_numbers(chunk_size: int | None) -> None:
    p = problems.load("mlp_gelu")
    whole = per_sample_hessian_operator(p.f, p.params, *p.args)
    parts = per_sample_hessian_operator(p.f, p.params, *p.args, chunk_size=chunk_size)
    vectors = tree.stack([oracles.random_like(p.params, seed) for seed in range(3)])
    oracles.assert_same(parts.mm(vectors), whole.mm(vectors), 1e-12)
    oracles.assert_same(parts.quadratic_forms(vectors), whole.quadratic_forms(vectors), 1e-12)


def test_a_budget_bounds_the_samples_at_once() -> None:
    sizes: list[int] = []

    def model_fn(params: Tensor, x: Tensor) -> Tensor:
        sizes.append(1)
        return x @ params

    x = torch.randn(40, 1000).double()
    params = torch.randn(1000).double()
    f = lambda p, x: model_fn(p, x).square()  # noqa: E731
    op = per_sample_hessian_operator(f, params, x, memory_budget=10 * 8 * 1000 * 4)
    v = torch.randn(1000).double()
    sizes.clear()
    oracles.assert_same(op @ v, 2 * x * (x @ v).unsqueeze(1), 1e-12)
    assert len(sizes) >= 5  # traced once a chunk


# -------------------------------------------------------------------------------------- Fisher


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_the_exact_fisher_of_every_sample_is_its_gauss_newton_matrix(name: str) -> None:
    model, x, y = small(name)
    model_fn, params = functional_model(model)
    op = per_sample_fisher_operator(model_fn, likelihoods.categorical(), params, x)
    loss = nn.CrossEntropyLoss()
    G = matrices(lambda x, y: oracles.ggn(model_fn, loss, params, x, y), (x, y))
    v = oracles.random_like(params, 1)
    oracles.assert_same(flat_rows(op @ v), G @ oracles.flat(v), 1e-12)
    oracles.assert_same(exact_trace(op), G.diagonal(dim1=1, dim2=2).sum(1), 1e-12)


def test_the_monte_carlo_fisher_of_every_sample_converges() -> None:
    model, x, _ = small("mlp")
    model_fn, params = functional_model(model)
    exact = exact_trace(per_sample_fisher_operator(model_fn, likelihoods.categorical(), params, x))
    make = partial(per_sample_fisher_operator, model_fn, likelihoods.categorical(), params, x)
    runs = [exact_trace(make(num_samples=20, generator=generator(s))) for s in range(60)]
    values = torch.stack(runs)
    assert ((values.mean(0) - exact).abs() < 4.5 * values.std(0) / 60**0.5).all()


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_the_empirical_fisher_of_every_sample(name: str) -> None:
    model, x, y = small(name)
    model_fn, params = functional_model(model)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    op = per_sample_empirical_fisher_operator(model_fn, loss_fn, params, x, y)
    alone, _ = functional_loss(model, nn.CrossEntropyLoss())
    g = matrices(lambda *args: oracles.flat(oracles.gradient(alone, params, *args)), (x, y))
    v = oracles.random_like(params, 1)
    oracles.assert_same(flat_rows(op @ v), g * (g @ oracles.flat(v)).unsqueeze(1), 1e-10)
    oracles.assert_same(exact_trace(op), g.square().sum(1), 1e-10)
    oracles.assert_same(flat_rows(exact_diagonal(op)), g.square(), 1e-10)
    found = top_eigenpairs(op)
    oracles.assert_same(found.eigenvalues, g.square().sum(1), 1e-10)


# --------------------------------------------------------------------- traces of batches by outputs


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bfloat16"] + list(MIXING))
def test_batches_are_traced_from_whichever_space_is_smaller(name: str) -> None:
    p = problems.load(name)
    op = ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args)
    assert op.rows is not None
    assert op.rows.cheaper()
    samples, outputs = op.rows.weights.shape
    assert (samples == 1) == (name in MIXING)
    assert outputs < op.shape[0]
    with oracles.untouched(p.model):
        G = oracles.ggn(p.model_fn, p.loss_fn, p.params, *p.args)
    oracles.assert_same(exact_trace(op), G.trace(), 1e-10)
    oracles.assert_same(flat_rows(exact_diagonal(op), 0), G.diag(), 1e-10)
    entries = dataclasses.replace(op, rows=None)  # by a form of every entry
    oracles.assert_same(exact_trace(entries), G.trace(), 1e-10)


def test_a_loss_that_couples_samples_is_seen_as_one_block() -> None:
    x, params = torch.randn(2, 3).double(), torch.randn(3, 9).double()
    model_fn = lambda p, x: torch.tanh(x @ p)  # noqa: E731
    couples = lambda z, _: (z @ z.T).exp().sum()  # noqa: E731
    op = ggn_operator(model_fn, couples, params, x, torch.zeros(2))
    G = oracles.ggn(model_fn, couples, params, x, torch.zeros(2))
    oracles.assert_same(exact_trace(op), G.trace(), 1e-10)
    oracles.assert_same(flat_rows(exact_diagonal(op), 0), G.diag(), 1e-10)
    assert op.rows is not None
    assert op.rows.cheaper()
    assert op.rows.weights.shape == (1, 18)
    fewer = ggn_operator(model_fn, couples, params[:, :2], torch.randn(6, 3).double(), x)
    assert fewer.rows is not None
    assert not fewer.rows.cheaper()  # 12 outputs, 6 parameters


def test_with_fewer_parameters_than_outputs_forms_are_taken() -> None:
    x, params = torch.randn(4, 2).double(), torch.randn(2).double()
    model_fn = lambda p, x: torch.sin(x @ torch.outer(p, torch.arange(9.0).double()))  # noqa: E731
    loss_fn = lambda z, y: ((z - y) ** 2).sum()  # noqa: E731
    y = torch.zeros(4, 9).double()
    op = ggn_operator(model_fn, loss_fn, params, x, y)
    G = oracles.ggn(model_fn, loss_fn, params, x, y)
    assert op.rows is not None
    assert not op.rows.cheaper()
    oracles.assert_same(exact_diagonal(op), G.diag(), 1e-10)


def test_scaled_operators_forget_the_rows() -> None:
    p = problems.load("mlp_tanh")
    op = ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args)
    oracles.assert_same(exact_trace(3.0 * op), 3 * exact_trace(op), 1e-12)
    oracles.assert_same(exact_trace(op.damped(2.0)), exact_trace(op) + 2 * op.shape[0], 1e-12)


# ----------------------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_the_outermost_eigenpair_of_every_sample(name: str, which: Any) -> None:
    model, x, y = small(name)
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    op = per_sample_hessian_operator(f, params, x, y)
    alone, _ = functional_loss(model, nn.CrossEntropyLoss())
    H = matrices(lambda *args: oracles.hessian(alone, params, *args), (x, y))
    values = torch.linalg.eigvalsh(H)
    low, high = values[:, 0], values[:, -1]
    truth = {"LA": high, "SA": low, "LM": torch.where(high > -low, high, low)}[which]
    found = top_eigenpairs(op, which=which, generator=generator(0))
    assert found.converged
    oracles.assert_same(found.eigenvalues, truth, 1e-8)
    V = flat_rows(found.eigenvectors)
    oracles.assert_same(V.norm(dim=1), torch.ones(5).double(), 1e-12)
    residuals = (torch.einsum("nij,nj->ni", H, V) - truth.unsqueeze(1) * V).norm(dim=1)
    assert (residuals <= 1e-5 * values.abs().amax(1)).all()
    assert (found.residual_norms <= 1e-5 * values.abs().amax(1)).all()


def test_gauss_newton_eigenpairs_come_from_the_outputs() -> None:
    model, x, y = small("cnn")
    model_fn, params = functional_model(model)
    op = per_sample_ggn_operator(model_fn, F.cross_entropy, params, x, y)
    found = top_eigenpairs(op)
    assert found.num_matvecs == 3
    G = matrices(lambda x, y: oracles.ggn(model_fn, F.cross_entropy, params, x, y), (x, y))
    oracles.assert_same(found.eigenvalues, torch.linalg.eigvalsh(G)[:, -1], 1e-12)
    V = flat_rows(found.eigenvectors)
    image = torch.einsum("nij,nj->ni", G, V)
    oracles.assert_same(image, found.eigenvalues.unsqueeze(1) * V, 1e-10)
    iterated = top_eigenpairs(dataclasses.replace(op, rows=None), generator=generator(1))
    oracles.assert_same(iterated.eigenvalues, found.eigenvalues, 1e-8)
    smallest = top_eigenpairs(op, which="SA")
    assert (smallest.eigenvalues.abs() < 1e-5 * found.eigenvalues).all()


def test_many_clustered_eigenvalues_take_restarts() -> None:
    n = 300
    scales = torch.linspace(0.99, 1.0, n).double().repeat(2, 1)
    scales[1] = torch.linspace(-2, -1, n)
    op = per_sample_hessian_operator(
        lambda p, s: 0.5 * (s * p * p).sum(-1), torch.ones(n).double(), scales
    )
    found = top_eigenpairs(op, rtol=1e-8, max_matvecs=5000, which="LA", generator=generator(0))
    assert found.num_matvecs > 24
    assert (found.eigenvalues - torch.tensor([1.0, -1.0]).double()).abs().max() < 1e-7


def test_an_iteration_that_does_not_converge_warns() -> None:
    scales = torch.linspace(0.99, 1.0, 500).double().repeat(2, 1)
    op = per_sample_hessian_operator(
        lambda p, s: 0.5 * (s * p * p).sum(-1), torch.ones(500).double(), scales
    )
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 residuals are above the tolerance"):
        found = top_eigenpairs(op, rtol=1e-10, max_matvecs=5)
    assert not found.converged
    assert (found.residual_norms > 1e-10).all()


def test_zero_matrices_and_spaces_of_one_entry() -> None:
    flat = per_sample_hessian_operator(lambda p, x: x @ p, torch.ones(3), torch.ones(2, 3))
    assert not top_eigenpairs(flat).eigenvalues.any()
    assert not exact_trace(flat).any()
    point = per_sample_hessian_operator(
        lambda p, x: x * p**2, torch.ones(()), torch.tensor([1.0, -2])
    )
    assert top_eigenpairs(point).eigenvalues.tolist() == [2.0, -4.0]
    assert exact_diagonal(point).tolist() == [2.0, -4.0]


# ------------------------------------------------------------------------------- kinds of models


def test_dropout_masks_are_shared_and_drawn_once() -> None:
    layer = nn.Linear(6, 5).double()
    model = nn.Sequential(layer, nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3).double())
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    x, y = torch.randn(9, 6).double(), torch.randint(3, (9,))
    torch.manual_seed(4)
    op = per_sample_hessian_operator(f, params, x, y)
    v = oracles.random_like(params, 0)
    torch.manual_seed(99)
    first = op @ v
    again = op @ v
    oracles.assert_same(again, first, 1e-14)
    torch.manual_seed(4)
    chunked = per_sample_hessian_operator(f, params, x, y, chunk_size=2)
    oracles.assert_same(chunked @ v, first, 1e-12)
    dead = [(leaf == 0).all(0) for leaf in (first["0.weight"].abs().sum(2),)]
    assert 0 < int(dead[0].sum()) < 5  # the same units are off for all samples


def test_frozen_tied_and_unused_parameters() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 2)).double()
    model[3].requires_grad_(False)
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    params = {**params}
    x, y = torch.randn(5, 4).double(), torch.randint(2, (5,))
    g = lambda p, x, y: f({n: p[n] for n in params}, x, y)  # noqa: E731
    wide = {**params, "unused": torch.zeros(2, 2).double()}
    op = per_sample_hessian_operator(g, wide, x, y)
    alone = lambda p, x, y: g(p, x, y).sum()  # noqa: E731
    H = matrices(lambda *args: oracles.hessian(alone, wide, *args), (x, y))
    oracles.assert_same(flat_rows(exact_diagonal(op)), H.diagonal(dim1=1, dim2=2), 1e-10)


def test_batches_of_dicts_and_of_token_losses() -> None:
    table = torch.randn(7, 3).double()

    def f(params: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = params["embed"][batch["tokens"]] @ params["head"]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["next"].flatten(), reduction="none")
        return losses.view(batch["tokens"].shape).sum(1)

    params = {"head": torch.randn(3, 7).double(), "embed": table}
    batch = {"tokens": torch.randint(7, (4, 5)), "next": torch.randint(7, (4, 5))}
    op = per_sample_hessian_operator(f, params, batch)
    H = matrices(lambda b: oracles.hessian(lambda p, b: f(p, b).sum(), params, b), (batch,))
    oracles.assert_same(flat_rows(exact_diagonal(op)), H.diagonal(dim1=1, dim2=2), 1e-10)
    oracles.assert_same(exact_trace(op), H.diagonal(dim1=1, dim2=2).sum(1), 1e-10)


def test_no_grad_around_the_call_and_inference_mode() -> None:
    model, x, y = small("mlp")
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    v = oracles.random_like(params, 0)
    expected = per_sample_hessian_operator(f, params, x, y) @ v
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = per_sample_hessian_operator(f, params, x, y) @ v
        oracles.assert_same(found, expected, 1e-14)


def test_float32() -> None:
    model, x, y = small("transformer")
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    wide = exact_trace(per_sample_hessian_operator(f, params, x, y))
    f, params = functional_loss(model.float(), nn.CrossEntropyLoss(reduction="none"))
    narrow = exact_trace(per_sample_hessian_operator(f, params, x.float(), y))
    assert narrow.dtype == torch.float32
    assert oracles.relative_error(narrow, wide) < 1e-5


def test_exceptions_of_the_users_leave_the_module_as_it_was() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if x.shape[0] == 1:
                raise KeyError("one sample")
            return self.layer(x)

    model = Fails()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(KeyError, match="one sample"):
        per_sample_hessian_operator(f, params, torch.ones(3, 2), torch.zeros(3).long())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_the_loss_is_that_of_now() -> None:
    p = torch.ones(3)
    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 3, p, torch.ones(2, 3))
    p.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the operator was made"):
        op @ torch.ones(3)


def test_products_can_be_differentiated() -> None:
    x = torch.randn(4, 3).double()
    p = torch.randn(3).double().requires_grad_()
    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 3, p, x)
    v = torch.randn(3).double()
    (slope,) = torch.autograd.grad((op @ v).sum(), p)
    expected = (6 * (x @ v) * x.sum(1)).unsqueeze(1) * x
    oracles.assert_same(slope, expected.sum(0), 1e-10)


# ------------------------------------------------------------------------------------- refusals


def test_batch_statistics_are_refused_and_their_eval_mode_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    model(torch.randn(20, 4).double())
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for reduction in ("none", "mean"):
        f, params = functional_loss(model, nn.CrossEntropyLoss(reduction=reduction))
        with pytest.raises(
            ValueError, match=r"batch normalisation uses the statistics of the batch"
        ):
            per_sample_hessian_operator(f, params, x, y)
    model_fn, params = functional_model(model)
    with pytest.raises(ValueError, match="Put the module into eval mode"):
        per_sample_ggn_operator(model_fn, F.cross_entropy, params, x, y)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.eval()
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    op = per_sample_hessian_operator(f, params, x, y)
    alone, _ = functional_loss(model, nn.CrossEntropyLoss())
    H = matrices(lambda *args: oracles.hessian(alone, params, *args, model=model), (x, y))
    oracles.assert_same(exact_trace(op), H.diagonal(dim1=1, dim2=2).sum(1), 1e-10)


@pytest.mark.parametrize("reduce", ["none", "mean", "sum"])
def test_losses_that_look_at_other_samples_are_refused(reduce: str) -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        losses = ((x - x.mean(0)) @ p) ** 2
        return losses if reduce == "none" else getattr(losses, reduce)()

    with pytest.raises(ValueError, match="the samples of the batch influence each other"):
        per_sample_hessian_operator(f, torch.ones(3), torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_means_are_refused(dtype: torch.dtype) -> None:
    """Alone, each sample would lose its weight."""
    model, x, _ = small("mlp")
    model, x = model.to(dtype), x.to(dtype)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0], dtype=dtype))
    y = torch.tensor([0, 1, 2, 1, 0])
    f, params = functional_loss(model, loss)
    weighted = r"or are weighted: .* neither the sum .* nor the mean"
    with pytest.raises(ValueError, match=weighted):
        per_sample_hessian_operator(f, params, x, y)
    model_fn, params = functional_model(model)
    with pytest.raises(ValueError, match=weighted):
        per_sample_ggn_operator(model_fn, loss, params, x, y)


def test_ignored_targets_are_named() -> None:
    model, x, _ = small("mlp")
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="2 of 5 samples have a loss of NaN alone, as by ignored"):
        per_sample_hessian_operator(f, params, x, torch.tensor([0, -100, 2, 1, -100]))
    f, params = functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    op = per_sample_hessian_operator(f, params, x, torch.tensor([0, -100, 2, 1, -100]))
    assert ((exact_trace(op) == 0) == torch.tensor([False, True, False, False, True])).all()


def test_a_loss_over_pairs_is_refused_by_gauss_newton_too() -> None:
    pairs = lambda z, y: (z - z.roll(1, 0)).square().mean()  # noqa: E731
    model_fn = lambda p, x: x @ p  # noqa: E731
    with pytest.raises(ValueError, match="the samples of the batch influence each other"):
        per_sample_ggn_operator(model_fn, pairs, torch.ones(3), torch.randn(4, 3), torch.ones(4))


def test_bad_batches_are_refused() -> None:
    f = lambda p, x, y: (x @ p - y) ** 2  # noqa: E731
    p = torch.ones(3)
    where = "^per_sample_hessian_operator: "
    with pytest.raises(
        ValueError, match=where + "every tensor of the batch needs the same leading"
    ):
        per_sample_hessian_operator(f, p, torch.ones(4, 3), torch.ones(3))
    with pytest.raises(ValueError, match=where + "every tensor .* of no tensor"):
        per_sample_hessian_operator(lambda p: p.sum(), p)
    with pytest.raises(ValueError, match=where + "the batch has no samples"):
        per_sample_hessian_operator(f, p, torch.ones(0, 3), torch.ones(0))
    with pytest.raises(ValueError, match=where + "every tensor .* got lengths 4, none"):
        per_sample_hessian_operator(f, p, torch.ones(4, 3), torch.ones(()))
    with pytest.raises(ValueError, match=r"must be one number, or one for each of 4 samples, got"):
        per_sample_hessian_operator(lambda p, x: x * p, p, torch.ones(4, 3))
    with pytest.raises(TypeError, match=where + "f must be a function"):
        per_sample_hessian_operator(3, p, torch.ones(4, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outputs need the leading axis of the 4 samples, got"):
        per_sample_ggn_operator(
            lambda p, x: (x @ p).sum(), lambda z, y: z**2, p, torch.ones(4, 3), torch.ones(4)
        )


def test_bad_vectors_are_refused() -> None:
    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 2, torch.ones(3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="PerSampleOperator @ v: v must match params"):
        op @ torch.ones(4)
    with pytest.raises(ValueError, match=r"expected shape \(k, 3\)"):
        op.mm(torch.ones(2, 4))
    assert op.mm(torch.ones(0, 3)).shape == (0, 4, 3)
    assert repr(op) == "PerSampleOperator(4 x 3 x 3, torch.float32, cpu)"


def test_bad_options_of_top_eigenpairs_are_refused() -> None:
    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 2, torch.ones(3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"which must be one of 'LM', 'LA', 'SA', got 'SM'"):
        top_eigenpairs(op, which="SM")  # type: ignore[arg-type]
    whole = hessian_operator(lambda p: (p**2).sum(), torch.ones(3))
    with pytest.raises(TypeError, match="must be a PerSampleOperator, got LinearOperator"):
        top_eigenpairs(whole)  # type: ignore[arg-type]
    complex_ = dataclasses.replace(op, like=torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="the space must be real"):
        top_eigenpairs(complex_)


def test_it_says_the_same_as_vmap_of_hvp() -> None:
    p = problems.load("mlp_gelu")
    v = oracles.random_like(p.params, 2)
    op: PerSampleOperator = per_sample_hessian_operator(p.f, p.params, *p.args)

    def one(x: Tensor, y: Tensor) -> Any:
        return hvp(p.f)(p.params, v, x[None], y[None])

    oracles.assert_same(op @ v, torch.func.vmap(one)(*p.args), 1e-12)
