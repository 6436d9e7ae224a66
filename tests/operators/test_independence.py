"""Samples that depend on each other where it hardly shows: at zeros, in pairs, under dropout; rows of odd models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    exact_diagonal,
    exact_trace,
    fisher_operator,
    functional_loss,
    functional_model,
    ggn_operator,
    hutchinson_diagonal,
    hutchinson_trace,
    likelihoods,
    per_sample_ggn_operator,
    per_sample_hessian_operator,
    top_eigenpairs,
    tree,
)
from tests import oracles

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
INFLUENCE = "the samples of the batch influence each other"


def assert_rows_are_right(op: Any) -> None:
    """Compare exact traces and diagonals with the dense matrix."""
    dense = op.dense()
    oracles.assert_same(exact_trace(op).to(dense), dense.trace(), 1e-9)
    oracles.assert_same(oracles.flat(exact_diagonal(op)).to(dense), dense.diagonal(), 1e-9)


@pytest.mark.parametrize("count", [4, 6, 8])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, _: ((z[0::2] - z[1::2]) ** 2).sum(),
        lambda z, _: (z[0] - z[1]) ** 2 + z.pow(2).sum(),
        lambda z, _: z.pow(2).sum() + z[-1] * z[-2],
    ],
)
def test_losses_over_pairs_are_taken_as_one_block(loss: Any, count: int) -> None:
    model = lambda p, x: torch.tanh(x @ p)  # noqa: E731
    params = torch.randn(12).double()
    x = torch.randn(count, 12).double()
    assert_rows_are_right(ggn_operator(model, loss, params, x, None))


@pytest.mark.parametrize(
    "model", [lambda p, x: (x - x.mean(0)) @ p, lambda p, x: (x @ p).cumsum(0)]
)
def test_models_that_mix_samples_at_a_zero(model: Any) -> None:
    weights = torch.rand(8, 3).double()
    loss = lambda z, w: (w * z**2).sum()  # noqa: E731
    zeros = torch.zeros(6, 3).double()
    assert_rows_are_right(ggn_operator(model, loss, zeros, X, weights))
    with pytest.raises(ValueError, match=INFLUENCE):
        per_sample_ggn_operator(model, loss, zeros, X, weights)


def test_losses_that_mix_samples_at_a_zero() -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        return (((x - x.mean(0)) @ p) ** 2).sum(1) + (x @ p).sum(1).exp()

    with pytest.raises(ValueError, match=INFLUENCE):
        per_sample_hessian_operator(f, torch.zeros(6, 2).double(), X)
    layer = nn.Linear(6, 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    f, params = functional_loss(layer, loss)
    y = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    with pytest.raises(ValueError, match="or are weighted"):
        per_sample_hessian_operator(f, params, X, y)
    model_fn, params = functional_model(layer)
    with pytest.raises(ValueError, match="or are weighted"):
        per_sample_ggn_operator(model_fn, loss, params, X, y)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()


def test_rows_have_the_dropout_mask_of_the_products() -> None:
    model_fn, params = functional_model(dropping())
    y = torch.randn(8, 1).double()
    for make in (
        lambda: ggn_operator(model_fn, nn.MSELoss(), params, X, y),
        lambda: fisher_operator(model_fn, likelihoods.gaussian(), params, X),
        lambda: fisher_operator(model_fn, likelihoods.gaussian(), params, X, num_samples=3),
    ):
        op = make()
        dense = op.dense()
        torch.rand(7)  # someone draws in between
        oracles.assert_same(exact_trace(op), dense.trace(), 1e-10)
    each = per_sample_ggn_operator(model_fn, nn.MSELoss(), params, X, y)
    diagonals = _diagonals(each)
    torch.rand(7)
    oracles.assert_same(exact_trace(each), diagonals.sum(0), 1e-10)


def _diagonals(op: Any) -> Tensor:
    """Return `(entries, samples)` by products with all unit vectors."""
    n = op.shape[0]
    products = op.mm(op.basis(slice(0, n)))
    flat = torch.cat(
        [leaf.reshape(n, op.num_samples, -1) for leaf in oracles.leaves_of(products)], 2
    )
    return flat.diagonal(dim1=0, dim2=2).T


def test_dropout_alone_has_the_mask_of_one_sample() -> None:
    """What is asked is a mask of one sample's shape, for all; not one for the chunk."""
    model_fn, params = functional_model(dropping())
    f = lambda p, x: (model_fn(p, x) ** 2).mean()  # noqa: E731
    op = per_sample_hessian_operator(f, params, X[:1].expand(5, -1))
    found = exact_trace(op)
    oracles.assert_same(found, found[:1].expand(5), 1e-10)
    each = per_sample_hessian_operator(lambda p, x: (model_fn(p, x) ** 2).sum(1), params, X)
    oracles.assert_same(exact_trace(each), _diagonals(each).sum(0), 1e-10)


