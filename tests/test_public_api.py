"""What the package offers, and that every part of it is documented by an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import secorder_func
from secorder_func import errors, probes, tree

CORE = [
    "algorithms",
    "checks",
    "compat",
    "errors",
    "nn",
    "operators",
    "rules",
    "taylor",
    "transforms",
    "tree",
    "typing",
]


def _modules() -> list[str]:
    names = ["secorder_func"]
    for top in CORE:
        module = importlib.import_module(f"secorder_func.{top}")
        names.append(module.__name__)
        if hasattr(module, "__path__"):
            names += [m.name for m in pkgutil.walk_packages(module.__path__, f"{module.__name__}.")]
    return names


CALLABLES = [n for n in secorder_func.__all__ if callable(getattr(secorder_func, n))]
FUNCTIONS = [n for n in CALLABLES if inspect.isfunction(getattr(secorder_func, n))]


@pytest.mark.parametrize("name", secorder_func.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(secorder_func, name)
    assert len(inspect.getdoc(thing) or "") > 40


@pytest.mark.parametrize("name", [*FUNCTIONS, "Estimate", "LinearOperator"])
def test_every_public_function_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(secorder_func, name)) or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_annotated_throughout(name: str) -> None:
    signature = inspect.signature(getattr(secorder_func, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


@pytest.mark.parametrize("module", [tree, errors, probes], ids=lambda m: m.__name__)
def test_every_name_of_the_public_modules_exists_and_is_documented(module: Any) -> None:
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


def _on_the_api_pages() -> list[Any]:
    """Return what the lines `::: name` of docs/api/ show; of a module its members, or those of `members: [...]`."""
    shown = []
    for page in sorted((Path(__file__).parents[1] / "docs" / "api").glob("*.md")):
        for name, options in re.findall(r"^::: (\S+)((?:\n +.*)*)", page.read_text(), re.MULTILINE):
            thing = pkgutil.resolve_name(name)
            chosen = re.search(r"members: \[(.*)\]", options)
            members = chosen[1].split(", ") if chosen else getattr(thing, "__all__", [])
            shown += [thing, *(getattr(thing, member) for member in members)]
    return shown


@pytest.mark.parametrize(
    "name",
    [
        "",
        "checks",
        "compat",
        "errors",
        "lightning_callback",
        "nn",
        "report.plots",
        "report.surfaces",
        "taylor",
        "tracker",
        "transforms.likelihoods",
        "tree",
        "verify",
    ],
)
def test_every_public_name_is_on_a_page_of_the_api(name: str) -> None:
    module = pytest.importorskip(f"secorder_func.{name}".rstrip("."), exc_type=ImportError)
    shown = _on_the_api_pages()
    # A module is there by its names. What is no function or class is a table or an alias.
    public = [n for n in module.__all__ if callable(getattr(module, n))]
    assert [n for n in public if getattr(module, n) not in shown] == []


@pytest.mark.parametrize("name", _modules())
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0


@pytest.mark.parametrize("name", _modules())
def test_every_module_says_what_it_is_and_what_it_exports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert all(hasattr(module, export) for export in module.__all__)


def test_the_public_names_are_sorted_and_unique() -> None:
    assert sorted(set(secorder_func.__all__)) == secorder_func.__all__


def test_the_version_is_one() -> None:
    assert len(secorder_func.__version__.split(".")) == 3


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (errors.ArgumentError, (ValueError, RuntimeError)),
        (errors.ArgumentTypeError, (ValueError, RuntimeError, TypeError)),
        (errors.NoExactRouteError, (RuntimeError,)),
        (errors.CurvatureFallbackWarning, (UserWarning,)),
        (errors.MissingExtraError, (ImportError,)),
    ],
)
def test_errors_are_of_the_kinds_that_callers_catch(error: type, bases: tuple[type, ...]) -> None:
    assert all(issubclass(error, base) for base in bases)


def test_a_missing_extra_says_how_to_install_it() -> None:
    error = errors.MissingExtraError("LinearOperator.scipy", "SciPy", "scipy")
    assert str(error) == (
        "LinearOperator.scipy needs SciPy, which is not installed. "
        "Install it with: pip install 'secorder-func[scipy]'."
    )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("f", "no"), "f: no."),
        (("f", "no."), "f: no."),
        (("f", "no", "Do so"), "f: no. Do so."),
        (("f", "no.", "Do so."), "f: no. Do so."),
    ],
)
def test_messages_have_one_full_stop_between_their_parts(parts: tuple[str, ...], text: str) -> None:
    assert errors.message(*parts) == text


def test_the_core_works_without_scipy_matplotlib_rich_and_scikit_learn() -> None:
    program = (
        "import sys\n"
        "for name in ('scipy', 'matplotlib', 'rich', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import secorder_func, torch\n"
        "op = secorder_func.hessian_operator(lambda p: (p**3).sum(), torch.ones(2))\n"
        "assert op.dense().trace() == 12\n"
        "try:\n"
        "    op.scipy()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LinearOperator.scipy needs SciPy" in done.stdout


def test_the_first_product_of_a_process_raises_no_warning_of_torch() -> None:
    program = (
        "import torch; from secorder_func import hvp; "
        "print(hvp(lambda p: (p**3).sum())(torch.ones(1), torch.ones(1)).item())"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "6.0\n"), done.stderr
