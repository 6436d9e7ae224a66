"""Eigenpairs against dense eigh and SciPy: values, vectors, products, copies, restarts, warm starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secorder_func import (
    LinearOperator,
    eigsh,
    functional_loss,
    ggn_operator,
    hessian_operator,
    tree,
)
from secorder_func.errors import ConvergenceWarning, NonFiniteError
from tests import oracles, problems
from tests.algorithms.matrices import LIKE, generator, operator, random_matrix, with_spectrum
from tests.algorithms.test_low_rank import flat_operator
from tests.algorithms.test_stopping import WAITS

BULK = (0.1 * torch.randn(290, generator=generator(0)).double()).tolist()
CLUSTERED = with_spectrum([10.0, 9.99, 9.98, 5.01, 5.0, 4.99, -4.0, -4.01, 2.0, 1.9, *BULK])


def wanted(values: Tensor, which: str, k: int) -> Tensor:
    order = {
        "LA": values.flip(0),
        "SA": values,
        "LM": values[values.abs().argsort(descending=True)],
    }
    return order[which][:k]


def assert_pairs(found: Any, matrix: Tensor, which: str, k: int, rtol: float = 1e-6) -> None:
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    assert found.converged
    assert ((found.eigenvalues - wanted(values, which, k)).abs() < rtol * scale).all()
    V = torch.cat([leaf.reshape(k, -1) for leaf in oracles.leaves_of(found.eigenvectors)], 1)
    assert (V @ V.T - torch.eye(k)).abs().max() < 1e-10
    residuals = (V @ matrix - found.eigenvalues.unsqueeze(1) * V).norm(dim=1)
    assert (residuals < 1e-5 * scale).all()
    assert (residuals - found.residual_norms).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_clustered_eigenvalues(which: Any, k: int) -> None:
    found = eigsh(flat_operator(CLUSTERED), k, which=which, generator=generator(1), max_matvecs=300)
    assert_pairs(found, CLUSTERED, which, k)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_an_indefinite_hessian_in_no_more_products_than_scipy(which: Any) -> None:
    """A thousand parameters; SciPy at its own defaults and at the same tolerance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 12)).double()
        x, y = torch.randn(64, 20).double(), torch.randint(12, (64,))
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    op = hessian_operator(f, params, x, y)
    assert op.shape[0] == 1002
    flat = op.flat()
    matrix = torch.autograd.functional.hessian(
        lambda p: f(tree.ravel(params)[1](p), x, y), tree.ravel(params)[0]
    )
    values = torch.linalg.eigvalsh(matrix)
    assert float(values[0]) < 0 < float(values[-1])
    k = 10
    found = eigsh(op, k, which=which, rtol=1e-6, generator=generator(0), max_matvecs=1002)
    assert found.converged
    truth = wanted(values, which, k)
    assert ((found.eigenvalues - truth).abs() <= 1e-6 * values.abs().max()).all()

    counts = []
    for tolerance in (0, 1e-6):
        made = [0]

        def multiply(v: Any, made: list[int] = made) -> Any:
            made[0] += 1
            return (flat @ torch.from_numpy(v)).numpy()

        v0 = np.random.default_rng(0).standard_normal(1002)
        shaped = ScipyOperator(op.shape, matvec=multiply, dtype=np.float64)
        scipy_eigsh(shaped, k, which=which, tol=tolerance, v0=v0)
        counts.append(made[0])
    assert found.num_matvecs <= min(counts)


def test_every_copy_of_a_multiple_eigenvalue_is_found() -> None:
    matrix = with_spectrum([7.0, 7.0, 7.0, 3.0, 3.0, *torch.linspace(-1, 1, 95).tolist()])
    for seed in range(5):
        found = eigsh(flat_operator(matrix), 5, generator=generator(seed))
        assert_pairs(found, matrix, "LA", 5)


@pytest.mark.parametrize("k", [1, 4])
def test_with_little_memory_it_restarts(k: int) -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 400).tolist())
    size = 2 * 24 * 400 * 8  # 24 vectors and their products
    found = eigsh(
        flat_operator(matrix),
        k,
        memory_budget=size,
        max_matvecs=400,
        generator=generator(0),
        rtol=1e-7,
    )
    assert found.num_matvecs > 30
    assert_pairs(found, matrix, "LA", k)


