"""Gradients through solutions, against finite differences and dense solves; what has none is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    cg,
    functional_model,
    ggn_operator,
    hessian_operator,
    minres,
    nystrom_preconditioner,
    tree,
)
from secorder_func.errors import ConvergenceWarning, NoExactRouteError
from tests import oracles
from tests.algorithms.matrices import generator

SOLVERS = [cg, minres]
N = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def operator_of(root: Tensor, shift: float | Tensor = 1.0, made: list[int] | None = None) -> Any:
    """Return `root root^T + shift I` as an operator; count products."""

    def matvec(v: Tensor) -> Tensor:
        if made is not None:
            made.append(1)
        return root @ (root.T @ v) + shift * v

    return LinearOperator(matvec, torch.zeros(len(root), dtype=root.dtype))


def dense(root: Tensor, b: Tensor, shift: float = 1.0) -> Tensor:
    return torch.linalg.solve(root @ root.T + shift * torch.eye(len(root)).to(root), b)


ROOT, B = normal(N, N), normal(N, seed=1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_those_of_differences(solver: Any) -> None:
    shift = -2.0 if solver is minres else 1.0
    eigenvalues = torch.linalg.eigvalsh(ROOT @ ROOT.T + shift * torch.eye(N))
    assert (float(eigenvalues[0]) < 0) == (solver is minres)

    def value(at: Any) -> Tensor:
        x = solver(operator_of(at["root"], shift), at["b"], rtol=1e-13).x
        return (x**3).sum() + x[0]

    at = {"root": ROOT.clone().requires_grad_(), "b": B.clone().requires_grad_()}
    grads = dict(zip(at, torch.autograd.grad(value(at), list(at.values())), strict=True))
    for name in at:
        direction = {k: oracles.random_like(v, 2) * (k == name) for k, v in at.items()}
        expected = oracles.directional_derivative(value, at, direction, 1e-4)
        assert abs(float(expected)) > 1e-2
        assert float((grads[name] * direction[name]).sum()) == pytest.approx(
            float(expected), rel=1e-6
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_of_trees_and_of_several_right_hand_sides(solver: Any) -> None:
    like = {"a": torch.zeros(2).double(), "b": (torch.zeros(()).double(), torch.zeros(3).double())}

    def folded(matrix: Tensor) -> LinearOperator:
        return LinearOperator(lambda v: oracles.like(matrix @ oracles.flat(v), like), like)

    def sums(x: Any) -> Tensor:
        return sum((leaf**2).sum() for leaf in oracles.leaves_of(x))

    rows = normal(3, N, seed=4)
    for stacked in (False, True):
        matrix = (ROOT @ ROOT.T + torch.eye(N)).requires_grad_()
        given = rows.clone().requires_grad_()
        trees = [oracles.like(row, like) for row in given]
        b = tree.stack(trees) if stacked else trees[0]
        found = torch.autograd.grad(sums(solver(folded(matrix), b, rtol=1e-13).x), [matrix, given])
        used = given if stacked else given[:1]
        expected = torch.linalg.solve((matrix + matrix.T) / 2, used.T).square().sum()
        truth = torch.autograd.grad(expected, [matrix, given])
        # The solver takes the matrix for symmetric, the entries above and below move alone here.
        oracles.assert_same(found[0] + found[0].T, truth[0] + truth[0].T, 1e-10)
        oracles.assert_same(found[1], truth[1], 1e-10)


@pytest.mark.parametrize(
    "mode", ["auto", "reverse_over_reverse", "forward_over_reverse", "double_backward"]
)
def test_through_a_hessian_at_parameters_and_data_that_are_differentiated(mode: Any) -> None:
    x, c = normal(7, 4, seed=2), normal(4, seed=3)

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return F.softplus(x @ p).sum() + 0.1 * (p**4).sum() + 0.5 * p @ p

    def value(at: Any) -> Tensor:
        op = hessian_operator(loss, at["p"], at["x"], mode=mode)
        return (cg(op, c, rtol=1e-13).x ** 3).sum()

    at = {"p": normal(4).requires_grad_(), "x": x.requires_grad_()}
    grads = dict(zip(at, torch.autograd.grad(value(at), list(at.values())), strict=True))
    for name in at:
        direction = {k: oracles.random_like(v, 2) * (k == name) for k, v in at.items()}
        expected = oracles.directional_derivative(value, at, direction, 1e-4)
        assert abs(float(expected)) > 1e-4
        assert float((grads[name] * direction[name]).sum()) == pytest.approx(
            float(expected), rel=1e-6
        )


def test_through_a_damped_gauss_newton_matrix_of_a_network_with_a_preconditioner() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model_fn, params = functional_model(model)
    x, y = normal(9, 3, seed=5), torch.arange(9) % 2
    b = oracles.random_like(params, 6)

    def value(at: Any) -> Tensor:
        op = ggn_operator(model_fn, F.cross_entropy, at["params"], x, y)
        M = nystrom_preconditioner(op, 8, damping=0.1, generator=generator(0))
        solved = cg(op.damped(at["damping"]), b, rtol=1e-13, preconditioner=M).x
        return oracles.dot(solved, solved)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    at = {"params": leaves, "damping": torch.tensor(0.1).double().requires_grad_()}
    flat = oracles.leaves_of(at)
    grads = oracles.grads_like(list(torch.autograd.grad(value(at), flat)), at)
    direction = oracles.random_like(at, 7)
    expected = oracles.directional_derivative(value, at, direction, 1e-4)
    assert float(oracles.dot(grads, direction)) == pytest.approx(float(expected), rel=1e-6)


def test_torch_func_grad_and_levels_of_it() -> None:
    def value(root: Tensor, b: Tensor) -> Tensor:
        return (cg(operator_of(root), b, rtol=1e-13).x ** 3).sum()

    def exact(root: Tensor, b: Tensor) -> Tensor:
        return (dense(root, b) ** 3).sum()

    found = torch.func.grad(value, argnums=(0, 1))(ROOT, B)
    for one, other in zip(found, torch.func.grad(exact, argnums=(0, 1))(ROOT, B), strict=True):
        oracles.assert_same(one, other, 1e-10)

    def inner(solve: Any) -> Any:
        return lambda root: torch.func.grad(lambda c: (solve(root) * c**2).sum())(B).sum()

    one = torch.func.grad(inner(lambda root: cg(operator_of(root), B, rtol=1e-13).x))(ROOT)
    oracles.assert_same(one, torch.func.grad(inner(lambda root: dense(root, B)))(ROOT), 1e-10)


def test_only_what_is_differentiated_costs_another_product() -> None:
    made: list[int] = []
    plain = cg(operator_of(ROOT, made=made), B)
    assert not plain.x.requires_grad
    assert len(made) == plain.num_matvecs
    for root, b in ((ROOT, B.clone().requires_grad_()), (ROOT.clone().requires_grad_(), B)):
        made.clear()
        found = cg(operator_of(root, made=made), b)
        assert found.x.requires_grad
        assert not found.residual_norm.requires_grad
        assert len(made) == found.num_matvecs == plain.num_matvecs + 1
        assert torch.equal(found.x, plain.x)
        with torch.no_grad():
            silent = cg(operator_of(root), b)
        assert not silent.x.requires_grad
        assert silent.num_matvecs == plain.num_matvecs
        assert torch.equal(silent.x, plain.x)
        with torch.inference_mode():
            assert torch.equal(cg(operator_of(root), b).x, plain.x)


def test_backward_can_be_repeated_and_solves_every_time() -> None:
    made: list[int] = []
    root, b = ROOT.clone().requires_grad_(), B.clone().requires_grad_()
    x = cg(operator_of(root, made=made), b, rtol=1e-13).x
    before = len(made)
    first = torch.autograd.grad(x.sum(), (root, b), retain_graph=True)
    assert len(made) > before
    second = torch.autograd.grad(x.sum(), (root, b))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_the_backward_solve_is_as_accurate_as_the_forward_one_whatever_its_scale() -> None:
    """An absolute tolerance for `b` says nothing of a gradient that is a million times smaller."""
    root, b = ROOT.clone().requires_grad_(), B.clone().requires_grad_()
    x = cg(operator_of(root), b, rtol=0.0, atol=1e-9).x
    found = torch.autograd.grad(1e-12 * x.sum(), b)[0]
    oracles.assert_same(found, dense(ROOT, torch.full((N,), 1e-12).double()), 1e-7)


def test_a_backward_solve_that_does_not_converge_warns() -> None:
    values = 10.0 ** -torch.arange(0, 6, 0.1).double()
    op = LinearOperator(lambda v: values * v, values)
    b = values.new_zeros(60)
    b[0] = 1.0  # an eigenvector: one step
    x = cg(op, b.requires_grad_(), max_matvecs=5).x
    with pytest.warns(ConvergenceWarning, match=r"^cg: .* and max_matvecs were spent"):
        x.sum().backward()
    assert b.grad is not None


def test_second_derivatives_are_refused() -> None:
    root, b = ROOT.clone().requires_grad_(), B.clone().requires_grad_()
    for of in (root, b):
        x = cg(operator_of(root), b, rtol=1e-13).x
        (first,) = torch.autograd.grad(x.sum(), of, create_graph=True)
        for again in (root, b):
            with pytest.raises(RuntimeError, match=r"^cg and minres: .* once, not twice"):
                torch.autograd.grad(first.square().sum(), again, retain_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.func.grad(
            lambda r: torch.func.grad(lambda s: cg(operator_of(s), B).x.sum())(r).square().sum()
        )(ROOT)


def test_vmap_and_forward_mode_are_refused() -> None:
    def solved(b: Tensor) -> Tensor:
        return cg(operator_of(ROOT), b).x

    with pytest.raises(NoExactRouteError, match=r"^cg: vmap does not let .* stacked right-hand"):
        torch.func.vmap(solved)(torch.stack([B, B]))
    with pytest.raises(NoExactRouteError, match=r"^cg: solutions cannot be differentiated in forw"):
        torch.func.jvp(solved, (B,), (B,))
    with pytest.raises(NoExactRouteError, match="forward mode"):
        torch.func.jvp(lambda r: minres(operator_of(r), B).x, (ROOT,), (ROOT,))
    with torch.autograd.forward_ad.dual_level():
        for root, b in (
            (ROOT, torch.autograd.forward_ad.make_dual(B, B)),
            (torch.autograd.forward_ad.make_dual(ROOT, ROOT), B),
        ):
            with pytest.raises(NoExactRouteError, match="forward mode"):
                cg(operator_of(root), b)
    with pytest.raises(NoExactRouteError, match="vmap"):
        torch.func.jacrev(solved)(B)


def test_a_solution_of_zero_has_the_gradient_of_a_solution() -> None:
    b = torch.zeros(N).double().requires_grad_()
    found = torch.autograd.grad(cg(operator_of(ROOT), b, rtol=1e-13).x @ B, b)[0]
    oracles.assert_same(found, dense(ROOT, B), 1e-10)


def test_gradients_in_half_precision_and_float32() -> None:
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        diagonal = torch.linspace(1, 3, N).to(dtype).requires_grad_()
        b = B.to(dtype).requires_grad_()
        op = LinearOperator(lambda v, d=diagonal: d * v, B.to(dtype))
        grads = torch.autograd.grad(cg(op, b, rtol=rtol).x.sum(), (diagonal, b))
        assert grads[0].dtype == grads[1].dtype == dtype
        d = diagonal.detach().double()
        assert oracles.relative_error(grads[0], -b.detach().double() / d**2) < 3 * rtol
        assert oracles.relative_error(grads[1], 1 / d) < 3 * rtol
    assert math.isfinite(float(grads[0].sum()))


def test_a_loose_absolute_tolerance_leaves_no_gradient_out() -> None:
    d = torch.tensor([1.0, 2.0, 3.0]).double()
    op = LinearOperator(lambda v: d * v, d)
    b = torch.tensor([[1.0, 1.0, 1.0], [1e-3, 0.0, 0.0], [0.0, 0.0, 0.0]]).double()
    b.requires_grad_()
    cg(op, b, atol=1e-2).x.sum().backward()
    oracles.assert_same(b.grad, (1 / d).expand(3, 3), 1e-5)
