"""Fisher information in the outputs of a model against sums over all targets, and what likelihoods refuse."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
)

from secorder_func.errors import ArgumentTypeError
from secorder_func.transforms import fisher, likelihoods
from secorder_func.transforms.fisher import information
from tests import oracles

Nodes = tuple[Tensor, Tensor]
"""Targets and the weights with which a density at them is summed."""


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------- all targets and their weights


def counts(*values: Any) -> Nodes:
    y = torch.tensor(values, dtype=torch.float64)
    return y, torch.ones(len(y), dtype=torch.float64)


def line(to: float, image: Callable[[Tensor], Tensor]) -> Nodes:
    """Return the trapezoidal rule in `t` for targets `image(t)`: exact to rounding for what decays fast in `t`."""
    t = torch.linspace(-to, to, 8001, dtype=torch.float64, requires_grad=True)
    y = image(t)
    (slope,) = torch.autograd.grad(y.sum(), t)
    return y.detach(), slope * (2 * to / 8000)


def gaussian_nodes(mean: Tensor, factor: Tensor) -> Nodes:
    """Return a rule that is exact for a polynomial times the density of `N(mean, factor factor^T)`."""
    x, w = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(12))
    n = len(mean)
    u = torch.stack(torch.meshgrid([x] * n, indexing="ij"), -1).reshape(-1, n) * 2**0.5
    weights = torch.stack(torch.meshgrid([w] * n, indexing="ij"), -1).reshape(-1, n).prod(1)
    density = torch.exp(-u.square().sum(1) / 2) / factor.det().abs() / (2 * torch.pi) ** (n / 2)
    return mean + u @ factor.T, weights / torch.pi ** (n / 2) / density


def summed_fisher(make: Callable[[Tensor], Distribution], z: Tensor, nodes: Nodes) -> Tensor:
    """Return `E[s s^T]`, `s` the gradient of the log-probability in `z`."""
    y, weights = nodes
    density = make(z).log_prob(y).exp() * weights
    torch.testing.assert_close(density.sum(), torch.ones((), dtype=torch.float64))
    scores = torch.autograd.functional.jacobian(lambda z: make(z).log_prob(y), z)
    return scores.T @ (density[:, None] * scores)


def one_hot(*labels: int) -> list[list[float]]:
    return [[float(label == place) for place in range(3)] for label in labels]


def simplex(z: Tensor) -> Tensor:
    return torch.stack([z[0], z[0] * z[1], z[1].sin()])


def covariance(z: Tensor) -> Tensor:
    return torch.stack([torch.stack([z[2].exp(), z[3]]), torch.stack([z[3], z[4].exp() + 2])])


def low_rank(z: Tensor) -> Distribution:
    return distributions.LowRankMultivariateNormal(
        z[:2].sin(), z[2:4].unsqueeze(1) * z[0], z[3:5].exp()
    )


MVN_AT = numbers(0.3, -0.2, 0.4, 0.5, 0.1)
MULTINOMIAL = [k for k in itertools.product(range(4), repeat=3) if sum(k) == 3]

# Parameters bend with z, so that no formula for the natural ones alone is right.
CASES: dict[str, tuple[Callable[[Tensor], Distribution], Tensor, Nodes]] = {
    "Categorical": (
        lambda z: Categorical(logits=simplex(z)),
        numbers(0.7, -0.4),
        counts(0, 1, 2),
    ),
    "Categorical of probs": (
        lambda z: Categorical(probs=simplex(z).exp()),
        numbers(0.7, -0.4),
        counts(0, 1, 2),
    ),
    "OneHotCategorical": (
        lambda z: distributions.OneHotCategorical(logits=simplex(z)),
        numbers(0.7, -0.4),
        counts(*one_hot(0, 1, 2)),
    ),
    "OneHotCategoricalStraightThrough": (
        lambda z: distributions.OneHotCategoricalStraightThrough(logits=simplex(z)),
        numbers(0.7, -0.4),
        counts(*one_hot(0, 1, 2)),
    ),
    "Multinomial": (
        lambda z: distributions.Multinomial(3, logits=simplex(z)),
        numbers(0.7, -0.4),
        counts(*MULTINOMIAL),
    ),
    "Bernoulli": (lambda z: Bernoulli(logits=z[0] * z[1]), numbers(0.7, -0.4), counts(0, 1)),
    "Bernoulli of probs": (
        lambda z: Bernoulli(probs=(z[0] * z[1]).sigmoid()),
        numbers(0.7, -0.4),
        counts(0, 1),
    ),
    "Binomial": (
        lambda z: distributions.Binomial(5, logits=z[0] * z[1]),
        numbers(0.7, -0.4),
        counts(*range(6)),
    ),
    "Geometric": (
        lambda z: distributions.Geometric(probs=(z[0] * z[1]).sigmoid()),
        numbers(0.7, -0.4),
        counts(*range(200)),
    ),
    "Poisson": (
        lambda z: distributions.Poisson((z[0] * z[1]).exp() + z[0]),
        numbers(0.7, -0.4),
        counts(*range(60)),
    ),
    "Normal": (
        lambda z: Normal(z[0] * z[1], z[1].exp()),
        numbers(0.7, -0.4),
        line(40.0, lambda t: t),
    ),
    "Cauchy": (
        lambda z: distributions.Cauchy(z[0] * z[1], z[1].exp()),
        numbers(0.7, -0.4),
        line(40.0, torch.sinh),
    ),
    "Gumbel": (
        lambda z: distributions.Gumbel(z[0] * z[1], z[1].exp()),
        numbers(0.7, -0.4),
        line(60.0, lambda t: t),
    ),
    "Exponential": (
        lambda z: distributions.Exponential((z[0] * z[1]).exp()),
        numbers(0.7, -0.4),
        line(40.0, torch.exp),
    ),
    "Gamma": (
        lambda z: distributions.Gamma(z[0].exp() + z[1], z[1].exp()),
        numbers(0.7, 0.4),
        line(30.0, torch.exp),
    ),
    "InverseGamma": (
        lambda z: distributions.InverseGamma(z[0].exp() + z[1], z[1].exp()),
        numbers(0.7, 0.4),
        line(30.0, torch.exp),
    ),
    "LogNormal": (
        lambda z: distributions.LogNormal(z[0] * z[1], z[1].exp()),
        numbers(0.7, -0.4),
        line(20.0, torch.exp),
    ),
    "HalfNormal": (
        lambda z: distributions.HalfNormal((z[0] * z[1]).exp()),
        numbers(0.7, -0.4),
        line(40.0, torch.exp),
    ),
    "HalfCauchy": (
        lambda z: distributions.HalfCauchy((z[0] * z[1]).exp()),
        numbers(0.7, -0.4),
        line(40.0, torch.exp),
    ),
    "Beta": (
        lambda z: distributions.Beta(z[0].exp() + z[1], z[1].exp() + 1),
        numbers(0.7, 0.4),
        line(30.0, torch.sigmoid),
    ),
    "MultivariateNormal": (
        lambda z: distributions.MultivariateNormal(z[:2].sin(), covariance(z)),
        MVN_AT,
        gaussian_nodes(MVN_AT[:2].sin(), torch.linalg.cholesky(covariance(MVN_AT))),
    ),
    "LowRankMultivariateNormal": (
        low_rank,
        MVN_AT,
        gaussian_nodes(MVN_AT[:2].sin(), torch.linalg.cholesky(low_rank(MVN_AT).covariance_matrix)),
    ),
    "Independent": (
        lambda z: Independent(Normal(z[:2] * z[2], z[1:].exp()), 1),
        numbers(0.3, -0.2, 0.4),
        gaussian_nodes(numbers(0.3, -0.2) * 0.4, torch.diag(numbers(-0.2, 0.4).exp())),
    ),
}

TEN_DIGITS = ("Beta", "Cauchy", "Gamma", "Gumbel", "InverseGamma")
"""Of polygamma in torch, and of the sum over a long tail."""


@pytest.mark.parametrize("name", CASES)
def test_the_information_equals_the_expected_outer_product_of_scores(name: str) -> None:
    make, z, nodes = CASES[name]
    number = lambda at: information(make(at), make(z))  # noqa: E731
    expected = summed_fisher(make, z, nodes)
    tolerance = 1e-8 if name in TEN_DIGITS else 1e-11
    oracles.assert_same(torch.autograd.functional.hessian(number, z), expected, tolerance)
    oracles.assert_same(torch.func.hessian(number)(z), expected, tolerance)


def test_the_information_of_a_dirichlet_equals_the_formula() -> None:
    z = numbers(0.7, -0.4, 0.2)
    concentration = lambda z: z.exp() * z.sum()  # noqa: E731
    make = lambda z: distributions.Dirichlet(concentration(z))  # noqa: E731
    J = torch.autograd.functional.jacobian(concentration, z)
    trigamma = torch.polygamma(1, concentration(z))
    inner = torch.diag(trigamma) - torch.polygamma(1, concentration(z).sum())
    found = torch.func.hessian(lambda at: information(make(at), make(z)))(z)
    oracles.assert_same(found, J.T @ inner @ J, 1e-11)


def test_every_distribution_with_a_formula_is_tested() -> None:
    known = {kind.__name__ for kind in (*fisher._CROSS_ENTROPIES, *fisher._OF_THE_BASE)}
    assert known <= {name.split(" of ")[0] for name in CASES} | {"Dirichlet"}


@pytest.mark.parametrize("name", CASES)
def test_vmap_of_the_information_equals_a_loop(name: str) -> None:
    make, z, _ = CASES[name]
    points = torch.stack([z, 1.1 * z, 0.9 * z])

    def hessian(z: Tensor) -> Tensor:
        with fisher._unvalidated():
            same = make(z.detach())
            return torch.func.hessian(lambda at: information(make(at), same))(z)

    together = torch.func.vmap(hessian)(points)
    loop = [
        torch.autograd.functional.hessian(lambda at, z=z: information(make(at), make(z)), z)
        for z in points
    ]
    oracles.assert_same(together, torch.stack(loop), 1e-11)


class Shifted(Normal):
    """A distribution of a user's, with other probabilities than those of its base class."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value - 3 * self.loc)


