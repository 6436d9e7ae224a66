"""Preconditioners: what they are, and how many products they save."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    cg,
    diagonal_preconditioner,
    exact_diagonal,
    functional_loss,
    ggn_operator,
    hessian_operator,
    minres,
    nystrom_preconditioner,
    tree,
)
from secorder_func.algorithms.probes import normal
from secorder_func.errors import ConvergenceWarning, NonFiniteError
from tests import oracles, problems
from tests.algorithms.matrices import LIKE, generator, operator, with_spectrum
from tests.algorithms.test_solve import INDEFINITE, flat_operator, vector

FALLING = with_spectrum([0.8**i for i in range(120)])
DAMPING = 1e-6


@cache
def trained() -> tuple[LinearOperator, Any, Tensor]:
    """Return the Hessian of a small network that fits its data, a vector, and the dense Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x = torch.randn(30, 6).double()
    y = torch.stack([x[:, 0].sin(), 0.3 * x[:, 1] * x[:, 2], (x[:, 3] - x[:, 4]).tanh()], 1)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        history_size=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    f, params = functional_loss(model, nn.functional.mse_loss)
    op = hessian_operator(f, params, x, y)
    return op, oracles.random_like(params, 1), oracles.hessian(f, params, x, y)


@pytest.mark.parametrize("solver", [cg, minres])
def test_a_damped_hessian_of_condition_1e6(solver: Any) -> None:
    op, b, H = trained()
    largest = float(torch.linalg.eigvalsh(H)[-1])
    damping = largest / 1e6
    A = H + damping * torch.eye(len(H)).double()
    assert 5e5 < float(torch.linalg.cond(A)) < 2e6
    M = nystrom_preconditioner(op, 90, damping=damping, generator=generator(0))
    found = solver(op.damped(damping), b, rtol=1e-8, preconditioner=M)
    residual = oracles.flat(b) - A @ oracles.flat(found.x)
    assert float(residual.norm()) <= 1e-8 * float(oracles.flat(b).norm())
    oracles.assert_same(oracles.flat(found.x), torch.linalg.solve(A, oracles.flat(b)), 1e-7)
    plain = solver(op.damped(damping), b, rtol=1e-8)
    assert plain.converged
    # Those that made the preconditioner are counted as well.
    assert 90 + found.num_matvecs < plain.num_matvecs / 4
    assert found.num_matvecs < plain.num_matvecs / 20


@pytest.mark.parametrize("solver", [cg, minres])
@pytest.mark.parametrize("stack", [False, True])
def test_preconditioned_solutions_are_the_same(solver: Any, stack: bool) -> None:
    matrix = FALLING + DAMPING * torch.eye(120).double()
    b = vector(120, 1, 3) if stack else vector(120)
    op = flat_operator(FALLING)
    M = nystrom_preconditioner(op, 50, damping=DAMPING, generator=generator(0))
    found = solver(op.damped(DAMPING), b, rtol=1e-10, preconditioner=M)
    assert found.converged.all()
    assert (found.residual_norm <= 1e-10 * b.norm(dim=-1)).all()
    oracles.assert_same(found.x, b @ torch.linalg.inv(matrix), 1e-6)
    plain = solver(op.damped(DAMPING), b, rtol=1e-9)  # rounding allows little less without M
    assert found.num_matvecs < plain.num_matvecs / 5


def test_minres_takes_a_positive_preconditioner_for_an_indefinite_matrix() -> None:
    values, vectors = torch.linalg.eigh(INDEFINITE)
    near = (vectors / (values.abs() * (1 + 0.1 * vector(80).abs()))) @ vectors.T
    b = vector(80)
    M = flat_operator((near + near.T) / 2)
    found = minres(flat_operator(INDEFINITE), b, rtol=1e-10, preconditioner=M)
    assert float((b - INDEFINITE @ found.x).norm()) <= 1e-10 * float(b.norm())
    assert found.num_matvecs < minres(flat_operator(INDEFINITE), b, rtol=1e-10).num_matvecs / 3


def test_minres_says_with_a_preconditioner_too_when_b_is_out_of_reach() -> None:
    matrix = with_spectrum([1.0 + i / 7 for i in range(20)] + [-3.0, -2.0, 0.0])
    M = diagonal_preconditioner(1 + torch.arange(23.0).double())
    op = flat_operator(matrix)
    with pytest.warns(ConvergenceWarning, match="singular, or all but singular"):
        found = minres(op, vector(23), preconditioner=M)
    assert found.num_matvecs < 60
    assert float(found.residual_norm) < float(vector(23).norm())
    assert minres(op, matrix @ vector(23), preconditioner=M).converged


def test_the_exact_inverse_takes_a_step_or_two() -> None:
    for matrix, solver in ((FALLING, cg), (FALLING, minres)):
        A = matrix + 1e-3 * torch.eye(120).double()
        M = flat_operator(torch.linalg.inv(A))
        found = solver(flat_operator(A), vector(120), rtol=1e-8, preconditioner=M)
        assert found.num_matvecs == 2


