"""The table of repairs: which torch function is replaced by what, and why.

A repair has the signature of the function that it replaces, after one leading argument: the `Rules` in
force. It runs with these switched off, so it may call the original.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

__all__ = [
    "REPAIRS",
    "DifferentiatesInside",
    "Repair",
    "Rules",
    "WrongForwardRuleError",
    "forward_is_differentiated",
    "repairs",
    "takes_dual_numbers",
    "takes_tangents",
]


class Rules(Protocol):
    """What a repair may know of the evaluation that it takes part in."""

    @property
    def forward(self) -> bool:
        """Some level differentiates in forward mode."""

    @property
    def dual(self) -> bool:
        """The derivatives are two, by plain dual numbers and a backward pass that is not recorded again."""

    @property
    def higher(self) -> bool:
        """Derivatives beyond the second may be taken of what is computed here."""

    @property
    def order(self) -> str:
        """The modes of the derivatives that run through what is computed here, outermost first: R and F.

        `grad(jvp(grad(f)))` is `"RFR"`.
        """

    def on(self) -> AbstractContextManager[Any]:
        """Switch the rules on again for what the repair calls."""


class DifferentiatesInside(BaseException):
    """The loss takes a derivative that its own derivatives run through."""


class WrongForwardRuleError(RuntimeError):
    """Forward mode met a function whose forward rule in torch gives wrong second derivatives."""


@dataclass(frozen=True)
class Repair:
    """One entry of the table: the replacement and the evidence for it."""

    apply: Callable[..., Any]
    because: str


REPAIRS: dict[Any, Repair] = {}
"""Torch function -> its repair, as `SecondOrderRules` looks it up."""

_F = TypeVar("_F", bound=Callable[..., Any])


def repairs(*functions: Any, because: str) -> Callable[[_F], _F]:
    """Register the decorated function as the repair of torch `functions`."""

    def register(apply: _F) -> _F:
        for function in functions:
            if function in REPAIRS:
                raise ValueError(f"two repairs for {function}")
            REPAIRS[function] = Repair(apply, because)
        return apply

    return register


def takes_dual_numbers(rules: Rules) -> bool:
    """Say `rules.dual`, which Dynamo cannot look up where a compiled module runs under rules made outside of it."""
    return not torch.compiler.is_compiling() and rules.dual


def takes_tangents(rules: Rules) -> bool:
    """Say `rules.forward` for a repair that is not needed under torch.compile."""
    return not torch.compiler.is_compiling() and rules.forward


def forward_is_differentiated(rules: Rules) -> bool:
    """Say whether a derivative in forward mode is itself differentiated, by either mode."""
    return "F" in rules.order[1:]