@pytest.mark.parametrize(
    "distribution",
    [
        distributions.Laplace(torch.zeros(2), torch.ones(2)),
        Independent(distributions.Laplace(torch.zeros(2), torch.ones(2)), 1),
        distributions.StudentT(torch.ones(2)),
        distributions.Weibull(torch.ones(2), torch.ones(2)),
        distributions.Uniform(torch.zeros(2), torch.ones(2)),
        distributions.Pareto(torch.ones(2), torch.ones(2)),
        distributions.NegativeBinomial(torch.ones(2), torch.zeros(2)),
        distributions.TransformedDistribution(
            Normal(torch.zeros(2), torch.ones(2)),
            [distributions.AffineTransform(torch.ones(2), torch.ones(2))],
        ),
        Shifted(torch.zeros(2), torch.ones(2)),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_a_distribution_without_a_formula_is_refused_by_name(distribution: Distribution) -> None:
    inner = distribution.base_dist if type(distribution) is Independent else distribution
    words = f"^information: .*{type(inner).__name__} is not known.*num_samples="
    with pytest.raises(ArgumentTypeError, match=words):
        information(distribution, distribution)


def test_the_information_of_a_saturated_logit_keeps_its_digits() -> None:
    logit = numbers(30.0)
    number = lambda at: information(Bernoulli(logits=at), Bernoulli(logits=logit))  # noqa: E731
    p = torch.exp(-logit)
    oracles.assert_same(torch.func.hessian(number)(logit)[0], p / (1 + p) ** 2, 1e-10)


def test_a_class_that_is_masked_out_has_no_information() -> None:
    z = numbers(0.7, -0.4, 0.2)
    masked = torch.tensor([False, True, False])
    make = lambda z: Categorical(logits=z.masked_fill(masked, -torch.inf))  # noqa: E731
    found = torch.func.hessian(lambda at: information(make(at), make(z)))(z)
    p = z.masked_fill(masked, -torch.inf).softmax(0)
    oracles.assert_same(found, torch.diag(p) - torch.outer(p, p), 1e-12)


# ------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 3, 4)])
def test_the_categorical_likelihood_is_the_cross_entropy(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(4, shape[:-1])
    expected = -F.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1), reduction="none")
    found = likelihoods.categorical()(logits).log_prob(labels)
    oracles.assert_same(found, expected.reshape(labels.shape), 1e-12)


def test_the_classes_may_lie_along_another_axis() -> None:
    logits, labels = torch.randn(5, 4, 2, 3, dtype=torch.float64), torch.randint(4, (5, 2, 3))
    found = likelihoods.categorical(axis=1)(logits).log_prob(labels)
    oracles.assert_same(found, -F.cross_entropy(logits, labels, reduction="none"), 1e-12)


def test_the_bernoulli_likelihood_is_the_binary_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4).double(), torch.randint(2, (5, 4)).double()
    expected = -F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    oracles.assert_same(likelihoods.bernoulli()(logits).log_prob(labels), expected, 1e-12)


