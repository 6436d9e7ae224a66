"""Fisher operators against Gauss-Newton oracles, sums over all labels, and loops over samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.func import functional_call, vmap

from secorder_func import LinearOperator, exact_trace
from secorder_func.operators.fisher import (
    empirical_fisher_operator,
    fisher_model,
    fisher_operator,
)
from secorder_func.transforms import likelihoods
from tests import oracles, problems

MODES = ["auto", "reverse_over_forward", "forward_over_reverse", "reverse_over_reverse"]
ALL_MODES = [*MODES, "double_backward"]
LABELLED = ["softmax_regression", "mlp_gelu", "mlp_relu", "cnn_batchnorm_train", "tied_embeddings"]
MEASURED = ["mlp_tanh", "lstm", "layer_norm", "dropout", "frozen_and_unused", "encoder_train"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fisher_of(name: str, likelihood: Any, **options: Any) -> LinearOperator:
    problem = problems.load(name)
    torch.manual_seed(5)
    return fisher_operator(problem.model_fn, likelihood, problem.params, problem.args[0], **options)


def ggn_of(name: str, loss_fn: Any, targets: Any = None) -> Tensor:
    problem = problems.load(name)
    inputs, given = problem.args
    torch.manual_seed(5)
    return oracles.ggn(
        problem.model_fn,
        loss_fn,
        problem.params,
        inputs,
        given if targets is None else targets,
        model=problem.model,
    )


def rows_of(problem: problems.Problem, entries: Callable[[Any], Tensor]) -> Tensor:
    """Return the gradients of all entries of a function of the outputs, one backward pass each."""
    fresh = optree.tree_map(lambda p: p.detach().clone().requires_grad_(), problem.params)
    with oracles.untouched(problem.model), torch.enable_grad():
        torch.manual_seed(5)
        values = entries(problem.model_fn(fresh, problem.args[0]))  # type: ignore[misc]
        leaves = oracles.leaves_of(fresh)
        rows = [
            oracles.flat(
                [
                    torch.zeros_like(leaf) if g is None else g
                    for leaf, g in zip(
                        leaves,
                        torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for v in values.reshape(-1)
        ]
    return torch.stack(rows)


def _language_model() -> problems.Problem:
    """Return a model of tokens (N, T) with outputs (N, T, V)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
        tokens, targets = torch.randint(5, (3, 4)), torch.randint(5, (3, 4))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    model_fn = lambda p, x: functional_call(model, p, (x,))  # noqa: E731
    return problems.Problem("tokens", lambda p: p, params, (tokens, targets), model_fn, model=model)


TOKENS = _language_model()


# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LABELLED)
def test_the_fisher_of_labels_is_the_ggn_of_the_cross_entropy(
    name: str, reduction: Any, mode: Any
) -> None:
    op = fisher_of(name, likelihoods.categorical(), reduction=reduction, mode=mode)
    expected = ggn_of(name, nn.CrossEntropyLoss(reduction=reduction))
    oracles.assert_same(op.dense(), expected, 1e-12)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MEASURED)