def test_other_samples_are_noticed_under_dropout() -> None:
    def f(p: Tensor, x: Tensor) -> Tensor:
        return F.dropout((x - x.mean(0)) @ p, 0.5).square().sum(1)

    with pytest.raises(ValueError, match="others change their losses"):
        per_sample_hessian_operator(f, torch.randn(6, 4).double(), X)
    fine = per_sample_hessian_operator(
        lambda p, x: F.dropout(x @ p, 0.5).square().sum(1), torch.randn(6, 4).double(), X
    )
    assert (exact_trace(fine) > 0).all()
    with pytest.raises(ValueError, match="other outputs than alone"):
        per_sample_ggn_operator(
            lambda p, x: F.dropout((x - x.mean(0)) @ p, 0.5),
            lambda z, _: (z**2).sum(),
            torch.randn(6, 4).double(),
            X,
            torch.zeros(8),
        )


def test_complex_outputs() -> None:
    params = torch.randn(6, 3).double()
    model = lambda p, x: x.to(torch.complex128) @ p.to(torch.complex128)  # noqa: E731
    for loss in (lambda z, _: (z.abs() ** 2).sum(), lambda z, _: (z**2).real.sum()):
        op = ggn_operator(model, loss, params, X, None)
        dense = op.dense()
        oracles.assert_same(exact_trace(op), dense.trace(), 1e-10)


def test_zero_dim_parameters() -> None:
    params = {"s": torch.tensor(0.5).double(), "w": torch.randn(6).double()}
    model = lambda p, x: torch.tanh(x @ p["w"] * p["s"])  # noqa: E731
    loss = lambda z, _: (z**2).sum()  # noqa: E731
    assert_rows_are_right(ggn_operator(model, loss, params, X, None))
    each = per_sample_ggn_operator(model, loss, params, X, torch.zeros(8))
    oracles.assert_same(exact_trace(each), _diagonals(each).sum(0), 1e-10)
    diagonal = exact_diagonal(each)
    assert {n: tuple(leaf.shape) for n, leaf in diagonal.items()} == {"s": (8,), "w": (8, 6)}
    found = top_eigenpairs(each)
    oracles.assert_same(found.eigenvalues, exact_trace(each), 1e-10)  # of rank one


