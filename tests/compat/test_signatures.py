"""Names, module tree and signatures are those of the published package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import FunctionType, ModuleType
from typing import Any

import pytest

import secorder_func.compat

theirs = pytest.importorskip("torch_secorder", reason="the published package needs Python 3.11")

OURS = "secorder_func.compat"
MODULES = [
    info.name.removeprefix("torch_secorder")
    for info in pkgutil.walk_packages(theirs.__path__, "torch_secorder.")
    if not info.name.split(".")[-1].startswith("_")
]


def _functions() -> list[tuple[str, str]]:
    """Return every public function by the module that defines it, aliases too."""
    found = []
    for path in MODULES:
        module = importlib.import_module("torch_secorder" + path)
        for name, thing in vars(module).items():
            if isinstance(thing, FunctionType) and thing.__module__ == module.__name__:
                found.append((path, name))
    return found


def _form(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_package_has_the_modules_and_functions_that_we_know_of() -> None:
    assert len(MODULES) == 14
    assert len(_functions()) == 37


@pytest.mark.parametrize(("path", "name"), _functions())
def test_every_function_has_the_signature_of_the_package(path: str, name: str) -> None:
    their_function = getattr(importlib.import_module("torch_secorder" + path), name)
    our_function = getattr(importlib.import_module(OURS + path), name)
    assert _form(our_function) == _form(their_function)


@pytest.mark.parametrize(
    "path",
    [
        "",
        *(p for p in MODULES if hasattr(importlib.import_module("torch_secorder" + p), "__all__")),
    ],
)
def test_every_module_exports_the_names_of_the_package(path: str) -> None:
    their_names = set(importlib.import_module("torch_secorder" + path).__all__)
    our_names = set(importlib.import_module(OURS + path).__all__)
    assert our_names - {"install_as_torch_secorder"} == their_names


@pytest.mark.parametrize("path", ["", ".core", ".approximations", ".analysis"])
def test_every_name_is_a_function_or_a_module_as_in_the_package(path: str) -> None:
    def public(module: ModuleType) -> dict[str, type]:
        kinds = (FunctionType, ModuleType)
        return {n: type(t) for n, t in vars(module).items() if isinstance(t, kinds) and n[0] != "_"}

    their_names = public(importlib.import_module("torch_secorder" + path))
    our_names = public(importlib.import_module(OURS + path))
    assert {name: our_names.get(name) for name in their_names} == their_names


def test_the_names_are_in_order_and_the_version_is_the_package_s() -> None:
    assert sorted(secorder_func.compat.__all__) == secorder_func.compat.__all__
    assert secorder_func.compat.__version__ == theirs.__version__