def test_negative_curvature_is_found_with_a_preconditioner() -> None:
    M = diagonal_preconditioner(INDEFINITE.diag().abs())
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        found = cg(flat_operator(INDEFINITE), vector(80), preconditioner=M)
    p = found.negative_curvature
    quotient = (p @ INDEFINITE @ p) / (p @ p)
    assert float(quotient) < 0
    torch.testing.assert_close(found.curvature, quotient)


@pytest.mark.parametrize("solver", [cg, minres])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(solver: Any) -> None:
    op = flat_operator(with_spectrum([1.0 + i for i in range(10)]))
    for sign in (-torch.ones(10), torch.tensor([1.0, -1.0] * 5), torch.zeros(10)):
        M = flat_operator(torch.diag(sign.double()))
        with pytest.raises(ValueError, match=r"the preconditioner is not positive definite"):
            solver(op, torch.ones(10).double() + vector(10) / 10, preconditioner=M)


# -------------------------------------------------------------------------------------- diagonal


def test_the_diagonal_preconditioner_divides() -> None:
    diagonal = oracles.like(torch.arange(1.0, 11).double(), LIKE)
    M = diagonal_preconditioner(diagonal, 0.5)
    expected = torch.diag(1 / (torch.arange(1.0, 11).double() + 0.5))
    oracles.assert_same(M.dense(), expected, 1e-15)
    b = oracles.like(vector(10), LIKE)
    oracles.assert_same(M @ b, oracles.like(expected @ vector(10), LIKE), 1e-15)


@pytest.mark.parametrize("solver", [cg, minres])
def test_it_removes_scales(solver: Any) -> None:
    scales = 10.0 ** torch.linspace(-2, 2, 60).double()
    core = with_spectrum([1 + i / 60 for i in range(60)])
    matrix = scales[:, None] * core * scales
    op, b = flat_operator(matrix), vector(60)
    M = diagonal_preconditioner(exact_diagonal(op))
    found = solver(op, b, rtol=1e-8, preconditioner=M)
    assert float((b - matrix @ found.x).norm()) <= 1e-8 * float(b.norm())
    assert found.num_matvecs < 40
    assert solver(op, b, rtol=1e-8).num_matvecs > 5 * found.num_matvecs


def test_a_diagonal_that_is_not_positive_is_refused_by_name() -> None:
    good = {"w": torch.ones(2), "b": {"c": torch.tensor([1.0, 0.0])}, "e": torch.zeros(0)}
    with pytest.raises(
        ValueError, match=r"^diagonal_preconditioner: .* At \['b'\]\['c'\] got 0. Pass .*torch.abs"
    ):
        diagonal_preconditioner(good)
    assert diagonal_preconditioner(good, 1e-3).shape == (4, 4)
    assert diagonal_preconditioner(good, torch.tensor(1e-3)).shape == (4, 4)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=r"At the root got"):
            diagonal_preconditioner(torch.tensor([1.0, value]))
    with pytest.raises(TypeError, match=r"every leaf of diagonal must be a tensor"):
        diagonal_preconditioner([1.0])
    with pytest.raises(TypeError, match="damping must be a real number"):
        diagonal_preconditioner(torch.ones(2), damping="a little")


# --------------------------------------------------------------------------------------- Nystrom


def test_it_is_the_formula_of_the_paper() -> None:
    """Frangella, Tropp, Udell, equation 5.3, with the approximation computed directly."""
    rank, damping = 12, 1e-2
    op = flat_operator(FALLING)
    M = nystrom_preconditioner(op, rank, damping=damping, generator=generator(4)).dense()
    seed = int(torch.randint(2**63 - 1, (), generator=generator(4)))
    W = torch.linalg.qr(normal(seed, range(rank), op.like).T).Q
    Y = FALLING @ W
    approximation = Y @ torch.linalg.solve(W.T @ Y, Y.T)
    values, vectors = torch.linalg.eigh((approximation + approximation.T) / 2)
    values, U = values[-rank:], vectors[:, -rank:]
    expected = (U * ((values[0] + damping) / (values + damping))) @ U.T
    expected += torch.eye(120).double() - U @ U.T
    oracles.assert_same(M, expected, 1e-8)
    oracles.assert_same(M, M.T, 1e-12)
    assert float(torch.linalg.eigvalsh(M)[0]) > 0


def test_the_condition_number_is_what_the_theorem_says() -> None:
    """Below 28 in the mean, with 2 ceil(1.5 d) + 1 probes."""
    damping = 1e-4
    values = torch.linalg.eigvalsh(FALLING)
    effective = float((values / (values + damping)).sum())
    rank = 2 * math.ceil(1.5 * effective) + 1
    A = FALLING + damping * torch.eye(120).double()
    found = []
    for seed in range(20):
        op = flat_operator(FALLING)
        M = nystrom_preconditioner(op, rank, damping=damping, generator=generator(seed)).dense()
        product = torch.linalg.eigvals(M @ A).real
        found.append(float(product.max() / product.min()))
    assert 1 < sum(found) / 20 < 28
    assert float(torch.linalg.cond(A)) > 5000