def test_batch_normalisation_in_training_mode() -> None:
    for norm, x in ((nn.BatchNorm1d(4), X), (nn.BatchNorm1d(4, track_running_stats=False), X)):
        model = nn.Sequential(nn.Linear(6, 4), norm, nn.Linear(4, 2)).double()
        model_fn, params = functional_model(model)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        op = ggn_operator(model_fn, nn.MSELoss(), params, x, torch.zeros(8, 2).double())
        assert_rows_are_right(op)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_autocast_and_empty_outputs() -> None:
    layer = nn.Linear(6, 2)
    model_fn, params = functional_model(layer)

    def cast(p: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model_fn(p, x)

    op = ggn_operator(cast, lambda z, _: (z.float() ** 2).sum(), params, X.float(), None)
    found, dense = exact_trace(op), op.dense().trace()
    assert found.dtype == torch.float32
    assert oracles.relative_error(found, dense) < 0.02
    two = lambda p, x: (x @ p, x[:, :0] @ p[:0])  # noqa: E731
    op = ggn_operator(two, lambda z, _: (z[0] ** 2).sum(), torch.randn(6, 2).double(), X, None)
    oracles.assert_same(exact_trace(op), op.dense().trace(), 1e-10)


def test_small_numbers_in_half_precision_are_summed_wide() -> None:
    params, x = torch.full((1000,), 0.1).half(), torch.full((4, 1000), 1e-4).half()
    model = lambda p, x: (x.float() @ p.float()).half()  # noqa: E731
    op = ggn_operator(model, lambda z, _: (z.float() ** 2).sum(), params, x, None)
    truth = 2 * x.double().square().sum()
    assert oracles.relative_error(exact_trace(op), truth) < 1e-2


def test_a_vmap_around_an_operator_made_outside() -> None:
    model = lambda p, x: torch.tanh(x @ p)  # noqa: E731
    op = ggn_operator(model, lambda z, _: (z**2).sum(), torch.randn(6).double(), X, None)
    found = torch.func.vmap(lambda s: exact_trace(op) * s)(torch.ones(2).double())
    oracles.assert_same(found, op.dense().trace().expand(2), 1e-10)


def test_data_that_changed_in_place_are_noticed() -> None:
    x = X.clone()
    model = lambda p, x: torch.tanh(x @ p)  # noqa: E731
    op = ggn_operator(model, lambda z, _: (z**2).sum(), torch.randn(6).double(), x, None)
    each = per_sample_hessian_operator(lambda p, x: (x @ p) ** 2, torch.randn(6).double(), x)
    x.mul_(2)
    for call in (
        lambda: exact_trace(op),
        lambda: hutchinson_trace(op, 4),
        lambda: exact_trace(each),
    ):
        with pytest.raises(RuntimeError, match="the data were changed in place"):
            call()


def test_eigenpairs_of_samples_of_different_sizes_and_signs() -> None:
    model, loss = (lambda p, x: x @ p), (lambda z, y: (y * z**2).sum() / 2)
    y = torch.tensor([1e6, -0.5])
    op = per_sample_ggn_operator(model, loss, torch.randn(6), X[:2].float(), y)
    truth = y * X[:2].float().square().sum(1)
    assert (top_eigenpairs(op).eigenvalues - truth).abs().max() < 1e-4 * truth.abs().max()
    assert float(top_eigenpairs(op).eigenvalues[1]) == pytest.approx(float(truth[1]), rel=1e-4)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rtol must be positive and finite"):
            top_eigenpairs(op, rtol=bad)


def test_one_sample_with_nan_leaves_the_others_alone() -> None:
    x = X.clone()
    x[2] = float("nan")
    op = per_sample_hessian_operator(lambda p, x: (x @ p) ** 2, torch.randn(6).double(), x)
    with pytest.warns(UserWarning, match="1 of 8 residuals are above the tolerance .* or NaN"):
        found = top_eigenpairs(op)
    assert not found.converged
    expected = 2 * x.square().sum(1)
    good = torch.arange(8) != 2
    assert found.eigenvalues[2].isnan()
    oracles.assert_same(found.eigenvalues[good], expected[good], 1e-8)


def test_an_estimate_is_not_continued_for_other_samples() -> None:
    f = lambda p, x: (x @ p) ** 2  # noqa: E731
    one, many = (per_sample_hessian_operator(f, torch.randn(6).double(), x) for x in (X[:1], X))
    for estimate in (hutchinson_diagonal, hutchinson_trace):
        with pytest.raises(
            ValueError, match=r"resume was made with samples \[1\], here it is \[8\]"
        ):
            estimate(many, 16, resume=estimate(one, 8))


def test_making_an_operator_draws_as_one_evaluation() -> None:
    model_fn, params = functional_model(dropping())
    f = lambda p, x: (model_fn(p, x) ** 2).sum(1)  # noqa: E731
    torch.manual_seed(5)
    f(params, X)
    expected = torch.rand(1)
    torch.manual_seed(5)
    per_sample_hessian_operator(f, params, X)
    assert torch.equal(torch.rand(1), expected)


def test_large_output_spaces_are_left_to_forms() -> None:
    model = lambda p, x: torch.tanh(x @ p).repeat(1, 200)  # noqa: E731
    params = torch.randn(6, 10).double()
    op = ggn_operator(model, lambda z, _: (z**2).sum(), params, X, None)
    assert op.rows is not None
    assert not op.rows.cheaper()
    oracles.assert_same(exact_trace(op), op.dense().trace(), 1e-10)
    assert tree.numel(params) == 60


def sure() -> tuple[Any, Any, Tensor, Tensor]:
    """Return the model of a network that is sure of its labels: of its losses little but rounding is left."""
    drawn = torch.Generator().manual_seed(6)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_(5 * torch.randn(3, 6, generator=drawn))
    x = torch.randn(90, 6, generator=drawn)
    with torch.no_grad():
        top = layer(x).sort(1).values
        kept = (top[:, 2] - top[:, 1]) > 13
        y = layer(x).argmax(1)
    model_fn, params = functional_model(layer)
    assert 10 < int(kept.sum()) < 30
    return model_fn, params, x[kept], y[kept]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_little_is_left_of_fitted_losses_is_not_taken_for_influence(reduction: str) -> None:
    model_fn, params, x, y = sure()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    p = model_fn({n: t.double() for n, t in params.items()}, x.double()).softmax(1)
    expected = (p * (1 - p)).sum(1) * (1 + x.double().square().sum(1))
    assert float(expected.max()) < 1e-3
    hessian = per_sample_hessian_operator(
        lambda q, x, y: loss(model_fn(q, x), y), params, x, y, mode="reverse_over_reverse"
    )
    gauss_newton = per_sample_ggn_operator(model_fn, loss, params, x, y)
    for op in (hessian, gauss_newton):
        found = exact_trace(op).double()
        # In float32 a probability next to one has rounded away what is missing.
        assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_influence_on_fitted_losses_is_refused(reduction: str) -> None:
    model_fn, params, x, y = sure()
    loss = nn.CrossEntropyLoss(reduction=reduction)

    def mixing(q: Any, x: Tensor) -> Tensor:
        return model_fn(q, x + 0.1 * x.mean(0))

    with pytest.raises(ValueError, match=INFLUENCE):
        per_sample_hessian_operator(lambda q, x, y: loss(mixing(q, x), y), params, x, y)
    with pytest.raises(ValueError, match=INFLUENCE):
        per_sample_ggn_operator(mixing, loss, params, x, y)


def test_influence_that_shows_only_here_is_refused() -> None:
    """At other parameters a unit is dead, a hinge is inactive, a small term drowns."""
    x = torch.rand(12, 1) + 0.5
    p = torch.ones(1)

    def dead(p: Tensor, x: Tensor) -> Tensor:
        z = torch.relu(x @ p)
        return z.square() + (z - z.mean()).square()

    def hinged(p: Tensor, x: Tensor) -> Tensor:
        z = 1e-3 * x @ p
        return z.square() + torch.relu(0.05 - (z[:, None] - z).abs()).sum(1)

    def small(p: Tensor, x: Tensor) -> Tensor:
        z = x @ p
        return (z - x[:, 0] - 1e-4).square().square() + 3e-5 * (z - z.mean()).square()

    for loss in (dead, hinged, small):
        with pytest.raises(ValueError, match=INFLUENCE):
            per_sample_hessian_operator(loss, p, x)


@pytest.mark.parametrize("names", [["a"] * 40 + ["b"] * 5, ("a",) * 45, {"inner": list(range(45))}])
def test_a_list_with_an_item_for_each_sample_is_refused(names: Any) -> None:
    def f(p: Tensor, x: Tensor, names: Any) -> Tensor:
        return (x @ p).square().mean()

    x = torch.randn(45, 4).double()
    with pytest.raises(ValueError, match="a list with an item for each of its 45 samples"):
        per_sample_hessian_operator(f, torch.ones(4).double(), x, names)
    op = per_sample_hessian_operator(f, torch.ones(4).double(), x, (45, 45))  # no list of samples
    oracles.assert_same(exact_trace(op), 2 * x.square().sum(1), 1e-10)