def test_the_fisher_of_variance_one_half_is_the_ggn_of_the_squared_error(
    name: str, reduction: Any, mode: Any
) -> None:
    op = fisher_of(name, likelihoods.gaussian(0.5), reduction=reduction, mode=mode)
    expected = ggn_of(name, nn.MSELoss(reduction=reduction))
    oracles.assert_same(op.dense(), expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_fisher_of_binary_labels_is_the_ggn_of_the_binary_cross_entropy(reduction: Any) -> None:
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    labels = torch.randint(2, (8, 3)).double()
    op = fisher_of("mlp_tanh", likelihoods.bernoulli(), reduction=reduction)
    oracles.assert_same(op.dense(), ggn_of("mlp_tanh", loss, labels), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [-1, 1])
def test_the_fisher_of_tokens_is_the_ggn_of_the_cross_entropy(classes: int, reduction: Any) -> None:
    tokens, targets = TOKENS.args
    model_fn: Any = TOKENS.model_fn
    if classes == 1:
        model_fn = lambda p, x: TOKENS.model_fn(p, x).transpose(1, 2)  # type: ignore[misc] # noqa: E731
    along = lambda z: z if classes == 1 else z.transpose(1, 2)  # noqa: E731
    loss = lambda z, y: F.cross_entropy(along(z), y, reduction=reduction)  # noqa: E731
    likelihood = likelihoods.categorical(axis=classes)
    op = fisher_operator(model_fn, likelihood, TOKENS.params, tokens, reduction=reduction)
    oracles.assert_same(
        op.dense(), oracles.ggn(model_fn, loss, TOKENS.params, tokens, targets), 1e-12
    )


def test_the_fisher_is_the_expected_outer_product_of_scores_over_all_labels() -> None:
    problem = problems.load("mlp_gelu")
    scores = rows_of(problem, lambda z: z.log_softmax(1))
    weights = problem.model_fn(problem.params, problem.args[0]).softmax(1).reshape(-1)  # type: ignore[misc]
    op = fisher_of("mlp_gelu", likelihoods.categorical(), reduction="sum")
    oracles.assert_same(op.dense(), scores.T @ (weights[:, None] * scores), 1e-12)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_fisher_of_a_learned_scale_equals_the_formula(mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    means = rows_of(problem, lambda z: z[:, 0])
    logs = rows_of(problem, lambda z: z[:, 1])  # of the scale
    outputs = problem.model_fn(problem.params, problem.args[0])  # type: ignore[misc]
    expected = means.T @ (means / outputs[:, 1].exp().square()[:, None]) + 2 * logs.T @ logs
    likelihood = lambda z: Normal(z[:, 0], z[:, 1].exp())  # noqa: E731
    op = fisher_of("mlp_tanh", likelihood, reduction="sum", mode=mode)
    oracles.assert_same(op.dense(), expected, 1e-12)


def test_the_fisher_of_counts_equals_the_formula() -> None:
    problem = problems.load("mlp_tanh")
    logs = rows_of(problem, lambda z: z)
    rates = problem.model_fn(problem.params, problem.args[0]).exp().reshape(-1)  # type: ignore[misc]
    op = fisher_of("mlp_tanh", lambda z: distributions.Poisson(z.exp()))
    oracles.assert_same(op.dense(), logs.T @ (rates[:, None] * logs) / 24, 1e-12)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_fisher_of_a_correlated_normal_equals_the_formula(mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.4, 0.7]]).double()
    J = rows_of(problem, lambda z: z).reshape(8, 3, -1)
    expected = torch.einsum("nap,ab,nbq->pq", J, torch.linalg.inv(factor @ factor.T), J) / 8
    likelihood = lambda z: distributions.MultivariateNormal(z, scale_tril=factor)  # noqa: E731
    op = fisher_of("mlp_tanh", likelihood, mode=mode)
    oracles.assert_same(op.dense(), expected, 1e-12)


def test_independent_entries_count_as_one_in_the_mean() -> None:
    each = fisher_of("mlp_tanh", likelihoods.gaussian())
    joint = fisher_of("mlp_tanh", lambda z: Independent(Normal(z, 1.0), 1))
    assert oracles.relative_error(joint.dense(), 3 * each.dense()) < 1e-12
    oracles.assert_same(each.dense(), ggn_of("mlp_tanh", nn.MSELoss()) / 2, 1e-12)


def test_a_likelihood_takes_any_tree_of_outputs() -> None:
    likelihood = lambda z: Normal(z["one"].sum(1), z["two"][0][:, 0].exp())  # noqa: E731
    problem = problems.load("tree_outputs")
    means = rows_of(problem, lambda z: z["one"].sum(1))
    logs = rows_of(problem, lambda z: z["two"][0])
    scale = problem.model_fn(problem.params, problem.args[0])["two"][0].exp()  # type: ignore[misc]
    expected = means.T @ (means / scale.square()) + 2 * logs.T @ logs
    oracles.assert_same(
        fisher_of("tree_outputs", likelihood, reduction="sum").dense(), expected, 1e-12
    )


def test_outputs_without_an_axis_of_samples_have_an_exact_fisher() -> None:
    weights = torch.randn(3, 2).double()
    op = fisher_operator(
        lambda w, x: x @ w, likelihoods.categorical(), weights, torch.ones(3).double()
    )
    p = weights.sum(0).softmax(0)
    expected = torch.kron(torch.ones(3, 3).double(), torch.diag(p) - torch.outer(p, p))
    oracles.assert_same(op.dense(), expected, 1e-12)


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("likelihood", [likelihoods.categorical(), likelihoods.gaussian()])
def test_forms_and_traces_are_those_of_the_dense_matrix(
    likelihood: Any, num_samples: int | None
) -> None:
    problem = problems.load("mlp_gelu")
    op = fisher_of("mlp_gelu", likelihood, num_samples=num_samples)
    dense = op.dense()
    vectors = [oracles.random_like(problem.params, seed) for seed in range(4)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vectors)
    expected = torch.stack([oracles.flat(v) @ dense @ oracles.flat(v) for v in vectors])
    assert op.forms is not None
    oracles.assert_same(op.forms.of(stacked), expected, 1e-11)
    oracles.assert_same(exact_trace(op), dense.trace(), 1e-11)


