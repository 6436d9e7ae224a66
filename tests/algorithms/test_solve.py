"""Conjugate gradients and minimal residuals, against dense solves; what ends them is said."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secorder_func import (
    LinearOperator,
    Solution,
    cg,
    diagonal_preconditioner,
    ggn_operator,
    hessian_operator,
    minres,
    per_sample_hessian_operator,
    tree,
)
from secorder_func.algorithms import iteration, krylov_solver
from secorder_func.errors import ConvergenceWarning, NonFiniteError
from tests import oracles, problems
from tests.algorithms.matrices import LIKE, generator, operator, with_spectrum

Solver = Callable[..., Solution]
SOLVERS = [cg, minres]
POSITIVE = {
    "flat": with_spectrum([1 + i / 100 for i in range(100)]),
    "clustered": with_spectrum([1.0] * 30 + [10.0] * 30 + [100.0] * 40),
    "condition 1e6": with_spectrum([10 ** (-6 * i / 59) for i in range(60)]),
    "few": with_spectrum([3.0]),
}
INDEFINITE = with_spectrum([(-1) ** i / (1 + i / 10) for i in range(80)])


def flat_operator(matrix: Tensor, sizes: list[int] | None = None) -> LinearOperator:
    """Return the operator of a matrix on vectors; note how many vectors each product has."""
    made = [] if sizes is None else sizes

    def matvec(v: Tensor) -> Tensor:
        made.append(1)
        return matrix @ v

    def matmat(rows: Tensor) -> Tensor:
        made.append(len(rows))
        return rows @ matrix.T

    return LinearOperator(matvec, torch.zeros_like(matrix[0]), matmat=matmat)


def vector(n: int, seed: int = 1, *stack: int) -> Tensor:
    return torch.randn(*stack, n, dtype=torch.float64, generator=generator(seed))


def assert_residual(found: Solution, matrix: Tensor, b: Tensor, rtol: float) -> None:
    """Assert that the residual is the one that is stated, and within the tolerance."""
    residual = (b - found.x @ matrix).norm(dim=-1)
    assert (residual <= rtol * b.norm(dim=-1)).all()
    assert (residual > 0).all()
    torch.testing.assert_close(found.residual_norm, residual, rtol=1e-3, atol=1e-13)
    assert found.converged.all()


# ---------------------------------------------------------------------------------- solutions


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", POSITIVE)
def test_the_solution_is_that_of_a_dense_solve(solver: Solver, name: str) -> None:
    matrix, sizes = POSITIVE[name], []
    b = vector(len(matrix))
    found = solver(flat_operator(matrix, sizes), b, rtol=1e-11)
    residual = (b - matrix @ found.x).norm()
    assert float(residual) <= 1e-11 * float(b.norm())
    assert found.converged
    assert found.num_matvecs == len(sizes)
    error = oracles.relative_error(found.x, torch.linalg.solve(matrix, b))
    assert error < 1e-11 * float(torch.linalg.cond(matrix))
    assert found.negative_curvature is None
    assert found.curvature is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_residual_is_the_true_one(solver: Solver) -> None:
    for rtol in (1e-3, 1e-7):
        b = vector(100)
        assert_residual(
            solver(flat_operator(POSITIVE["flat"]), b, rtol=rtol), POSITIVE["flat"], b, rtol
        )


def test_clusters_take_a_product_each() -> None:
    for solver in SOLVERS:
        found = solver(flat_operator(POSITIVE["clustered"]), vector(100), rtol=1e-8)
        assert found.num_matvecs == 3 + 1  # and one for the residual


def test_minres_solves_with_an_indefinite_matrix() -> None:
    b = vector(80)
    found = minres(flat_operator(INDEFINITE), b, rtol=1e-11)
    assert_residual(found, INDEFINITE, b, 1e-11)
    oracles.assert_same(found.x, torch.linalg.solve(INDEFINITE, b), 1e-9)


@pytest.mark.parametrize("name", ["rosenbrock", "mlp_tanh", "mlp_gelu"])
def test_minres_solves_with_an_indefinite_hessian(name: str) -> None:
    p = problems.load(name)
    H = oracles.hessian(p.f, p.params, *p.args)
    eigenvalues = torch.linalg.eigvalsh(H)
    damping = 0.02 * float(eigenvalues.abs().max())
    A = H + damping * torch.eye(len(H), dtype=H.dtype)
    if name != "rosenbrock":
        assert float(torch.linalg.eigvalsh(A)[0]) < 0 < float(torch.linalg.eigvalsh(A)[-1])
    b = oracles.random_like(p.params, 3)
    op = hessian_operator(p.f, p.params, *p.args).damped(damping)
    found = minres(op, b, rtol=1e-10)
    expected = oracles.like(torch.linalg.solve(A, oracles.flat(b)), p.params)
    oracles.assert_same(found.x, expected, 1e-10 * float(torch.linalg.cond(A)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gauss_newton_matrix_is_solved_with(solver: Solver) -> None:
    p = problems.load("mlp_gelu")
    G = oracles.ggn(p.model_fn, p.loss_fn, p.params, *p.args)
    op = ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args).damped(0.1)
    b = oracles.random_like(p.params, 3)
    found = solver(op, b, rtol=1e-12)
    A = G + 0.1 * torch.eye(len(G), dtype=G.dtype)
    oracles.assert_same(oracles.flat(found.x), torch.linalg.solve(A, oracles.flat(b)), 1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stack", [0, 1, 4])
def test_trees_with_scalars_and_empty_leaves(solver: Solver, stack: int) -> None:
    matrix = with_spectrum([1.0 + i for i in range(10)])
    rows = vector(10, 2, max(1, stack))
    b = oracles.like(rows[0], LIKE)
    if stack:
        b = tree.stack([oracles.like(row, LIKE) for row in rows])
    found = solver(operator(matrix), b, rtol=1e-12)
    assert tree.structure(found.x) == tree.structure(b)
    for leaf, given in zip(oracles.leaves_of(found.x), oracles.leaves_of(b), strict=True):
        assert (leaf.shape, leaf.dtype) == (given.shape, given.dtype)
    assert found.residual_norm.shape == found.converged.shape == ((stack,) if stack else ())
    solved = tree.unstack(found.x) if stack else [found.x]
    for x, row in zip(solved, rows, strict=True):
        oracles.assert_same(oracles.flat(x), torch.linalg.solve(matrix, row), 1e-10)


def test_a_tree_of_empty_leaves() -> None:
    nothing = {"a": torch.zeros(0), "b": torch.zeros(2, 0)}
    found = cg(LinearOperator(lambda v: v, nothing), nothing)
    assert found.converged
    assert found.num_matvecs == 0
    assert found.x["b"].shape == (2, 0)


# ----------------------------------------------------------------------- several right-hand sides


@pytest.mark.parametrize("solver", SOLVERS)
def test_several_right_hand_sides_are_solved_as_each_alone(solver: Solver) -> None:
    matrix = with_spectrum([1 + (i / 20) ** 2 for i in range(100)])
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 3]
    B = torch.stack([vector(100, 3), easy, torch.zeros(100).double(), vector(100, 4)])
    sizes: list[int] = []
    found = solver(flat_operator(matrix, sizes), B, rtol=1e-9)
    alone = [solver(flat_operator(matrix), b, rtol=1e-9) for b in B]
    for row, one in enumerate(alone):
        if row != 2:
            oracles.assert_same(found.x[row], one.x, 1e-8)
    assert not found.x[2].any()
    assert found.converged.all()
    assert found.num_matvecs == sum(sizes) == sum(one.num_matvecs for one in alone)
    assert alone[1].num_matvecs == 2  # an eigenvector takes one step


def test_a_stack_is_known_by_its_shape() -> None:
    """A vector of the space that looks like a stack of another space is none."""
    matrix = with_spectrum([1.0, 2.0, 3.0])
    op = flat_operator(matrix)
    assert cg(op, vector(3)).x.shape == (3,)
    assert cg(op, vector(3, 1, 3)).x.shape == (3, 3)
    assert cg(op, vector(3, 1, 0)).x.shape == (0, 3)
    with pytest.raises(ValueError, match=r"^cg: b must match params"):
        cg(op, vector(3, 1, 2, 3))


def test_a_warning_names_the_worst_of_several() -> None:
    matrix = with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0])
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 3]
    B = torch.stack([easy, vector(5), vector(5, 2)])
    with pytest.warns(ConvergenceWarning, match=r"^cg: 2 of 3 right-hand sides .* number [12] the"):
        found = cg(flat_operator(matrix), B, rtol=1e-12, max_matvecs=3)
    assert found.converged.tolist() == [True, False, False]


# ------------------------------------------------------------------------ starts, counts, tolerances


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_is_solved_by_zero(solver: Solver) -> None:
    zero = torch.zeros(100).double()
    for x0 in (None, vector(100)):
        found = solver(flat_operator(POSITIVE["flat"]), zero, x0=x0)
        assert not found.x.any()
        assert found.converged
        assert float(found.residual_norm) == 0
        assert found.num_matvecs == (0 if x0 is None else 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_near_the_solution_saves_products(solver: Solver) -> None:
    matrix, b = POSITIVE["flat"], vector(100)
    op, truth = flat_operator(matrix), torch.linalg.solve(matrix, b)
    cold = solver(op, b, rtol=1e-10)
    warm = solver(op, b, rtol=1e-10, x0=truth + 1e-6 * vector(100, 5))
    there = solver(op, b, rtol=1e-10, x0=truth)
    assert there.num_matvecs == 1
    assert there.num_matvecs < warm.num_matvecs <= cold.num_matvecs - 4
    assert_residual(warm, matrix, b, 1e-10)
    far = solver(op, b, rtol=1e-10, x0=1e3 * vector(100, 6))
    assert_residual(far, matrix, b, 1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_absolute_tolerance(solver: Solver) -> None:
    matrix, b = POSITIVE["flat"], vector(100)
    found = solver(flat_operator(matrix), b, rtol=0.0, atol=0.1)
    assert 0.001 < float(found.residual_norm) <= 0.1
    enough = solver(flat_operator(matrix), b, atol=1e3)
    assert enough.converged
    assert not enough.x.any()
    assert enough.num_matvecs == 0
    torch.testing.assert_close(enough.residual_norm, b.norm())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [False, True])
def test_max_matvecs_is_kept_and_warned_of(solver: Solver, most: int, start: bool) -> None:
    matrix, b, sizes = POSITIVE["condition 1e6"], vector(60), []
    x0 = vector(60, 2) if start else None
    with pytest.warns(ConvergenceWarning, match=rf"^{solver.__name__}: .* and max_matvecs were sp"):
        found = solver(flat_operator(matrix, sizes), b, max_matvecs=most, x0=x0)
    assert found.num_matvecs == len(sizes) <= most
    assert not found.converged
    torch.testing.assert_close(found.residual_norm, (b - matrix @ found.x).norm())


def test_the_scale_of_b_and_of_the_matrix_does_not_matter() -> None:
    """Squares of 1e-30 are zero in float32."""
    matrix, b = POSITIVE["flat"].float(), vector(100).float()
    for solver in SOLVERS:
        plain = solver(flat_operator(matrix), b, rtol=1e-5)
        for of_b, of_a in ((1e-30, 1.0), (1e25, 1.0), (1.0, 1e-12), (1e-10, 1e12)):
            found = solver(flat_operator(of_a * matrix), of_b * b, rtol=1e-5)
            assert found.num_matvecs == plain.num_matvecs
            oracles.assert_same(found.x.double() * (of_a / of_b), plain.x.double(), 1e-4)


def test_the_recurrence_is_not_believed() -> None:
    """In float32 it falls to 1e-6 while the true residual stays where rounding leaves it."""
    matrix = with_spectrum([10 ** (-4 * i / 59) for i in range(60)]).float()
    b = vector(60).float()
    for solver in SOLVERS:
        with pytest.warns(ConvergenceWarning, match=r"rounding in torch.float32 allows no less"):
            found = solver(flat_operator(matrix), b, rtol=1e-5)
        true = (b.double() - matrix.double() @ found.x.double()).norm()
        assert float(true) > 1e-5 * float(b.norm())
        assert 0.2 < float(found.residual_norm) / float(true) < 5  # it rounds as well
        assert not found.converged


def test_a_start_far_away_leaves_rounding_that_a_restart_removes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, b = POSITIVE["flat"], vector(100)
    runs: list[int] = []

    def counted(*args: Any) -> Any:
        runs.append(1)
        return iteration.run(*args)

    monkeypatch.setattr(krylov_solver, "run", counted)
    for solver in SOLVERS:
        runs.clear()
        found = solver(flat_operator(matrix), b, rtol=1e-11, x0=1e9 * vector(100, 6))
        assert len(runs) == 2
        assert_residual(found, matrix, b, 1e-11)


# ------------------------------------------------------------------------------ what can go wrong


def test_negative_curvature_is_reported() -> None:
    matrix, b = INDEFINITE, vector(80)
    message = (
        r"^cg: the residual is .* along a direction the curvature is -0\..* Take minres, or damp"
    )
    with pytest.warns(ConvergenceWarning, match=message):
        found = cg(flat_operator(matrix), b)
    assert not found.converged
    p = found.negative_curvature
    quotient = (p @ matrix @ p) / (p @ p)
    assert float(quotient) < 0
    torch.testing.assert_close(found.curvature, quotient)
    torch.testing.assert_close(found.residual_norm, (b - matrix @ found.x).norm())
    # It stopped at the last iterate: the minimum over the Krylov space of the products before.
    steps = found.num_matvecs - 2
    basis = torch.stack([torch.linalg.matrix_power(matrix, i) @ b for i in range(steps)], 1)
    inside = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    oracles.assert_same(found.x, inside, 1e-8)


def test_negative_curvature_at_the_first_step_leaves_the_start() -> None:
    x0 = vector(80, 7)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        found = cg(flat_operator(-POSITIVE["flat"][:80, :80]), vector(80), x0=x0)
    oracles.assert_same(found.x, x0, 0.0)
    assert found.num_matvecs == 3


def test_negative_curvature_of_a_tree_and_of_one_of_several() -> None:
    matrix = with_spectrum([-1.0, *[1.0 + i for i in range(9)]])
    up, down = torch.linalg.eigh(matrix).eigenvectors[:, [4, 0]].T
    b = tree.stack([oracles.like(row, LIKE) for row in (up, down)])
    with pytest.warns(ConvergenceWarning, match="of number 1 the residual"):
        found = cg(operator(matrix), b)
    assert found.converged.tolist() == [True, False]
    first, second = map(oracles.flat, tree.unstack(found.negative_curvature))
    assert not first.any()
    oracles.assert_same(second / second.norm(), down, 1e-10)
    assert math.isnan(float(found.curvature[0]))
    assert float(found.curvature[1]) == pytest.approx(-1.0)
    assert found.negative_curvature["w"].shape == (2, 2, 3)


def test_a_curvature_that_is_zero_to_rounding_is_not_divided_by() -> None:
    matrix = with_spectrum([1.0] * 5 + [2.0] * 5 + [0.0] * 5)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        found = cg(flat_operator(matrix), vector(15))
    assert abs(float(found.curvature)) < 1e-12
    assert float(found.x.norm()) < 1e8


def test_minres_solves_a_consistent_singular_system_with_the_least_norm() -> None:
    values = [-1.0, -0.5, 0.5, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0]
    matrix = with_spectrum(values)
    b = matrix @ vector(11)
    found = minres(flat_operator(matrix), b, rtol=1e-12)
    assert_residual(found, matrix, b, 1e-12)
    oracles.assert_same(found.x, torch.linalg.pinv(matrix, rtol=1e-10) @ b, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minres_says_when_b_is_out_of_reach(dtype: torch.dtype) -> None:
    matrix = with_spectrum([1.0 + i / 7 for i in range(20)] + [-3.0, -2.0, 0.0]).to(dtype)
    b = vector(23).to(dtype)
    with pytest.warns(
        ConvergenceWarning, match=r"singular, or all but singular, and does not reach all of b"
    ):
        found = minres(flat_operator(matrix), b)
    assert found.num_matvecs < 40
    unreachable = torch.linalg.eigh(matrix.double())
    outside = unreachable.eigenvectors[:, unreachable.eigenvalues.abs().argmin()] @ b.double()
    assert abs(float(outside)) > 0.1
    assert float(found.residual_norm) == pytest.approx(abs(float(outside)), rel=1e-2)


def test_the_zero_matrix_ends_both() -> None:
    zero = flat_operator(torch.zeros(4, 4).double())
    for solver in SOLVERS:
        with pytest.warns(ConvergenceWarning):
            found = solver(zero, vector(4))
        assert not found.x.any()
        assert found.num_matvecs == 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_products_that_are_not_finite_are_an_error(solver: Solver, value: float, at: int) -> None:
    count = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        result = POSITIVE["condition 1e6"] @ v
        return result.index_fill(0, torch.tensor(3), value) if count == at else result

    op = LinearOperator(matvec, torch.zeros(60).double())
    with pytest.raises(NonFiniteError, match=rf"^{solver.__name__}: a product .* has NaN or inf"):
        solver(op, vector(60))
    with pytest.raises(ValueError, match=r": b has NaN or infinite entries"):
        solver(flat_operator(POSITIVE["flat"]), torch.full((100,), value).double())


def test_a_residual_that_is_not_finite_is_an_error() -> None:
    op = LinearOperator(lambda v: v * math.nan, torch.zeros(3))
    with pytest.raises(NonFiniteError, match=r"^minres: a product"):
        minres(op, torch.ones(3), x0=torch.ones(3))


def test_what_is_no_system_is_refused() -> None:
    op, b = flat_operator(POSITIVE["flat"]), vector(100)
    for solver in SOLVERS:
        name = solver.__name__
        with pytest.raises(ValueError, match=rf"^{name}: the operator is not symmetric"):
            solver(LinearOperator(lambda v: v, b, symmetric=False), b)
        complex_one = torch.ones(2, dtype=torch.complex128)
        with pytest.raises(TypeError, match=rf"^{name}: the space must be real"):
            solver(LinearOperator(lambda v: v, complex_one), complex_one)
        with pytest.raises(TypeError, match=rf"^{name}: the first argument must be a LinearOp"):
            solver(POSITIVE["flat"], b)
        each = per_sample_hessian_operator(
            lambda p, x: (x @ p) ** 2, b[:2], torch.ones(3, 2).double()
        )
        with pytest.raises(TypeError, match="must be one matrix"):
            solver(each, b[:2])
        for wrong in (b[:50], b.float(), vector(100, 1, 2, 2)):
            with pytest.raises(ValueError, match=rf"^{name}: b must match params"):
                solver(op, wrong)
        with pytest.raises(TypeError, match=rf"^{name}: b must have the structure"):
            solver(op, {"a": b})
        with pytest.raises(ValueError, match=rf"^{name}: x0 must match params"):
            solver(op, b, x0=vector(100, 1, 2))
        with pytest.raises(ValueError, match=rf"^{name}: x0 must be of as many vectors as b, 2"):
            solver(op, vector(100, 1, 2), x0=vector(100, 1, 3))
        with pytest.raises(ValueError, match=rf"^{name}: rtol must be a number from 0 on, got -1"):
            solver(op, b, rtol=-1)
        with pytest.raises(TypeError, match=rf"^{name}: atol must be a real number"):
            solver(op, b, atol="small")
        with pytest.raises(ValueError, match=rf"^{name}: max_matvecs must be at least 1"):
            solver(op, b, max_matvecs=0)
        with pytest.raises(TypeError, match=rf"^{name}: the first argument must be a LinearOp"):
            solver(op, b, preconditioner=b)
        with pytest.raises(ValueError, match=r"preconditioner.like must match"):
            solver(op, b, preconditioner=diagonal_preconditioner(torch.ones(3).double()))
        skew = LinearOperator(lambda v: v, b, symmetric=False)
        with pytest.raises(ValueError, match=rf"^{name}: the preconditioner is not symmetric"):
            solver(op, b, preconditioner=skew)


# ---------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32(solver: Solver) -> None:
    matrix, b = POSITIVE["flat"].float(), vector(100).float()
    found = solver(flat_operator(matrix), b)
    assert found.converged
    assert found.x.dtype == found.residual_norm.dtype == torch.float32
    expected = torch.linalg.solve(matrix.double(), b.double())
    assert oracles.relative_error(found.x, expected) < 2e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_iterates_in_float32(solver: Solver, dtype: torch.dtype) -> None:
    matrix, b = POSITIVE["flat"].to(dtype), vector(100).to(dtype)
    seen = set()

    def matvec(v: Tensor) -> Tensor:
        seen.add(v.dtype)
        return matrix @ v

    found = solver(LinearOperator(matvec, b), b, rtol=2e-2)
    assert found.converged
    assert found.x.dtype == dtype
    assert seen == {dtype}
    assert found.residual_norm.dtype == torch.float32
    expected = torch.linalg.solve(matrix.double(), b.double())
    assert oracles.relative_error(found.x, expected) < 3e-2
    with pytest.warns(ConvergenceWarning, match=rf"rounding in {dtype} allows no less"):
        solver(LinearOperator(matvec, b), b, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_leaves_of_two_dtypes(solver: Solver) -> None:
    matrix = with_spectrum([1.0 + i for i in range(6)])
    like = {"a": torch.zeros(2, dtype=torch.float32), "b": torch.zeros(4, dtype=torch.float64)}
    op = LinearOperator(lambda v: oracles.like(matrix @ oracles.flat(v), like), like)
    b = oracles.like(vector(6), like)
    found = solver(op, b, rtol=1e-6)
    assert (found.x["a"].dtype, found.x["b"].dtype) == (torch.float32, torch.float64)
    assert found.converged
    expected = torch.linalg.solve(matrix, oracles.flat(b))
    assert oracles.relative_error(oracles.flat(found.x), expected) < 1e-5


# ----------------------------------------------------------------------------- waiting, and printing


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_device_is_looked_at_every_eighth_step(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            waits = ("_local_scalar_dense", "nonzero", "_linalg_check_errors", "is_nonzero")
            Reads.count += any(word in func.name() for word in waits)
            return func(*args, **(kwargs or {}))

    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        Reads.count += 1
        return tolist(tensor)

    b = vector(60, 1, 3)
    op = flat_operator(POSITIVE["condition 1e6"])
    often = solver(op, b, rtol=1e-8)
    monkeypatch.setattr(iteration, "_steps_between_looks", lambda device: 8)
    monkeypatch.setattr(Tensor, "tolist", counted)
    made: list[int] = []
    op = flat_operator(POSITIVE["condition 1e6"], made)
    with Reads():
        seldom = solver(op, b, rtol=1e-8)
    assert Reads.count <= len(made) / 8 + 30
    assert len(made) > 200
    # What has converged stays as it is until that is seen.
    assert torch.equal(seldom.x, often.x)
    assert often.num_matvecs <= seldom.num_matvecs <= often.num_matvecs + 3 * 7 * 3


def test_a_look_comes_too_late_for_curvature_and_values_but_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(iteration, "_steps_between_looks", lambda device: 8)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        late = cg(flat_operator(INDEFINITE), vector(80))
    monkeypatch.undo()
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        soon = cg(flat_operator(INDEFINITE), vector(80))
    assert torch.equal(late.x, soon.x)
    assert torch.equal(late.negative_curvature, soon.negative_curvature)
    torch.testing.assert_close(late.curvature, soon.curvature)
    assert late.num_matvecs > soon.num_matvecs


def test_it_prints() -> None:
    op = flat_operator(with_spectrum([1.0, 2.0]))
    assert str(cg(op, vector(2), rtol=1e-12)).endswith(" (3 products)")
    assert str(cg(op, vector(2, 1, 3))).startswith("3 solutions, residuals at most ")
    with pytest.warns(ConvergenceWarning):
        one = cg(flat_operator(POSITIVE["flat"]), vector(100), max_matvecs=3)
    assert str(one).endswith(" (3 products, not converged)")
    with pytest.warns(ConvergenceWarning):
        two = cg(flat_operator(POSITIVE["flat"]), vector(100, 1, 2), max_matvecs=3)
    assert str(two).endswith(" (6 products, 2 not converged)")


def test_vectors_given_are_left_as_they_are() -> None:
    b, x0 = vector(100, 1, 2), vector(100, 2, 2)
    before = b.clone(), x0.clone()
    for solver in SOLVERS:
        solver(flat_operator(POSITIVE["flat"]), b, x0=x0)
        solver(LinearOperator(lambda v: v, b), b, x0=x0)
        assert torch.equal(b, before[0])
        assert torch.equal(x0, before[1])


# ----------------------------------------------------------------------------- beside another solver


@pytest.mark.parametrize("name", ["cg", "minres"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_about_as_many_products_as_scipy(name: str, rtol: float) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix = POSITIVE["condition 1e6"] + 1e-4 * torch.eye(60).double()
    if name == "minres":
        matrix = INDEFINITE
    b = vector(len(matrix))
    steps = first = 0

    def watch(x: Any) -> None:
        nonlocal steps, first
        steps += 1
        if not first and (b - matrix @ torch.as_tensor(x)).norm() <= rtol * b.norm():
            first = steps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(linalg, name)(matrix.numpy(), b.numpy(), rtol=1e-15, maxiter=2000, callback=watch)
    found = {"cg": cg, "minres": minres}[name](flat_operator(matrix), b, rtol=rtol)
    assert found.num_matvecs - 1 == pytest.approx(first, rel=0.03, abs=2)
