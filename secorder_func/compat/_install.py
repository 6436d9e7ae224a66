"""Make unchanged imports of `torch_secorder` resolve to this package."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

from secorder_func.errors import message

__all__ = ["install_as_torch_secorder"]

_NAME = "torch_secorder"


def install_as_torch_secorder() -> None:
    """Let `from torch_secorder.core.hvp import exact_hvp` import from `secorder_func.compat`.

    Works for the whole process, whether or not the published package is installed. Calling it again changes nothing.

    Raises
    ------
    ImportError
        The published package has been imported already, so that parts of the program hold its functions.

    Examples
    --------
    >>> from secorder_func.compat import install_as_torch_secorder
    >>> install_as_torch_secorder()  # doctest: +SKIP
    >>> from torch_secorder.core.hvp import exact_hvp  # doctest: +SKIP
    >>> exact_hvp.__module__  # doctest: +SKIP
    'secorder_func.compat.core.hvp'
    """
    ours = importlib.import_module("secorder_func.compat")
    foreign = [
        name
        for name, module in sys.modules.items()
        if (name == _NAME or name.startswith(_NAME + ".")) and not _is_ours(module)
    ]
    if foreign:
        raise ImportError(
            message(
                "install_as_torch_secorder",
                f"the published {_NAME} has been imported already ({', '.join(sorted(foreign)[:3])})",
                "Call install_as_torch_secorder() before the first import of it",
            )
        )
    for module in (ours, *_submodules(ours)):
        sys.modules[_NAME + module.__name__.removeprefix(ours.__name__)] = module


def _is_ours(module: ModuleType) -> bool:
    return module.__name__.startswith("secorder_func.compat")


def _submodules(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [importlib.import_module(info.name) for info in found if "._" not in info.name]