# ------------------------------------------------------------------------------------------- draws

SAMPLED: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "labels": (
        likelihoods.categorical(),
        lambda z, y: z.log_softmax(1).gather(1, y[:, None]).squeeze(1),
    ),
    "binary": (
        likelihoods.bernoulli(),
        lambda z, y: y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z),
    ),
    "real": (likelihoods.gaussian(0.3), lambda z, y: -(z - y).square() / 0.6),
    "laplace": (lambda z: distributions.Laplace(z, 2.0), lambda z, y: -(z - y).abs() / 2),
    "joint": (
        lambda z: Independent(Normal(z, 1.0), 1),
        lambda z, y: -(z - y).square().sum(1) / 2,
    ),
}
"""Likelihoods, and log-probabilities up to a constant, written down."""


def draws_of(name: str, likelihood: Any, num_samples: int, seed: int) -> Tensor:
    problem = problems.load(name)
    torch.manual_seed(5)
    _, _, (_, draws), _ = fisher_model(
        problem.model_fn,  # type: ignore[arg-type]
        likelihood,
        problem.params,
        problem.args[0],
        num_samples=num_samples,
        generator=seeded(seed),
        reduction="sum",
        where="here",
    )
    return draws


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("name", ["mlp_tanh", "dropout", "frozen_and_unused"])
def test_draws_give_the_mean_of_outer_products_of_their_scores(
    name: str, kind: str, reduction: Any, mode: Any
) -> None:
    likelihood, log_prob = SAMPLED[kind]
    draws = draws_of(name, likelihood, 3, seed=2)
    problem = problems.load(name)
    scores = [rows_of(problem, lambda z, y=y: log_prob(z, y)) for y in draws.unbind(1)]  # type: ignore[misc]
    expected = sum(row.T @ row for row in scores) / 3
    if reduction == "mean":
        expected = expected / len(scores[0])
    op = fisher_of(
        name, likelihood, num_samples=3, generator=seeded(2), reduction=reduction, mode=mode
    )
    oracles.assert_same(op.dense(), expected, 1e-12)


def test_draws_of_tokens_are_of_shape_samples_draws_tokens() -> None:
    tokens, _ = TOKENS.args
    model_fn: Any = TOKENS.model_fn
    options: Any = {"num_samples": 7, "reduction": "mean"}
    likelihood = likelihoods.categorical()
    _, _, (_, draws), _ = fisher_model(
        *(model_fn, likelihood, TOKENS.params, tokens),
        generator=seeded(3),
        where="here",
        **options,
    )
    assert draws.shape == (3, 7, 4)
    op = fisher_operator(
        model_fn, likelihood, TOKENS.params, tokens, generator=seeded(3), **options
    )
    scores = [
        rows_of(TOKENS, lambda z, y=y: z.log_softmax(2).gather(2, y[..., None]))  # type: ignore[misc]
        for y in draws.unbind(1)
    ]
    oracles.assert_same(op.dense(), sum(row.T @ row for row in scores) / (7 * 12), 1e-12)


@pytest.mark.parametrize("kind", ["labels", "binary", "real"])
def test_the_mean_over_many_draws_is_the_exact_matrix_within_its_error(kind: str) -> None:
    likelihood = SAMPLED[kind][0]
    exact = fisher_of("softmax_regression", likelihood).dense()
    generator = seeded(7)
    found = torch.stack(
        [
            fisher_of("softmax_regression", likelihood, num_samples=40, generator=generator).dense()
            for _ in range(60)
        ]
    )
    error = found.std(0) / math.sqrt(60)
    assert bool(((found.mean(0) - exact).abs() <= 5 * error + 1e-15).all())
    assert 0 < float(error.norm()) < 0.05 * float(exact.norm())


