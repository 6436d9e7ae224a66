"""Unchanged imports of torch_secorder resolve to us, in a fresh process, and never by surprise."""

from __future__ import annotations

import subprocess
import sys

import pytest

REFERENCE_PAGE = """
import torch
import torch.nn as nn
{install}
from {package}.core.hvp import exact_hvp, approximate_hvp, model_hvp
from {package}.core.hvp import gauss_newton_product, hessian_trace

torch.manual_seed(0)
model = nn.Linear(10, 1)
x = torch.randn(1, 10)
y = torch.randn(1, 1)

def loss_func():
    return model(x).sum()

v = [torch.randn_like(p) for p in model.parameters()]
exact = exact_hvp(loss_func, list(model.parameters()), v)
approximate = approximate_hvp(
    loss_func, list(model.parameters()), v, num_samples=10, damping=0.1
)
trace = hessian_trace(loss_func, list(model.parameters()), num_samples=10, sparse=True)
assert all(h.abs().max() == 0 for h in exact), "the loss of the page is linear"
for a, t in zip(approximate, v):
    torch.testing.assert_close(a, 0.1 * t, rtol=1e-3, atol=1e-3)
assert trace == 0.0

hvp_result = model_hvp(model, nn.MSELoss(), x, y, v)
gn_result = gauss_newton_product(model, nn.MSELoss(), x, y, v)
slope = sum((t * g).sum() for t, g in zip(v, [x, torch.ones(1)]))
for result in (hvp_result, gn_result):
    assert isinstance(result, list)
    torch.testing.assert_close(result[0], 2 * slope * x)
    torch.testing.assert_close(result[1], 2 * slope * torch.ones(1))
print(exact_hvp.__module__)
"""


def _run(program: str) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_reference_page_runs_with_the_import_changed() -> None:
    program = REFERENCE_PAGE.format(install="", package="secorder_func.compat")
    assert _run(program) == "secorder_func.compat.core.hvp"


def test_the_reference_page_runs_unchanged_after_the_installation() -> None:
    install = "import secorder_func.compat; secorder_func.compat.install_as_torch_secorder()"
    program = REFERENCE_PAGE.format(install=install, package="torch_secorder")
    assert _run(program) == "secorder_func.compat.core.hvp"


def test_every_form_of_import_resolves() -> None:
    program = """
from secorder_func.compat import install_as_torch_secorder
install_as_torch_secorder(); install_as_torch_secorder()
import torch_secorder, torch_secorder.core, torch_secorder.core.hvp as hvp
from torch_secorder import exact_hvp, hessian_trace
from torch_secorder.core.hessian_trace import hessian_trace as exact, model_hessian_trace
from torch_secorder.core.hessian_diagonal import hessian_diagonal, model_hessian_diagonal
from torch_secorder.core import gauss_newton_product
assert hvp.exact_hvp is exact_hvp and exact is hessian_trace and hvp.hessian_trace is not exact
assert torch_secorder.core.hvp is hvp
"""
    _run(program)


def test_it_refuses_when_the_real_package_is_there_already() -> None:
    pytest.importorskip("torch_secorder", reason="the published package needs Python 3.11")
    program = """
import torch_secorder.core.hvp
from secorder_func.compat import install_as_torch_secorder
try:
    install_as_torch_secorder()
except ImportError as error:
    print(error)
"""
    assert "torch_secorder has been imported already" in _run(program)
