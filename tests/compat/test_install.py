"""Unchanged imports of torch_secorder resolve to us, in a fresh process, and never by surprise."""

from __future__ import annotations

import importlib.util
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
    command = [sys.executable, "-W", "error", "-c", program]
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


def test_every_submodule_is_ours_by_every_form_of_import() -> None:
    program = """
import importlib, importlib.util, pkgutil, sys
import secorder_func.compat as compat
compat.install_as_torch_secorder()
names = [m.name for m in pkgutil.walk_packages(compat.__path__, "secorder_func.compat.")]
assert len(names) >= 10, names
for name in names:
    theirs = name.replace("secorder_func.compat", "torch_secorder")
    module = importlib.import_module(theirs)
    assert module is importlib.import_module(name), name
    assert importlib.util.find_spec(theirs).origin == module.__file__
    for export in module.__all__:
        exec(f"from {theirs} import {export} as found")
        assert found is getattr(module, export), (theirs, export)
import torch_secorder
assert torch_secorder is compat
assert torch_secorder.core.utils.flatten_params is torch_secorder.flatten_params
import torch_secorder.core.per_layer_curvature as layers
from torch_secorder.approximations import fisher_trace
assert torch_secorder.core.per_layer_curvature is layers
assert fisher_trace.empirical_fisher_trace is torch_secorder.empirical_fisher_trace
"""
    _run(program)


def test_names_that_are_modules_and_functions_are_what_they_are_in_the_package() -> None:
    program = """
from types import FunctionType, ModuleType
{install}
import sys, importlib
from torch_secorder.core import hessian_diagonal, hessian_trace, hvp, utils
print([type(thing).__name__ for thing in (hessian_diagonal, hessian_trace, hvp, utils)])
import torch_secorder.core.hessian_trace as shadowed
print(type(shadowed).__name__, type(importlib.import_module("torch_secorder.core.hessian_trace")).__name__)
from torch_secorder.core.hessian_diagonal import model_hessian_diagonal
"""
    install = "import secorder_func.compat as c; c.install_as_torch_secorder()"
    ours = _run(program.format(install=install))
    assert ours == "['function', 'function', 'module', 'module']\nfunction module"
    if importlib.util.find_spec("torch_secorder"):
        assert ours == _run(program.format(install=""))


def test_functions_are_pickled_and_pickles_of_the_package_open() -> None:
    program = """
import pickle
from secorder_func.compat import install_as_torch_secorder
install_as_torch_secorder()
import torch_secorder
for name in torch_secorder.__all__:
    function = getattr(torch_secorder, name)
    assert pickle.loads(pickle.dumps(function)) is function, name
old = b"ctorch_secorder.core.hessian_trace\\nhessian_trace\\n."
assert pickle.loads(old) is torch_secorder.hessian_trace
"""
    _run(program)


UNINSTALLED = """
import sys
try:
    import torch_secorder.core.utils as found
except ModuleNotFoundError:
    print("absent")
else:
    print(found.__name__)
print(flatten_params.__module__, flatten_params([__import__("torch").ones(2)]).tolist())
"""


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    "installed",
    [
        "h = install(); {use}; h.uninstall()",
        "install(); {use}; install().uninstall(); install().uninstall()",
        "with install(): {use}",
    ],
)
def test_an_installation_can_be_undone(installed: str, blocked: bool) -> None:
    finder = importlib.util.find_spec("torch_secorder")
    use = "from torch_secorder.core.utils import flatten_params"
    hide = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]"
        if blocked
        else ""
    )
    program = "\n".join(
        [
            "from secorder_func.compat import install_as_torch_secorder as install",
            "import torch, numpy",
            installed.format(use=use),
            hide,
            UNINSTALLED,
        ]
    )
    expected = "absent" if blocked or finder is None else "torch_secorder.core.utils"
    assert _run(program) == f"{expected}\nsecorder_func.compat.core.utils [1.0, 1.0]"


def test_an_inner_block_leaves_an_outer_installation_alone() -> None:
    program = """
import sys
from secorder_func.compat import install_as_torch_secorder as install
with install():
    with install():
        import torch_secorder.core.hvp
    assert "torch_secorder.core.hvp" in sys.modules
assert not [name for name in sys.modules if name.startswith("torch_secorder")]
"""
    _run(program)


def test_an_exception_in_a_block_undoes_the_installation() -> None:
    program = """
import sys
from secorder_func.compat import install_as_torch_secorder as install
try:
    with install():
        raise KeyError
except KeyError:
    print("torch_secorder" in sys.modules)
"""
    assert _run(program) == "False"


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
