"""The evaluation of a loss in which every tensor has its first-order term.

Values are computed as ever and recorded by autograd; the terms stand beside them in a table by identity. So autograd
says of each tensor whether it must have a term: one that requires gradients and is not in the table was made behind our
back (by a custom function, TorchScript, another thread), upon which `NotPropagatedError` is raised. What stops
derivatives in autograd, `detach` or `no_grad`, stops them here for the same reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.func import vmap

from secorder_func.rules.levels import requires_gradients
from secorder_func.rules.mode import SecondOrderRules
from secorder_func.rules.registry import REPAIRS
from secorder_func.rules.see_through import see_through
from secorder_func.rules.writes import writes_first
from secorder_func.taylor.general import PROVEN, pushed_by_torch
from secorder_func.taylor.in_place import as_out_of_place, rebind
from secorder_func.taylor.registry import (
    RULES,
    NotCoveredError,
    NotPropagatedError,
    Rule,
    written_by_repair,
)

__all__ = ["A_TERM", "A_VALUE", "Propagation", "name_of", "spelled"]

_IN_PYTHON = (F.__name__, "torch.functional", "torch._tensor")
"""Modules whose functions are written in Python out of others."""

_TENSOR: Any = torch.Tensor
_STOPS = frozenset({torch.detach, _TENSOR.detach, _TENSOR.detach_, _TENSOR.data.__get__})
"""Functions whose result has no derivatives, whatever they are given."""
_SET_PART = _TENSOR._backward_hooks.__set__
"""What torch 2.13 shows a mode in the place of `x.real = ...` and `x.imag = ...`."""


class Propagation(SecondOrderRules):
    """The rules of second order, and beside every value its first-order term.

    Parameters
    ----------
    pairs
        Tensors, which require gradients, and their terms.
    several
        Whether the terms have a leading axis, one place for each of several vectors.
    closed
        Whether a function without a rule of ours ends the propagation, even if torch's is right.
    record
        Whether the terms are to be differentiated.

    Attributes
    ----------
    kinds
        The functions that a term went through -> the kind of the rule.
    constants
        By their ids, captured tensors that require gradients though they have no term.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        several: bool = False,
        closed: bool = False,
        record: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.several = several
        self.records = record
        # What is proved of torch's own rules is proved for second derivatives.
        self._closed = closed or self.higher
        self._within = torch._C._are_functorch_transforms_active()
        self._mapped: dict[int, Tensor] | None = None
        self._writing: list[Any] = []
        self._is_on = False
        self._part_assigned = False
        self.known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self.kinds: dict[Any, str] = {}
        self.constants: dict[int, Tensor] = {}
        for tensor, term in pairs:
            self.set(tensor, term)

    # ------------------------------------------------------------------------------- the table

    def __call__(self, x: Any, /) -> Any:
        """Return the term of a tensor, None where it is zero."""
        if self._mapped is not None and isinstance(x, Tensor):
            return self._mapped.get(id(x))
        return self._entry(x)

    def _entry(self, x: Any) -> Any:
        """Return what the table has for a tensor, None where its term is zero."""
        if not isinstance(x, Tensor) or not self._requires(x):
            return None
        if self._part_assigned:
            raise NotPropagatedError("the real or imaginary part of a tensor is assigned")
        known = self.known.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        if x.is_leaf and not _functorch.is_functorch_wrapped_tensor(x):
            self.constants[id(x)] = x
            return None
        raise NotPropagatedError(
            "a tensor of the loss was computed where torch functions cannot be seen (a custom autograd.Function, "
            "TorchScript, a vmap inside the loss) or before the loss"
        )

    def or_zeros(self, x: Tensor, /) -> Tensor:
        """Return the term of a tensor, zeros where it is zero."""
        term: Tensor | None = self(x)
        return torch.zeros_like(x) if term is None else term

    def summed(self, fresh: Tensor, other: Tensor, /) -> Tensor:
        """Return the sum, in the memory of the first, which nobody else has, where that can be."""
        if self._within or self._mapped is not None or fresh.shape != other.shape:
            return fresh + other
        return fresh.add_(other) if fresh.dtype == other.dtype else fresh + other

    def set(self, x: Tensor, term: Any) -> None:
        """Remember the term of a tensor for as long as this lives."""
        key = id(x)
        self.known[key] = (weakref.ref(x, partial(_forget, self.known, key)), term)

    def _requires(self, x: Tensor) -> bool:
        return requires_gradients(x) if self._within else x.requires_grad

    def _asks(self, value: Any) -> bool:
        """Say whether a tensor in a value requires gradients."""
        if isinstance(value, Tensor):
            return self._requires(value)
        if isinstance(value, (tuple, list)):
            return any(map(self._asks, value))
        if isinstance(value, dict):
            return any(map(self._asks, value.values()))
        return False

    # --------------------------------------------------------------------------- one function

    def _repaired(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, self._is_on = self._is_on, False
        try:
            return self._propagated(func, args, kwargs)
        finally:
            self._is_on = before

    def on(self) -> AbstractContextManager[Any]:
        """Switch the propagation on again, if it is off, for what is written out of other functions."""
        return nullcontext() if self._is_on else self._switched_on()

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        self._is_on = True
        try:
            with self:
                yield
        finally:
            self._is_on = False

    def _propagated(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or func in _STOPS:
            return super()._repaired(func, args, kwargs)
        if self.hooked:
            raise NotPropagatedError("a hook in the loss may change what is computed")
        if func is torch.autograd.grad:
            raise NotPropagatedError("the loss takes a gradient itself")
        if func == _SET_PART:
            self._part_assigned = True  # an error raised here would be swallowed
        if writes_first(func, args, kwargs):
            return self._write(func, args, kwargs)
        rule = self._rule(func)
        if rule is not None:
            try:
                return self._by_rule(rule, func, args, kwargs)
            except NotCoveredError as error:
                if self._closed or func not in PROVEN:
                    raise NotCoveredError(f"{name_of(func)}: {error}") from error
                return self._by_torch(func, args, kwargs)
        if func in REPAIRS and func not in self._writing:
            return self._written_out(func, args, kwargs)
        body = _body(func)
        if body is not None and body not in self._writing and self._asks((args, kwargs)):
            self.kinds[func] = "written"
            with self._writing_out(body):
                return body(*args, **kwargs)
        return self._by_torch(func, args, kwargs)

    def _rule(self, func: Any) -> Rule | None:
        """Return the rule of a function, None if it has none here."""
        rule = RULES.get(func)
        if rule is None or rule.beyond is None or not self.higher:
            return rule
        return None if rule.beyond is written_by_repair else Rule("written", rule.beyond)

    def _written_out(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Evaluate the repair of a function under the propagation."""
        with self._writing_out(func):
            return REPAIRS[func].apply(self, *args, **kwargs)

    def _by_rule(
        self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plain, kwargs = kwargs, spelled(kwargs)
        if rule.kind == "written":
            if not self._asks((args, kwargs)):
                return super()._repaired(func, args, kwargs)
            self.kinds[func] = rule.kind
            with self.on(), A_VALUE:
                return rule.push(*args, **kwargs)
        if rule.together and self._asks((args, kwargs)):
            with A_VALUE:
                out, term_of = rule.push(*args, **kwargs)
            push = partial(term_of, self)
        else:
            out = self.value(func, args, plain)
            push = partial(rule.push, self, out, *args, **kwargs)
        if self._asks(out):
            self.kinds[func] = rule.kind
            self._set_result(out, self._pushed(push, args, kwargs))
        return out

    def value(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate a function that has a rule."""
        return super()._repaired(func, args, kwargs)

    def _pushed(
        self, push: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the term, or terms, of an output."""
        carried = list(self._carried((args, kwargs)))
        if not carried:
            return None
        recording = nullcontext() if self.records else torch.no_grad()
        with recording, A_TERM:
            if not self.several:
                return push()
            return self._mapping({id(x): self(x) for x in carried}, push)

    def _carried(self, value: Any) -> Iterator[Tensor]:
        """Yield the tensors in a value that have a term, each once for each time it occurs."""
        if isinstance(value, Tensor):
            if self._entry(value) is not None:
                yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from self._carried(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from self._carried(item)

    def _mapping(self, terms: dict[int, Tensor], push: Callable[[], Any]) -> Any:
        """Return what `push` gives for each of several terms, stacked; they are known by the ids of their tensors."""

        def one(*each: Tensor) -> Any:
            before, self._mapped = self._mapped, dict(zip(terms, each, strict=True))
            try:
                return push()
            finally:
                self._mapped = before

        return vmap(one, randomness="error")(*terms.values())

    def _set_result(self, out: Any, term: Any) -> None:
        if isinstance(out, Tensor):
            if self._requires(out):
                self.set(out, None if term is None else self._like(out, term))
        elif isinstance(out, (tuple, list)):
            terms = [None] * len(out) if term is None else term
            for one, its in zip(out, terms, strict=True):
                self._set_result(one, its)

    def _like(self, out: Tensor, term: Tensor) -> Tensor:
        """Return a term in the shape and dtype of its value."""
        if not isinstance(term, Tensor):
            raise NotCoveredError(f"its rule returned {type(term).__name__}, not a tensor")
        shape: tuple[int, ...] = out.shape
        if self.several:
            shape = (term.shape[0], *shape)
            while term.ndim < len(shape):
                term = term.unsqueeze(1)
        if term.shape != shape:
            try:
                term = term.expand(shape)
            except RuntimeError as error:
                problem = (
                    f"its rule returned a term of shape {tuple(term.shape)} for {tuple(shape)}"
                )
                raise NotCoveredError(problem) from error
        return term if term.dtype == out.dtype else term.to(out.dtype)

    @contextmanager
    def _writing_out(self, func: Any) -> Iterator[None]:
        """Evaluate the repair of a function under the propagation, the function itself without it."""
        self._writing.append(func)
        try:
            with self.on():
                yield
        finally:
            self._writing.pop()

    def _by_torch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Push through a function by torch's own forward rule, if a sweep proved it right."""
        if not self._asks((args, kwargs)):
            return func(*args, **kwargs)
        carried = list({id(x): x for x in self._carried((args, kwargs))}.values())
        if carried and not self._closed and not self.several and func in PROVEN:
            terms = tuple(self(x) for x in carried)
            out, term = pushed_by_torch(func, args, kwargs, carried, terms)
            self.kinds[func] = "general"
            self._set_result(out, term)
            return out
        out = func(*args, **kwargs)
        if self._asks(out):
            if carried:
                raise NotPropagatedError(f"there is no rule for {name_of(func)}")
            self._set_result(out, None)
        return out

    # --------------------------------------------------------------------------------- writes

    def _write(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Evaluate a function that writes its first argument."""
        target = args[0]
        if not self._asks((args, kwargs)):
            return super()._repaired(func, args, kwargs)
        if not isinstance(target, Tensor):
            raise NotPropagatedError(
                f"there is no rule for {name_of(func)}, which writes to several tensors"
            )
        rule, pure, given, options = as_out_of_place(func, args, kwargs)
        if rule is not None and rule.by_output:
            before = self(target)
            carried = before is not None or next(self._carried((given, options)), None) is not None
            out = super()._repaired(func, args, kwargs)
            if self._requires(target):
                self.set(target, before)
                self.kinds[func] = rule.kind
                push = partial(rule.push, self, target, *given, **options)
                term = self._pushed(push, given, options) if carried else None
                rebind(self, target, None if term is None else self._like(target, term))
            return out
        old = target.clone()
        if self._requires(old):
            before = self(target)
            self.set(old, None if before is None else before.clone())
        with self.on():
            new = pure(old, *given[1:], **options)
        target.copy_(new)
        rebind(self, target, self(new))
        return target


class _Covered:
    """Takes errors of a rule for arguments that it does not cover: an error of the user's own comes again elsewhere.

    A class because a generator's context costs several times as much, at every function.
    """

    __slots__ = ("_errors",)

    def __init__(self, *errors: type[Exception]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None or issubclass(kind, (NotPropagatedError, torch.OutOfMemoryError)):
            return
        if issubclass(kind, self._errors):
            raise NotCoveredError(f"a rule does not cover its arguments: {error}") from error


A_VALUE = _Covered(TypeError, ValueError, LookupError)
A_TERM = _Covered(RuntimeError, TypeError, ValueError, LookupError)

_SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}


def spelled(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name as torch spells them, which understands NumPy's names too."""
    if _SPELLINGS.keys().isdisjoint(kwargs):
        return kwargs
    return {_SPELLINGS.get(key, key): value for key, value in kwargs.items()}


def _forget(known: dict[int, Any], key: int, reference: Any) -> None:
    if key in known and known[key][0] is reference:
        del known[key]


@cache
def _body(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a Python function of torch so that the functions in it can be seen, None for any other."""
    if isinstance(func, FunctionType) and func.__module__ in _IN_PYTHON:
        return see_through(func)
    return None


def name_of(func: Any) -> str:
    """Return the name of a function for messages."""
    return getattr(func, "__qualname__", None) or str(func)