@pytest.mark.parametrize("kind", SAMPLED)
def test_more_draws_begin_with_the_fewer_of_the_same_seed(kind: str) -> None:
    likelihood = SAMPLED[kind][0]
    few, many = (draws_of("mlp_tanh", likelihood, count, seed=4) for count in (2, 5))
    assert torch.equal(many[:, :2], few)
    assert not torch.equal(many[:, 1], many[:, 0])
    assert not torch.equal(draws_of("mlp_tanh", likelihood, 2, seed=5), few)


def test_the_state_of_the_global_generator_does_not_change_the_draws() -> None:
    problem = problems.load("mlp_tanh")
    drawn = []
    for state in (1, 2):
        torch.manual_seed(state)
        drawn.append(
            fisher_operator(
                problem.model_fn,  # type: ignore[arg-type]
                likelihoods.gaussian(),
                problem.params,
                problem.args[0],
                num_samples=2,
                generator=seeded(3),
            ).dense()
        )
    oracles.assert_same(drawn[0], drawn[1], 1e-15)


def test_without_a_generator_the_global_one_decides_and_moves_on() -> None:
    sampled = lambda: fisher_operator(  # noqa: E731
        TOKENS.model_fn,  # type: ignore[arg-type]
        likelihoods.categorical(),
        TOKENS.params,
        TOKENS.args[0],
        num_samples=1,
    ).dense()
    torch.manual_seed(1)
    first, second = sampled(), sampled()
    torch.manual_seed(1)
    assert torch.equal(sampled(), first)
    assert oracles.relative_error(second, first) > 1e-3