def test_a_warm_start_takes_fewer_products() -> None:
    cold = eigsh(flat_operator(CLUSTERED), 4, which="SA", generator=generator(0), max_matvecs=300)
    moved = CLUSTERED + 1e-4 * with_spectrum(BULK + [0.0] * 10, seed=3)
    warm = eigsh(
        flat_operator(moved),
        4,
        which="SA",
        v0=cold.eigenvectors,
        generator=generator(0),
        max_matvecs=300,
    )
    assert_pairs(warm, moved, "SA", 4)
    assert warm.num_matvecs < 0.8 * cold.num_matvecs
    exact = eigsh(flat_operator(CLUSTERED), 1, v0=eigsh(flat_operator(CLUSTERED), 1).eigenvectors)
    assert exact.num_matvecs <= 6


def test_trees_with_odd_leaves() -> None:
    matrix = random_matrix(4)
    found = eigsh(operator(matrix), 3, which="LM")
    assert_pairs(found, matrix, "LM", 3)
    assert {
        name: tuple(leaf.shape) for name, leaf in found.eigenvectors.items() if name != "b"
    } == {
        "w": (3, 2, 3),
        "a": (3, 3),
    }
    assert tree.structure(found.eigenvectors) == tree.structure(LIKE)
    again = eigsh(operator(matrix), 10, which="LA", v0=tree.unstack(found.eigenvectors)[0])
    assert_pairs(again, matrix, "LA", 10)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_spaces(n: int) -> None:
    d = torch.arange(1.0, n + 1).double()
    for k in range(1, n + 1):
        found = eigsh(LinearOperator(lambda v: d * v, d), k, which="SA")
        oracles.assert_same(found.eigenvalues, d[:k], 1e-12)


def test_zero_and_identity() -> None:
    zero = eigsh(LinearOperator(torch.zeros_like, torch.zeros(20).double()), 3)
    assert not zero.eigenvalues.any()
    same = eigsh(LinearOperator(lambda v: 2 * v, torch.zeros(20).double()), 3)
    oracles.assert_same(same.eigenvalues, torch.full((3,), 2.0).double(), 1e-14)
    V = same.eigenvectors
    assert (V @ V.T - torch.eye(3)).abs().max() < 1e-12


def test_float32_does_not_lose_orthogonality() -> None:
    falling = with_spectrum([2.0 ** (-i / 4) for i in range(300)]).float()
    found = eigsh(flat_operator(falling), 30, generator=generator(0), max_matvecs=300)
    V = found.eigenvectors
    assert V.dtype == torch.float32
    assert (V @ V.T - torch.eye(30)).abs().max() < 1e-5
    values = torch.linalg.eigvalsh(falling.double()).flip(0)[:30]
    assert (found.eigenvalues - values).abs().max() < 1e-5


def test_half_precision() -> None:
    matrix = with_spectrum([8.0, 4.0, *torch.linspace(-1, 1, 60).tolist()]).bfloat16()
    found = eigsh(flat_operator(matrix), 2, generator=generator(0))
    assert found.eigenvalues.dtype == torch.bfloat16
    values = torch.linalg.eigvalsh(matrix.double()).flip(0)[:2]
    assert oracles.relative_error(found.eigenvalues, values) < 0.02


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["mlp_gelu", "cnn_batchnorm_eval", "tied_embeddings"])
def test_curvature(name: str, kind: str) -> None:
    p = problems.load(name)
    if kind == "hessian":
        op = hessian_operator(p.f, p.params, *p.args)
        matrix = oracles.hessian(p.f, p.params, *p.args, model=p.model)
    else:
        op = ggn_operator(p.model_fn, p.loss_fn, p.params, *p.args)
        matrix = oracles.ggn(p.model_fn, p.loss_fn, p.params, *p.args)
    with torch.no_grad():
        found = eigsh(op, 4, which="LM", generator=generator(2))
    assert_pairs(found, matrix, "LM", 4)


