"""What the command line prints and draws. Needs the `report` extra; nothing else imports it."""

from __future__ import annotations

from importlib import import_module

from secorder_func.errors import MissingExtraError

__all__ = ["INTERRUPTED", "require_extra"]

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""

_PACKAGES = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "jinja2": "Jinja2",
    "sklearn": "scikit-learn",
    "scipy": "SciPy",
}


def require_extra(where: str) -> None:
    """Refuse to start without the packages of the `report` extra.

    Raises
    ------
    MissingExtraError
        One of them is not installed; the message says how to install all.
    """
    for module, package in _PACKAGES.items():
        _require(module, package, where)


def _require(module: str, package: str, where: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtraError(where, package, "report") from error
