"""What the command line prints and draws, and `write_report`. Needs the `report` extra; nothing else imports it."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secorder_func.checks import check_count
from secorder_func.errors import ArgumentTypeError, MissingExtraError, message

if TYPE_CHECKING:
    from torch import nn

    from secorder_func.typing import LossFn

__all__ = ["INTERRUPTED", "require_extra", "write_report"]

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""

_PACKAGES = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "jinja2": "Jinja2",
}
_OF_DIGITS = {"sklearn": "scikit-learn", "scipy": "SciPy"}


def require_extra(where: str, *, digits: bool = False) -> None:
    """Refuse to start without the packages of the `report` extra; those of the digits are needed for these only.

    Raises
    ------
    MissingExtraError
        One of them is not installed; the message says how to install all.
    """
    for module, package in (_PACKAGES | _OF_DIGITS if digits else _PACKAGES).items():
        _require(module, package, where)


def _require(module: str, package: str, where: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtraError(where, package, "report") from error


def write_report(
    model: nn.Module | LossFn,
    loss: Any,
    batches: Any,
    *,
    folder: str | PathLike[str] = "secorder-out",
    title: str | None = None,
    seed: int = 0,
    quick: bool = False,
    num_probes: int | None = None,
    num_eigenvalues: int | None = None,
) -> Path:
    """Measure the curvature of a loss and write a page about it, as `python -m secorder_func report` does.

    Trace, outermost eigenvalues, spectral density, layers, single samples and a slice of the loss surface, each number
    with its error; of the mean over all data, or of the sum if `Batches(..., reduction="sum")` says so.

    Parameters
    ----------
    model, loss
        A module and its `loss_fn(outputs, targets)`; or a loss `f(params, *batch)` and its parameters, a pytree. A
        module is measured in the mode that it is in, training or evaluation.
    batches
        A tuple for one batch, a list of batches, a `DataLoader`, or `Batches`.
    folder
        Where `report.html` and `report.json` are written; made if missing.
    title
        What was measured, for people. The name of the class or function unless given.
    seed
        Of all random vectors.
    quick
        Fewer probes, steps and samples.
    num_probes, num_eigenvalues
        For traces and diagonals, 64 unless given; at either end of the spectrum, 5 unless given.

    Returns
    -------
    Path
        Of the page. The JSON file beside it has all numbers.

    Raises
    ------
    MissingExtraError
        The packages that draw are not installed: `pip install secorder-func[report]`.
    ArgumentError
        What is given is no loss with parameters and data.
    OSError
        The folder cannot be written to; that is seen before anything is measured.
    KeyboardInterrupt
        After Ctrl-C, when the partial report is written; it says what is missing.

    Warns
    -----
    UserWarning
        A part of the measurements failed. The others are in the report, which says why.

    Notes
    -----
    Cost: some hundred Hessian-vector products and, of up to 1,024 samples, forms and traces. Bars show the time
    left where a terminal or a notebook can show them.

    Examples
    --------
    >>> import tempfile, torch
    >>> from torch import nn
    >>> from secorder_func.report import write_report
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    >>> data = torch.randn(30, 4), torch.randint(3, (30,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(model, nn.CrossEntropyLoss(), data, folder=folder, quick=True)
    ...     page.name, "Spectral density" in page.read_text()
    ('report.html', True)
    """
    require_extra("write_report")
    from secorder_func.report.command import report_of, settings_of

    for name, count in (("num_probes", num_probes), ("num_eigenvalues", num_eigenvalues)):
        if count is not None:
            check_count(count, "write_report", name=name)
    for name, given, kind, what in (
        ("folder", folder, (str, PathLike), "a path"),
        ("seed", seed, int, "a whole number"),
    ):
        if not isinstance(given, kind):
            problem = f"{name} must be {what}, got {type(given).__name__}"
            raise ArgumentTypeError(message("write_report", problem))
    return report_of(
        (model, loss, batches),
        Path(folder),
        title=str(title or getattr(model, "__name__", type(model).__name__)),
        seed=seed,
        settings=settings_of(quick, num_probes, num_eigenvalues),
    )