@pytest.mark.parametrize("kind", ["labels", "binary", "real"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_gives_the_matrix_to_its_precision(kind: str, dtype: Any) -> None:
    problem = problems.load("mlp_tanh")
    likelihood = SAMPLED[kind][0]
    params, inputs = optree.tree_map(lambda t: t.to(dtype), (problem.params, problem.args[0]))
    exact = fisher_operator(problem.model_fn, likelihood, params, inputs)  # type: ignore[arg-type]
    rtol = 1e-5 if dtype == torch.float32 else 0.1
    expected = fisher_of("mlp_tanh", likelihood).dense()
    oracles.assert_same(exact.dense(), expected.to(dtype), rtol)
    sampled = fisher_operator(
        problem.model_fn,  # type: ignore[arg-type]
        likelihood,
        params,
        inputs,
        num_samples=500,
        generator=seeded(1),
    )
    oracles.assert_same(sampled.dense(), expected.to(dtype), 0.3)


# --------------------------------------------------------------------------------------- empirical

EMPIRICAL = {
    "mlp_gelu": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "cnn_batchnorm_train": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "cnn_batchnorm_eval": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "tied_embeddings": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "frozen_and_unused": lambda z, y: F.mse_loss(z, y, reduction="none").sum(1),
    "lstm": lambda z, y: F.mse_loss(z, y, reduction="none").sum(1),
    "encoder_train": lambda z, y: F.mse_loss(z, y, reduction="none").flatten(1).sum(1),
    "dropout": lambda z, y: F.mse_loss(z, y, reduction="none").mean(1),
}


def empirical_of(name: str, **options: Any) -> LinearOperator:
    problem = problems.load(name)
    torch.manual_seed(5)
    return empirical_fisher_operator(
        problem.model_fn,  # type: ignore[arg-type]
        EMPIRICAL[name],
        problem.params,
        *problem.args,
        **options,
    )


def outer_products(name: str) -> Tensor:
    problem = problems.load(name)
    rows = rows_of(problem, lambda z: EMPIRICAL[name](z, problem.args[1]))
    return rows.T @ rows


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", EMPIRICAL)
def test_the_empirical_fisher_is_the_sum_of_outer_products_of_gradients(
    name: str, mode: Any
) -> None:
    op = empirical_of(name, reduction="sum", mode=mode)
    oracles.assert_same(op.dense(), outer_products(name), 1e-12)


@pytest.mark.parametrize("name", ["mlp_gelu", "dropout"])
def test_the_mean_of_the_empirical_fisher_divides_by_the_samples(name: str) -> None:
    oracles.assert_same(empirical_of(name).dense(), outer_products(name) / 8, 1e-12)


def test_the_empirical_fisher_in_float32_is_that_of_float64() -> None:
    problem = problems.load("mlp_gelu")
    params = optree.tree_map(lambda p: p.float(), problem.params)
    x, y = problem.args
    op = empirical_fisher_operator(problem.model_fn, EMPIRICAL["mlp_gelu"], params, x.float(), y)  # type: ignore[arg-type]
    oracles.assert_same(op.dense(), outer_products("mlp_gelu").float() / 8, 1e-5)


def test_the_empirical_fisher_has_forms() -> None:
    problem = problems.load("mlp_gelu")
    op, vectors = empirical_of("mlp_gelu"), oracles.random_like(problem.params, 1)
    stacked = optree.tree_map(lambda leaf: leaf[None], vectors)
    assert op.forms is not None
    v = oracles.flat(vectors)
    expected = (v @ outer_products("mlp_gelu") @ v / 8)[None]
    oracles.assert_same(op.forms.of(stacked), expected, 1e-12)


# -------------------------------------------------------------------------------- safety and state

KINDS: dict[str, Callable[..., LinearOperator]] = {
    "exact": lambda p, **o: fisher_operator(
        p.model_fn, likelihoods.gaussian(), p.params, p.args[0], **o
    ),
    "sampled": lambda p, **o: fisher_operator(
        p.model_fn,
        likelihoods.gaussian(),
        p.params,
        p.args[0],
        num_samples=2,
        generator=seeded(1),
        **o,
    ),
    "empirical": lambda p, **o: empirical_fisher_operator(
        p.model_fn, lambda z, y: (z - y).square().sum(1), p.params, *p.args, **o
    ),
}


def moved_to(problem: problems.Problem, params: Any) -> problems.Problem:
    return problems.Problem("moved", problem.f, params, problem.args, problem.model_fn)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_gradient_mode_does_not_change_the_matrix(kind: str, context: Any) -> None:
    problem = problems.load("mlp_tanh")
    with context():
        dense = KINDS[kind](problem).dense()
    oracles.assert_same(dense.clone(), KINDS[kind](problem).dense(), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_require_gradients_give_the_same_matrix(kind: str) -> None:
    problem = problems.load("mlp_tanh")
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    found = KINDS[kind](moved_to(problem, params)).dense().detach()
    oracles.assert_same(found, KINDS[kind](problem).dense(), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_global_random_state_is_left_as_by_one_evaluation(kind: str, mode: Any) -> None:
    problem = problems.load("dropout")
    torch.manual_seed(3)
    problem.model_fn(problem.params, problem.args[0])  # type: ignore[misc]
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    KINDS[kind](problem, mode=mode)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_left_as_it_was(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    model_fn = lambda p, x: functional_call(model, p, (x,))  # noqa: E731
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    op = KINDS[kind](problems.Problem("bn", lambda p: p, params, (x, y), model_fn))
    oracles.assert_acts(op.dense(), torch.eye(op.shape[0]).double())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.state_dict().items())


class Failing(nn.Module):
    """A head that fails after what stands before it has drawn, written and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        raise KeyError("the user's own")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_users_leaves_nothing_changed(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), Failing()).double()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    model_fn = lambda p, x: functional_call(model, p, (x,))  # noqa: E731
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    validates, grads = Distribution._validate_args, torch.is_grad_enabled()
    with pytest.raises(KeyError, match="the user's own"):
        KINDS[kind](problems.Problem("bad", lambda p: p, params, (x, y), model_fn))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.state_dict().items())
    assert (Distribution._validate_args, torch.is_grad_enabled()) == (validates, grads)
    assert not torch.is_inference_mode_enabled()


def test_parameters_changed_in_place_are_detected() -> None:
    problem = problems.load("mlp_tanh")
    params = {k: p.clone() for k, p in problem.params.items()}
    op = KINDS["sampled"](moved_to(problem, params))
    params["0.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="parameter was changed in place"):
        op @ params


# --------------------------------------------------------------------------------- transforms around

scaled = lambda z: Normal(z[:, 0], F.softplus(z[:, 1]) + z[:, 2].square())  # noqa: E731


@pytest.mark.parametrize("mode", ["auto", "reverse_over_reverse", "double_backward"])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_the_gradient_of_a_form_in_the_parameters_is_that_of_the_matrix(
    num_samples: int | None, mode: Any
) -> None:
    problem = problems.load("mlp_tanh")
    inputs = problem.args[0]
    v, w = (oracles.random_like(problem.params, seed) for seed in (1, 2))
    model, loss, both, _ = fisher_model(
        problem.model_fn,  # type: ignore[arg-type]
        scaled,
        problem.params,
        inputs,
        num_samples=num_samples or 2,
        generator=seeded(1),
        reduction="mean",
        where="here",
    )

    def matrix(params: Any) -> Tensor:
        if num_samples:  # for these draws
            return oracles.ggn(model, loss, params, both, None)
        return fisher_operator(problem.model_fn, scaled, params, inputs).dense()  # type: ignore[arg-type]

    def form(params: Any) -> Tensor:
        op = fisher_operator(
            problem.model_fn,  # type: ignore[arg-type]
            scaled,
            params,
            inputs,
            num_samples=num_samples,
            generator=seeded(1),
            mode=mode,
        )
        return oracles.dot(v, op @ v)

    flat_v = oracles.flat(v)
    truth = oracles.directional_derivative(lambda p: flat_v @ matrix(p) @ flat_v, problem.params, w)
    params = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    plain = torch.autograd.grad(form(params), list(params.values()))
    found = oracles.dot(dict(zip(params, plain, strict=True)), w)
    assert float(found) == pytest.approx(float(truth), rel=1e-7)
    if mode != "double_backward" and num_samples is None:
        functional = torch.func.grad(form)(problem.params)
        assert float(oracles.dot(functional, w)) == pytest.approx(float(truth), rel=1e-7)


@pytest.mark.parametrize("mode", ["auto", "reverse_over_reverse", "forward_over_reverse"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_vmap_over_parameters_equals_a_loop(kind: str, mode: Any) -> None:
    problem = problems.load("mlp_tanh")
    v = oracles.random_like(problem.params, 1)
    points = [oracles.shifted(problem.params, 0.1 * k, v) for k in range(3)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *points)
    product = lambda p: KINDS[kind](moved_to(problem, p), mode=mode) @ v  # noqa: E731
    together = vmap(product)(stacked)
    loop = optree.tree_map(lambda *rows: torch.stack(rows), *(product(p) for p in points))
    oracles.assert_same(together, loop, 1e-12)


ROWS = {
    **{kind: likelihood for kind, (likelihood, _) in SAMPLED.items()},
    "validated": lambda z: Categorical(logits=z),
    "validated probabilities": lambda z: Categorical(z.softmax(1)),
    "validated scale": lambda z: Normal(z[:, 0], z[:, 1].exp()),
    "validated binary": lambda z: Bernoulli(logits=z[:, 0]),
    "validated correlated": lambda z: distributions.MultivariateNormal(
        z, torch.diag_embed(z.exp()) + 0.1
    ),
}


@pytest.mark.parametrize(
    ("name", "num_samples"),
    [(name, None) for name in ROWS if name != "laplace"] + [(name, 3) for name in ROWS],
)
def test_samples_one_by_one_under_vmap_are_the_rows_of_all(
    name: str, num_samples: int | None
) -> None:
    problem = problems.load("mlp_tanh")
    assert Distribution._validate_args
    model, loss, inputs, _ = fisher_model(
        problem.model_fn,  # type: ignore[arg-type]
        ROWS[name],
        problem.params,
        problem.args[0],
        num_samples=num_samples,
        generator=seeded(1),
        reduction="sum",
        where="here",
    )
    outputs = model(problem.params, inputs)

    def bent(inputs: Any) -> Tensor:
        """Return the Hessian of the loss in the outputs of one sample, which vmap maps over."""
        one = optree.tree_map(lambda t: t[None], inputs)
        return torch.func.hessian(lambda z: loss(z, None))(model(problem.params, one))

    together = vmap(bent)(inputs)
    each = [
        torch.autograd.functional.hessian(lambda z: loss(z, None), outputs[i : i + 1])
        for i in range(8)
    ]
    oracles.assert_same(together, torch.stack(each), 1e-11)
    rows = vmap(lambda one: model(problem.params, optree.tree_map(lambda t: t[None], one))[0])
    oracles.assert_same(rows(inputs), outputs, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_several_vectors_are_multiplied_at_once_whatever_the_distribution_validates(
    num_samples: int | None, mode: Any
) -> None:
    problem = problems.load("mlp_tanh")
    calls = []

    def likelihood(outputs: Tensor) -> Distribution:
        calls.append(1)
        return Independent(Normal(outputs[:, :1], outputs[:, 1:2].exp()), 1)

    op = fisher_of("mlp_tanh", likelihood, num_samples=num_samples, mode=mode)
    made = len(calls)
    vectors = [oracles.random_like(problem.params, seed) for seed in range(5)]
    stacked = optree.tree_map(lambda *rows: torch.stack(rows), *vectors)
    products = op.mm(stacked, chunk_size=None)
    assert len(calls) - made <= made
    loop = optree.tree_map(lambda *rows: torch.stack(rows), *(op @ v for v in vectors))
    oracles.assert_acts(loop, stacked)
    oracles.assert_same(products, loop, 1e-12)


# --------------------------------------------------------------------------------------- bad input

PROBLEM = problems.load("mlp_gelu")


def refused(
    likelihood: Any, words: str, error: type[Exception] = TypeError, **options: Any
) -> None:
    with pytest.raises(error, match=f"^fisher_operator: {words}"):
        fisher_operator(PROBLEM.model_fn, likelihood, PROBLEM.params, PROBLEM.args[0], **options)  # type: ignore[arg-type]


def test_what_is_no_likelihood_is_refused_with_what_to_write() -> None:
    write = r".*lambda outputs: Categorical\(logits=outputs\)"
    refused(3, f"likelihood must be a function, got int{write}")
    refused(torch.ones(3), f"likelihood must be a function, got Tensor{write}")
    refused(Categorical, f"likelihood must be .*got the class Categorical.*probabilities{write}")
    refused(likelihoods.categorical, r".*got likelihoods\.categorical itself.*categorical\(\)\.$")
    refused(likelihoods.gaussian, r".*got likelihoods\.gaussian itself.*gaussian\(\)\.$")
    for num_samples in (None, 2):
        refused(
            lambda z: z.softmax(1),
            f"likelihood must return a .*Distribution, got Tensor{write}",
            num_samples=num_samples,
        )


def test_an_unknown_information_is_refused_by_name() -> None:
    words = r"the Fisher information of Laplace is not known.*num_samples="
    refused(lambda z: distributions.Laplace(z, 1.0), words)


def test_arguments_that_the_distribution_refuses_are_refused() -> None:
    for num_samples in (None, 2):
        with pytest.raises(ValueError, match="Expected parameter scale"):
            fisher_operator(
                PROBLEM.model_fn,  # type: ignore[arg-type]
                lambda z: Normal(z, -1.0 - z.square()),
                PROBLEM.params,
                PROBLEM.args[0],
                num_samples=num_samples,
            )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be a whole number"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"mode": "fast"}, ValueError, "mode must be one of"),
    ],
)
def test_wrong_options_are_refused(options: Any, error: type[Exception], words: str) -> None:
    refused(likelihoods.categorical(), words, error, **options)


class Silent(Distribution):
    """A distribution that can neither be drawn from nor is known."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, outputs: Tensor) -> None:
        super().__init__(outputs.shape)


def test_a_distribution_that_cannot_be_sampled_is_refused() -> None:
    refused(lambda z: Silent(z), r"the likelihood's Silent has no sample\(\)", num_samples=2)
    words = r"the batch shape of the likelihood's Independent must begin with the samples, got \(\)"
    joint = lambda z: Independent(Normal(z, 1.0), 2)  # noqa: E731
    refused(joint, words, ValueError, num_samples=2)


@pytest.mark.parametrize(
    ("loss_fn", "error", "words"),
    [
        (F.cross_entropy, ValueError, r"loss_fn must .*\(N,\), got shape \(\).*reduction='none'"),
        (lambda z, y: z.square(), ValueError, r".*got shape \(8, 3\).*flatten\(1\)\.sum\(1\)"),
        (lambda z, y: None, TypeError, "the loss must be a tensor, got NoneType"),
        (lambda z, y: y, ValueError, r"the loss must be real and floating, got torch\.int64"),
        (3, TypeError, "loss_fn must be a function, got int"),
    ],
)
def test_losses_that_are_not_one_a_sample_are_refused(
    loss_fn: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^empirical_fisher_operator: {words}"):
        empirical_fisher_operator(PROBLEM.model_fn, loss_fn, PROBLEM.params, *PROBLEM.args)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_params_are_refused_with_their_place(kind: str) -> None:
    bad = problems.Problem("bad", lambda p: p, {"a": 1.0}, (None, None), lambda p, x: p)
    with pytest.raises(TypeError, match=r"fisher_operator: .*At \['a'\] got float"):
        KINDS[kind](bad)