@pytest.mark.parametrize("variance", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_the_gaussian_likelihood_of_variance_one_half_is_the_squared_error(variance: Any) -> None:
    outputs, y = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    normal = likelihoods.gaussian(variance)(outputs)
    difference = normal.log_prob(y) - normal.log_prob(outputs)
    oracles.assert_same(difference, -F.mse_loss(outputs, y, reduction="none"), 1e-12)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), torch.tensor(0.0)])
def test_a_variance_that_is_not_positive_is_refused(variance: Any) -> None:
    with pytest.raises(ValueError, match=r"^likelihoods\.gaussian: variance must be positive, got"):
        likelihoods.gaussian(variance)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^likelihoods\.gaussian: variance must be a real number"):
        likelihoods.gaussian(torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^likelihoods\.categorical: axis must be a whole number"):
        likelihoods.categorical(torch.zeros(3, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_outputs_that_are_no_tensor_are_refused(name: str) -> None:
    likelihood = getattr(likelihoods, name)()
    with pytest.raises(TypeError, match=rf"^likelihoods\.{name}: .*one tensor, got dict.*lambda"):
        likelihood({"logits": torch.zeros(3, 2)})


# --------------------------------------------------------------------------------------- validation


def test_the_switch_of_validation_is_put_back_whatever_happens() -> None:
    def failing(outputs: Tensor) -> Distribution:
        assert not Distribution._validate_args
        raise RuntimeError("the user's own")

    before = Distribution._validate_args
    with pytest.raises(RuntimeError, match="the user's own"):
        fisher.distribution_at(failing, torch.zeros(3), "here")
    assert Distribution._validate_args == before


def test_the_switch_of_validation_is_put_back_by_two_threads() -> None:
    """The second goes in while the first is inside, and would come out after it."""
    before = Distribution._validate_args
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))

    def first_likelihood(outputs: Tensor) -> Distribution:
        first_inside.set()
        second_inside.wait(0.2)
        return Categorical(logits=outputs)

    def second_likelihood(outputs: Tensor) -> Distribution:
        second_inside.set()
        first_done.wait(5)
        return Categorical(logits=outputs)

    def first() -> None:
        fisher.distribution_at(first_likelihood, torch.zeros(3), "here")
        first_done.set()

    def second() -> None:
        first_inside.wait(5)
        fisher.distribution_at(second_likelihood, torch.zeros(3), "here")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert second_inside.is_set()
    assert Distribution._validate_args == before