def test_equal_seeds_give_equal_numbers() -> None:
    runs = [eigsh(flat_operator(CLUSTERED), 2, generator=generator(s)).eigenvectors for s in (1, 1)]
    assert torch.equal(runs[0], runs[1])
    state = torch.get_rng_state()
    eigsh(flat_operator(CLUSTERED), 2, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_device_is_waited_for_at_looks_only() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            n = max((t.numel() for t in args if isinstance(t, Tensor)), default=0)
            # Numbers of the projected matrix are on the CPU anyway; these are vectors or what comes off them.
            Reads.count += any(word in func.name() for word in WAITS) and n > 0
            Reads.count += 0
            return result

    made: list[int] = []

    def multiply(v: Tensor) -> Tensor:
        made.append(Reads.count)
        return CLUSTERED @ v

    with Reads():
        eigsh(LinearOperator(multiply, CLUSTERED[0]), 1, generator=generator(0), rtol=1e-9)
    between = torch.tensor(made).diff()
    assert (between == 0).sum() >= 0.7 * len(between)


def test_products_that_run_out_are_a_warning() -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 200).tolist())
    with pytest.warns(
        ConvergenceWarning, match=r"^eigsh: 2 of 2 residuals are above the tolerance"
    ):
        found = eigsh(flat_operator(matrix), 2, max_matvecs=10)
    assert not found.converged
    assert found.num_matvecs == 10
    assert (found.residual_norms > 1e-6).all()
    best = torch.linalg.eigvalsh(matrix)[-1]
    assert float(found.eigenvalues[0]) < float(best)


def test_bad_input() -> None:
    op = flat_operator(CLUSTERED)
    with pytest.raises(
        ValueError, match=r"^eigsh: k must be at most 300, the size of the space, got 301"
    ):
        eigsh(op, 301)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        eigsh(op, 0)
    with pytest.raises(ValueError, match="which must be one of 'LA', 'SA', 'LM', got 'BE'"):
        eigsh(op, 1, which="BE")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        eigsh(flat_operator(CLUSTERED, symmetric=False))
    with pytest.raises(TypeError, match="the space must be real"):
        eigsh(LinearOperator(lambda v: v, torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="v0 must match params"):
        eigsh(op, v0=torch.ones(7).double())
    with pytest.raises(ValueError, match="v0 must be finite and not zero"):
        eigsh(op, v0=torch.zeros(300).double())
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        eigsh(LinearOperator(lambda v: v / 0, torch.ones(4)))


def test_a_start_that_is_another_eigenvector_is_left() -> None:
    d = torch.tensor([1.0, 1.0, 1.0, 10.0, 10.0, 0.5]).double()
    op = LinearOperator(lambda v: d * v, d)
    wrong = eigsh(op, 1, which="SA").eigenvectors
    found = eigsh(op, 1, which="LA", v0=wrong, generator=generator(0))
    assert float(found.eigenvalues) == pytest.approx(10.0, rel=1e-10)
    inner = torch.linalg.eigh(CLUSTERED).eigenvectors[:, 150]
    for which in ("LA", "SA"):
        found = eigsh(flat_operator(CLUSTERED), 1, which=which, v0=inner, generator=generator(0))
        truth = wanted(torch.linalg.eigvalsh(CLUSTERED), which, 1)
        assert (found.eigenvalues - truth).abs() < 1e-6


def test_values_are_in_order_in_spite_of_rounding() -> None:
    matrix = with_spectrum([3.0] * 6 + [1.0] * 20).float()
    values = eigsh(flat_operator(matrix), 6, generator=generator(0)).eigenvalues
    assert (values.diff() <= 0).all()


def test_more_pairs_than_products_are_refused() -> None:
    with pytest.raises(ValueError, match="max_matvecs must be at least k, 5, got 2"):
        eigsh(flat_operator(CLUSTERED), 5, max_matvecs=2)


def test_transforms_around_it_are_refused() -> None:
    """A gradient would be zero without a word."""
    from secorder_func import matrix_function, spectral_density
    from secorder_func.errors import NoExactRouteError

    def op(s: Tensor) -> LinearOperator:
        return LinearOperator(lambda v: 3 * s * v, torch.zeros(4))

    for call in (
        lambda s: eigsh(op(s)).eigenvalues.sum(),
        lambda s: spectral_density(op(s)).nodes.sum(),
        lambda s: matrix_function(op(s), torch.exp, torch.ones(4)).value.sum(),
    ):
        with pytest.raises(NoExactRouteError, match="cannot be mapped or differentiated"):
            torch.func.grad(call)(torch.ones(()))
        with pytest.raises(NoExactRouteError, match="cannot be mapped or differentiated"):
            torch.func.vmap(call)(torch.ones(2))
