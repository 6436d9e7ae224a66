"""The evaluation of a loss in which every tensor has first-order terms along several vectors, and their bends.

No derivative is taken backward and nothing is stored for one: a function is evaluated with autograd off, its terms are
computed beside it, and they die with the value. What depends on the parameters is then marked as a leaf that requires
gradients, so that autograd still tells, as in `Propagation`, of a tensor that was made behind our back from one that
has terms.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secorder_func.rules.torch_func import without_vmap_warnings
from secorder_func.taylor.in_place import as_out_of_place, rebind
from secorder_func.taylor.propagation import A_TERM, A_VALUE, Propagation, name_of, spelled
from secorder_func.taylor.registry import (
    NotCoveredError,
    NotPropagatedError,
    Rule,
    written_by_repair,
)
from secorder_func.taylor.second_order.derived import derived
from secorder_func.taylor.second_order.general import PROVEN_TWICE, bent_by_torch, is_smooth
from secorder_func.taylor.second_order.registry import CLOSED, WRITTEN

__all__ = ["Draw", "SecondOrderPropagation"]

Draw = Callable[[], Tensor]
"""Makes the terms of a leaf, `(K, *leaf.shape)`, the same every time."""


class _Jet(NamedTuple):
    first: Tensor
    second: Tensor | None


class _Leaf(NamedTuple):
    draw: Draw


class SecondOrderPropagation(Propagation):
    """The rules of second order, and beside every value its terms of first and second order.

    Parameters
    ----------
    leaves
        Tensors that require gradients.
    draws
        What makes the terms of each, None where they are zero. They are drawn when a function takes the leaf, and kept
        while they take no more than twice the bytes of the largest.
    count
        The number K of vectors.
    groups
        The number J of groups of consecutive vectors, over each of which second-order terms are summed.
    across
        Whether the vectors are two, and the form is of one with the other (twice).
    only_first
        Whether to leave second-order terms out.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        draws: Sequence[Draw | None],
        *,
        count: int,
        groups: int,
        across: bool = False,
        only_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__((), several=True, closed=True, record=False, **options)
        self.count, self.groups, self.across, self.only_first = count, groups, across, only_first
        self._repairing = False
        self._kept: dict[int, _Jet] = {}
        sizes = [leaf.numel() * leaf.element_size() for leaf in leaves]
        self._room = 2 * count * max(sizes, default=0)
        self.largest = 0
        for leaf, draw in zip(leaves, draws, strict=True):
            self.set(leaf, None if draw is None else _Leaf(draw))

    # ------------------------------------------------------------------------------- the table

    def __call__(self, x: Any, /) -> Any:
        """Return the first-order terms of a tensor, None where they are zero."""
        if self._mapped is not None and isinstance(x, Tensor):
            return self._mapped.get(id(x))
        jet = self._jet(x)
        return None if jet is None else jet.first

    def second(self, x: Any, /) -> Any:
        """Return the second-order terms of a tensor, None where they are zero."""
        jet = self._jet(x)
        return None if jet is None else jet.second

    def _jet(self, x: Any) -> _Jet | None:
        entry = self._entry(x)
        if not isinstance(entry, _Leaf):
            return entry  # type: ignore[no-any-return]
        jet = self._kept.pop(id(x), None)
        if jet is None:
            jet = _Jet(entry.draw(), None)
        self._kept[id(x)] = jet
        while len(self._kept) > 1 and sum(j.first.nbytes for j in self._kept.values()) > self._room:
            del self._kept[next(iter(self._kept))]
        return jet

    def set(self, x: Tensor, term: Any) -> None:
        """Remember the terms of a tensor for as long as this lives, and mark it if it has any."""
        if term is not None and not isinstance(term, _Leaf):
            # Its history would say that it was made here, but it has none.
            self.shadows.born[id(x)] = weakref.ref(x)
            if not x.requires_grad:
                x.requires_grad_()
        super().set(x, term)

    # -------------------------------------------------------------------- sums over the vectors

    def partner(self, first: Tensor, /) -> Tensor:
        """Return what each first-order term is multiplied with: itself, or the other vector's."""
        return first.flip(0) if self.across else first

    def gathered(self, each: Tensor, /) -> Tensor:
        """Return the sums over the groups of something with one place a vector."""
        return each if self.groups == self.count else each.unflatten(0, (self.groups, -1)).sum(1)

    def products(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Return the sums over the groups of `a_k * partner(b)_k`, in memory of their own."""
        b = self.partner(b)
        if a.shape != b.shape:
            return self.gathered(a * b)
        size = self.count // self.groups
        a, b = a.unflatten(0, (self.groups, size)), b.unflatten(0, (self.groups, size))
        total = a[:, 0] * b[:, 0]
        for place in range(1, size):
            total.addcmul_(a[:, place], b[:, place])
        return total

    def contracted(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Return the sums over the groups of the matrix products `a_k @ partner(b)_k` of `(K, ., .)`."""
        b = self.partner(b)
        size = self.count // self.groups
        total = torch.bmm(a[::size], b[::size])
        for place in range(1, size):
            total.baddbmm_(a[place::size], b[place::size])
        return total

    def mapped(self, terms: dict[int, Tensor], push: Callable[[], Any]) -> Any:
        """Return what `push` gives for each of several terms, stacked; None where it gives none."""
        kept: list[bool] = []
        alone = True

        def some() -> Any:
            nonlocal kept, alone
            found = push()
            alone = not isinstance(found, (tuple, list))
            parts = (found,) if alone else found
            kept = [part is not None for part in parts]
            return tuple(part for part in parts if part is not None)

        with without_vmap_warnings():
            stacked = iter(self._mapping(terms, some))
        parts = [next(stacked) if is_kept else None for is_kept in kept]
        return parts[0] if alone else parts

    # --------------------------------------------------------------------------- one function

    @property
    def higher(self) -> bool:
        """Whether a repair is to write its function out, of which more derivatives are taken than it may know."""
        return self._repairing or super().higher

    @property
    def forward(self) -> bool:
        """Whether a repair is to write its function out."""
        return self._repairing or super().forward

    @property
    def order(self) -> str:
        """The modes of the derivatives as a repair must know them."""
        return "FF" if self._repairing else super().order

    def _rule(self, func: Any) -> Rule | None:
        if func in WRITTEN:
            return Rule("written", WRITTEN[func])
        rule = super()._rule(func)
        if rule is None or func in CLOSED or rule.beyond is None:
            return rule
        return None if rule.beyond is written_by_repair else Rule("written", rule.beyond)

    def _written_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        before, self._repairing = self._repairing, True
        try:
            return super()._written_out(func, args, kwargs)
        finally:
            self._repairing = before

    def value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluate a function, with nothing recorded."""
        before, self._repairing = self._repairing, False
        try:
            with torch.no_grad():
                return super().value(func, args, kwargs)
        finally:
            self._repairing = before

    def _unique(self, value: Any) -> list[Tensor]:
        return list({id(x): x for x in self._carried(value)}.values())

    def _by_rule(self, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        plain, kwargs = kwargs, spelled(kwargs)
        carried = self._unique((args, kwargs))
        if not carried:
            return self.value(func, args, plain)
        if rule.kind == "written":
            return super()._by_rule(rule, func, args, kwargs)
        with torch.no_grad(), A_TERM:
            out, first, second = self._terms(rule, func, args, kwargs, carried)
        self.kinds[func] = "closed" if func in CLOSED else rule.kind
        if not any(out is x for x in carried):
            self._give(out, first, second)
        return out

    def _terms(
        self, rule: Rule, func: Any, args: Any, kwargs: Any, carried: list[Tensor]
    ) -> tuple[Any, Any, Any]:
        closed = CLOSED.get(func)
        if closed is not None:
            out = self.value(func, args, kwargs)
            try:
                return out, *closed(self, out, *args, **kwargs)
            except NotCoveredError:
                pass
        return derived(self, rule, func, args, kwargs, carried)

    def _give(self, out: Any, first: Any, second: Any) -> None:
        """Remember the terms of outputs."""
        if isinstance(out, (tuple, list)):
            firsts = [None] * len(out) if first is None else first
            seconds = [None] * len(out) if second is None else second
            for parts in zip(out, firsts, seconds, strict=True):
                self._give(*parts)
        elif isinstance(out, Tensor) and not (first is None and second is None):
            if not is_smooth(out):  # whole numbers beside others, of broadcast_tensors say
                return
            if first is None:
                first = torch.zeros((), dtype=out.dtype, device=out.device).expand(self.count)
            first = self._like(out, first)
            self.largest = max(self.largest, first.numel() // self.count * first.element_size())
            second = None if second is None or self.only_first else self._like(out, second)
            self.set(out, _Jet(first, second))

    def _by_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluate a function without a rule: torch's own was proved right, or it must not depend on the parameters."""
        if not self._asks((args, kwargs)):
            return func(*args, **kwargs)  # which may be a switch, as of no_grad
        carried = self._unique((args, kwargs))
        if not carried:
            with torch.no_grad():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if self._asks(out) and func in PROVEN_TWICE:
            with A_TERM:
                out, first, second = bent_by_torch(self, func, args, kwargs, carried)
            self.kinds[func] = "general"
            self._give(out, first, second)
            return out
        if self._asks(out):
            raise NotPropagatedError(f"there is no second-order rule for {name_of(func)}")
        return out

    # --------------------------------------------------------------------------------- writes

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluate a function that writes its first argument, which must have no other name."""
        target = args[0]
        if any(it is target and id(of) in self.known for of, it in self.shadows.replaced.values()):
            raise NotPropagatedError("a copy of a tensor that has terms is written to")
        carried = self._unique((args, kwargs))
        if not carried:
            return self.value(func, args, kwargs)
        if not isinstance(target, Tensor):
            raise NotPropagatedError(
                f"there is no rule for {name_of(func)}, which writes to several tensors"
            )
        rule, pure, given, options = as_out_of_place(func, args, kwargs)
        if rule is not None and rule.by_output:
            firsts = {id(x): self(x) for x in carried}
            seconds = {id(x): term for x in carried if (term := self.second(x)) is not None}
            out = self.value(func, args, kwargs)
            by_output = rule

            def push() -> Any:
                return by_output.push(self, target, *given, **options)

            with torch.no_grad(), A_TERM:
                first = self.mapped(firsts, push)
                second = self.mapped(seconds, push) if seconds else None
            self.kinds[func] = rule.kind
            jet = None
            if first is not None:
                second = None if second is None else self._like(target, second)
                jet = _Jet(self._like(target, first), second)
            rebind(self, target, jet)
            return out
        with torch.no_grad():
            old = target.clone()
        entry = self._jet(target)
        if entry is not None:
            self.set(old, entry)
        with self.on(), A_VALUE:
            new = pure(old, *given[1:], **options)
        with torch.no_grad():
            target.copy_(new)
        rebind(self, target, self._jet(new))
        return target