def test_it_takes_rank_products_and_equal_seeds_give_equal_numbers() -> None:
    sizes: list[int] = []
    op = flat_operator(FALLING, sizes)
    first = nystrom_preconditioner(op, 30, damping=0.1, generator=generator(1), chunk_size=7)
    assert sum(sizes) == 30
    assert max(sizes) == 7
    second = nystrom_preconditioner(op, 30, damping=0.1, generator=generator(1))
    oracles.assert_same(first @ vector(120), second @ vector(120), 1e-10)
    sizes.clear()
    nystrom_preconditioner(op, 500, damping=0.1)
    assert sum(sizes) == 120  # more than the space has are none


@pytest.mark.parametrize("rank", [1, 10])
def test_trees(rank: int) -> None:
    matrix = with_spectrum([10.0**-i for i in range(10)])
    op, b = operator(matrix), oracles.like(vector(10), LIKE)
    M = nystrom_preconditioner(op, rank, damping=1e-5, generator=generator(0))
    assert M.shape == (10, 10)
    product = M @ b
    assert tree.structure(product) == tree.structure(b)
    stacked = M.mm(tree.stack([b, product]))
    oracles.assert_same(tree.unstack(stacked)[0], product, 1e-12)
    if rank == 10:  # all of it: the inverse but for a factor
        A = matrix + 1e-5 * torch.eye(10).double()
        inverse = M.dense() @ A
        oracles.assert_same(inverse / inverse[0, 0], torch.eye(10).double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    op = flat_operator(FALLING.to(dtype))
    M = nystrom_preconditioner(op, 20, damping=0.1, generator=generator(0))
    assert (M @ vector(120).to(dtype)).dtype == dtype
    A = FALLING + 0.1 * torch.eye(120).double()
    product = torch.linalg.eigvals(M.dense().double() @ A).real
    assert 1 < float(product.max() / product.min()) < 3 < float(torch.linalg.cond(A))
    if dtype == torch.float32:
        damped = op.damped(0.1)
        found = cg(damped, vector(120).float(), rtol=1e-5, preconditioner=M)
        assert found.converged
        assert found.num_matvecs < cg(damped, vector(120).float(), rtol=1e-5).num_matvecs


def test_a_gauss_newton_matrix_of_low_rank() -> None:
    p = problems.load("mlp_gelu")
    op = ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args)
    b = oracles.random_like(p.params, 3)
    M = nystrom_preconditioner(op, 24, damping=1e-4, generator=generator(0))
    found = cg(op.damped(1e-4), b, rtol=1e-10, preconditioner=M)
    assert found.converged
    assert found.num_matvecs <= 8  # eight samples with two free outputs: rank 16
    assert cg(op.damped(1e-4), b, rtol=1e-10).num_matvecs > 16


def test_an_operator_that_damping_does_not_make_positive_is_refused() -> None:
    op = flat_operator(INDEFINITE)
    least = float(torch.linalg.eigvalsh(INDEFINITE)[0])
    with pytest.raises(
        ValueError,
        match=r"^nystrom_preconditioner: the operator is not positive semidefinite: its ",
    ):
        nystrom_preconditioner(op, 60, damping=0.1 * abs(least))
    # Enough damping, and it is a preconditioner of the damped matrix, which is positive definite.
    damping = 1.1 * abs(least)
    M = nystrom_preconditioner(op, 60, damping=damping, generator=generator(0))
    assert float(torch.linalg.eigvalsh(M.dense())[0]) > 0
    b = vector(80)
    found = cg(op.damped(damping), b, preconditioner=M)
    assert found.converged


def test_the_zero_matrix_gives_the_identity() -> None:
    for dtype in (torch.float32, torch.float64):
        op = LinearOperator(torch.zeros_like, torch.zeros(30, dtype=dtype))
        M = nystrom_preconditioner(op, 5, damping=1.0)
        v = vector(30).to(dtype)
        torch.testing.assert_close(M @ v, v)


def test_bad_arguments_of_it() -> None:
    op = flat_operator(FALLING)
    with pytest.raises(ValueError, match="damping must be positive and finite, got 0"):
        nystrom_preconditioner(op, 5, damping=0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        nystrom_preconditioner(op, 0, damping=1.0)
    with pytest.raises(TypeError, match="must be a LinearOperator"):
        nystrom_preconditioner(FALLING, 5, damping=1.0)
    skew = LinearOperator(lambda v: v, FALLING[0], symmetric=False)
    with pytest.raises(ValueError, match=r"^nystrom_preconditioner: the operator is not symmetric"):
        nystrom_preconditioner(skew, 5, damping=1.0)
    broken = LinearOperator(lambda v: v * math.nan, FALLING[0])
    with pytest.raises(NonFiniteError, match=r"^nystrom_preconditioner: a product has NaN"):
        nystrom_preconditioner(broken, 5, damping=1.0)
