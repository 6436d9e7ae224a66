"""The same answers as other packages on the same matrix, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    cg,
    eigsh,
    empirical_fisher_operator,
    exact_trace,
    functional_loss,
    functional_model,
    ggn_operator,
    hessian_operator,
    spectral_density,
)
from tests import oracles
from tests.algorithms.matrices import generator

pytestmark = pytest.mark.peers


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return model, torch.randn(40, 6).double(), torch.randint(4, (40,))


def in_order(params: Any, vector: Any) -> Tensor:
    """Return the entries in the order of the model's parameters, which other packages keep."""
    return torch.cat([vector[name].flatten() for name in params])


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
def test_hessian_eigenthings(kind: str) -> None:
    peer = pytest.importorskip("hessian_eigenthings")
    model, x, y = problem()
    loss = nn.CrossEntropyLoss()
    f, params = functional_loss(model, loss)
    model_fn, _ = functional_model(model)
    batches = [(x, y)]
    if kind == "hessian":
        op = hessian_operator(f, params, x, y)
        theirs = peer.HessianOperator(model, batches, peer.supervised_loss(loss))
    elif kind == "ggn":
        op = ggn_operator(model_fn, loss, params, x, y)
        theirs = peer.GGNOperator(
            model, batches, peer.supervised_forward, peer.supervised_loss_of_output(loss)
        )
    else:
        each = nn.CrossEntropyLoss(reduction="none")
        op = empirical_fisher_operator(model_fn, each, params, x, y)
        theirs = peer.EmpiricalFisherOperator(model, batches, peer.supervised_per_sample_loss(loss))
    v = oracles.random_like(params, 1)
    product = theirs.matvec(in_order(params, v))
    assert oracles.relative_error(in_order(params, op @ v), product) < 1e-10
    # Without reorthogonalisation it finds the first eigenvalue four times.
    expected = peer.lanczos(
        theirs, k=4, max_iter=45, tol=1e-10, which="LA", seed=0, reorthogonalize=True
    )
    found = eigsh(op, 4, rtol=1e-9, generator=generator(0))
    assert oracles.relative_error(found.eigenvalues, expected.eigenvalues.double()) < 1e-8


def test_curvlinops() -> None:
    peer = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh as scipy_eigsh

    model, x, y = problem()
    loss = nn.CrossEntropyLoss()
    f, params = functional_loss(model, loss)
    free = list(model.parameters())
    theirs = peer.HessianLinearOperator(model, loss, free, [(x, y)], check_deterministic=False)
    op = hessian_operator(f, params, x, y)
    expected = scipy_eigsh(theirs.to_scipy(), k=4, which="LA")[0][::-1].copy()
    found = eigsh(op, 4, rtol=1e-9, generator=generator(0))
    assert oracles.relative_error(found.eigenvalues, torch.from_numpy(expected)) < 1e-8
    ggn = peer.GGNLinearOperator(model, loss, free, [(x, y)], check_deterministic=False)
    model_fn, _ = functional_model(model)
    ours = ggn_operator(model_fn, loss, params, x, y)
    dense = ggn @ torch.eye(ours.shape[0]).double()
    oracles.assert_same(exact_trace(ours), dense.trace(), 1e-10)
    values = torch.linalg.eigvalsh(dense)
    density = spectral_density(ours, 30, generator=generator(1))
    assert float(density.distance_to(values)) < 0.02 * float(values.max())
    b = oracles.random_like(params, 2)
    solution = cg(ours.damped(0.1), b, rtol=1e-10).x
    flat = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).double(), in_order(params, b))
    assert oracles.relative_error(in_order(params, solution), flat) < 1e-8
