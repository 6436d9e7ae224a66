"""Make unchanged imports of `torch_secorder` resolve to this package, and undo it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

from secorder_func.errors import message

__all__ = ["Installation", "install_as_torch_secorder"]

_NAME = "torch_secorder"
_OURS = "secorder_func.compat"


class Installation:
    """What `install_as_torch_secorder` did: undone by `uninstall()`, or at the end of a `with` block.

    The end of a block leaves alone what was installed before the block.
    """

    def __init__(self, *, first: bool) -> None:
        self._first = first

    def uninstall(self) -> None:
        """Let imports of `torch_secorder` find what they found before; what was imported meanwhile keeps working."""
        for name in [name for name in _registered() if _is_ours(sys.modules[name])]:
            del sys.modules[name]

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first:
            self.uninstall()


def install_as_torch_secorder() -> Installation:
    """Let `from torch_secorder.core.hvp import exact_hvp` import from `secorder_func.compat`.

    Works for the whole process and for every submodule, whether or not the published package is installed; a process
    that is spawned must call it too. Calling it again changes nothing.

    Returns
    -------
    Installation
        Its `uninstall()` undoes it, and so does the end of a `with` block.

    Raises
    ------
    ImportError
        The published package has been imported already, so that parts of the program hold its functions.

    Examples
    --------
    >>> from secorder_func.compat import install_as_torch_secorder
    >>> with install_as_torch_secorder():  # doctest: +SKIP
    ...     from torch_secorder.core.hvp import exact_hvp
    >>> exact_hvp.__module__  # doctest: +SKIP
    'secorder_func.compat.core.hvp'
    """
    present = [name for name in _registered() if sys.modules[name] is not None]
    foreign = [name for name in present if not _is_ours(sys.modules[name])]
    if foreign:
        raise ImportError(
            message(
                "install_as_torch_secorder",
                f"the published {_NAME} has been imported already ({', '.join(sorted(foreign)[:3])})",
                "Call install_as_torch_secorder() before the first import of it",
            )
        )
    for module in _modules():
        sys.modules[_NAME + module.__name__.removeprefix(_OURS)] = module
    return Installation(first=not present)


def _registered() -> list[str]:
    return [name for name in list(sys.modules) if name == _NAME or name.startswith(_NAME + ".")]


def _is_ours(module: ModuleType | None) -> bool:
    return module is not None and (module.__name__ + ".").startswith(_OURS + ".")


def _modules() -> list[ModuleType]:
    """Return this package and every module in it; private ones too, so that none can be imported twice."""
    package = importlib.import_module(_OURS)
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package, *(importlib.import_module(info.name) for info in found)]
