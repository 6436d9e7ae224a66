"""What a verification found, as data and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from secorder_func.errors import VerificationError

__all__ = ["Cause", "Check", "Verification"]

_WIDTH = 100
_INDENT = " " * 10
_VERDICTS = {True: "ok", False: "FAILED", None: "note"}


@dataclass(frozen=True)
class Cause:
    """A likely cause, with what to do about it.

    Attributes
    ----------
    what
        What seems to be the matter, and what speaks for it.
    mend
        What to change.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import verify
    >>> cause = verify(lambda p: (p.detach() ** 3).sum(), torch.ones(3))["dependence"].causes[0]
    >>> cause.what
    'detach() in the loss cuts it off from its parameters'
    >>> cause.mend
    'Take that out.'
    """

    what: str
    mend: str


@dataclass(frozen=True)
class Check:
    """One check of a verification.

    Attributes
    ----------
    name
        The same for this check in every verification.
    passed
        True or False; None for a piece of information, and for a comparison that could not decide.
    finding
        What came out, in a line.
    means
        What is known where the check passes.
    measured, tolerance
        The relative difference and how much of it is allowed, None where nothing is compared.
    causes
        The likely causes of a failure, likeliest first.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import verify
    >>> check = verify(lambda p: (p**3).sum(), torch.ones(3))["gradient"]
    >>> check.passed, check.finding
    (True, 'finite, of norm 5.2')
    """

    name: str
    passed: bool | None
    finding: str
    means: str
    measured: float | None = None
    tolerance: float | None = None
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What `verify` found. It is true if no check failed, and prints as a report.

    Attributes
    ----------
    checks
        In the order in which they were made. A check that needs one that failed is not made.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import verify
    >>> result = verify(lambda p: (p.detach() ** 3).sum(), torch.ones(3))
    >>> bool(result), [check.name for check in result.failed]
    (False, ['dependence'])
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} among {[check.name for check in self.checks]}")

    def raise_if_failed(self) -> None:
        """Raise `VerificationError` with the report as its message, unless all is well."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        column = max((len(check.name) for check in self.checks), default=0)
        lines = [_headline(self), ""]
        for check in self.checks:
            lines += _lines(check, column)
        return "\n".join(lines)


def _headline(result: Verification) -> str:
    passed = sum(check.passed is True for check in result.checks)
    undecided = sum(check.passed is None and check.measured is not None for check in result.checks)
    if result.ok:
        open_ones = f", {undecided} could not decide" if undecided else ""
        return f"All is well: {passed} checks passed{open_ones}."
    names = ", ".join(check.name for check in result.failed)
    return f"{len(result.failed)} of {passed + len(result.failed)} checks failed: {names}."


def _lines(check: Check, column: int) -> Iterator[str]:
    yield from _wrapped(check.finding, f"  {_VERDICTS[check.passed]:<8}{check.name:<{column}}  ")
    if check.passed is False:
        yield from _wrapped(check.means, f"{_INDENT}expected  ")
    for cause in check.causes:
        yield from _wrapped(cause.what, f"{_INDENT}cause     ")
        yield from _wrapped(cause.mend, f"{_INDENT}mend      ")


def _wrapped(text: str, head: str) -> Iterator[str]:
    """Fold the lines of a text to the width of the report, with `head` before the first one."""
    blanks = " " * len(head)
    for number, line in enumerate(text.splitlines() or [""]):
        yield from textwrap.wrap(
            line,
            _WIDTH,
            initial_indent=blanks if number else head,
            subsequent_indent=blanks,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [head.rstrip()]
