"""The mode under which every loss is evaluated while it is differentiated.

One `TorchFunctionMode` does three things for each torch function that the loss calls, in this order: tensors that have
a stand-in are exchanged for it by identity, writes to captured tensors go to a copy, and functions in the
table of repairs are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secorder_func.rules.levels import JVP, differentiating_levels
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.registry import REPAIRS, DifferentiatesInside
from secorder_func.rules.state import Shadows, module_attributes_restored
from secorder_func.rules.writes import redirected

__all__ = ["SecondOrderRules", "evaluated", "evaluation"]

T = TypeVar("T")

_TENSOR: Any = torch.Tensor
_GET_GRAD = _TENSOR.grad.__get__

_LOOKS = frozenset(
    {
        _TENSOR._backward_hooks.__get__,
        _TENSOR.device.__get__,
        _TENSOR.dtype.__get__,
        _TENSOR.is_nested.__get__,
        _TENSOR.is_sparse.__get__,
        _TENSOR.layout.__get__,
        _TENSOR.ndim.__get__,
        _TENSOR.shape.__get__,
        _TENSOR.dim,
        _TENSOR.is_complex,
        _TENSOR.is_floating_point,
        _TENSOR.numel,
        _TENSOR.size,
    }
)
"""What a tensor says of itself, the same for a stand-in. autograd asks for it several times a tensor."""

_REGISTER_HOOK = _TENSOR.register_hook
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks

_METHODS: dict[Any, Any] = {
    _TENSOR.__pow__: _TENSOR.pow,
    _TENSOR.__ipow__: _TENSOR.pow_,
    _TENSOR.norm: torch.norm,
}
"""Methods of tensors written in Python -> their name in the table, whose keys Dynamo must be able to look up."""


class SecondOrderRules(TorchFunctionMode):
    """Repairs torch functions, exchanges tensors by identity, keeps writes from captured tensors.

    Attributes
    ----------
    seen
        The ids of the exchanged tensors that some torch function was given.
    hooked
        Whether hooks were at work, so that a backward pass through what was computed calls Python.
    """

    def __init__(
        self,
        *,
        forward: bool,
        higher: bool,
        inside: bool = False,
        exchange: list[tuple[Tensor, Tensor]] | None = None,
        protect: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self._forward = forward
        self._higher = higher
        self._levels = len(differentiating_levels())
        self._plain = ("", "R" if inside else "")
        if not self._levels:
            self._plain = ("FR" if forward else "RR", "R" if inside else "")
        elif higher and not inside and differentiating_levels().count(JVP) <= forward:
            self._plain = ("R", "")  # perhaps: an outer level may be all that there is
        self.shadows = Shadows()
        self.seen: set[int] = set()
        self.hooked = False
        for original, stand_in in exchange or ():
            self.shadows.replaced[id(original)] = (original, stand_in)
        self.shadows.protect(protect)

    @property
    def forward(self) -> bool:
        """Whether some level, around the loss or inside it, differentiates in forward mode."""
        return self._forward or JVP in differentiating_levels()

    @property
    def dual(self) -> bool:
        """Whether derivatives are taken by plain dual numbers and one backward pass, and no more of them."""
        return (
            self._forward
            and not self._higher
            and not self._levels
            and not torch._C._are_functorch_transforms_active()
        )

    @property
    def higher(self) -> bool:
        """Whether derivatives beyond the second may be taken, outside or by a transform inside the loss."""
        return self._higher or len(differentiating_levels()) > self._levels

    @property
    def order(self) -> str:
        """The modes of the derivatives that run through what is computed here, outermost first: R and F."""
        if torch.compiler.is_compiling():  # Dynamo does not show the levels
            return ("R" if self._higher else "") + ("FR" if self._forward else "RR")
        kinds = ("F" if kind == JVP else "R" for kind in differentiating_levels())
        return self._plain[0] + "".join(kinds) + self._plain[1]

    def on(self) -> AbstractContextManager[Any]:
        """Switch the rules on again for what a repair calls."""
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Evaluate one torch function of the loss under the rules."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return self._repaired(func, args, kwargs)
        if func in _LOOKS:
            return func(*args, **kwargs)

        if not self.hooked:
            self.hooked = func == _REGISTER_HOOK or _saved_tensors_hooks(False) is not None
        shadows = self.shadows
        touched: set[int] = set()
        if shadows.replaced:
            args = self._exchanged(args, touched)
            if kwargs:
                kwargs = self._exchanged(kwargs, touched)
        args, kwargs, writes = redirected(func, args, kwargs, shadows.stand_in)
        if args and not writes and isinstance(args[0], Tensor):
            shadows.note_captured(args[0])

        result = self._repaired(_METHODS.get(func, func), args, kwargs)
        if touched and _holds_tensor(result):
            self.seen |= touched
        if shadows.remembers and func != _GET_GRAD:
            shadows.note_born(result)
        return result

    def _repaired(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        repair = REPAIRS.get(func)
        if repair is None:
            return func(*args, **kwargs)
        return repair.apply(self, *args, **kwargs)

    def _exchanged(self, value: Any, touched: set[int]) -> Any:
        """Return `value` with every tensor that has a stand-in exchanged, in lists, tuples and dicts."""
        if isinstance(value, Tensor):
            known = self.shadows.replaced.get(id(value))
            if known is None:
                alias = self.shadows.alias(value) if self.shadows.written else None
                return value if alias is None else alias
            touched.add(id(value))
            return known[1]
        if type(value) is tuple or type(value) is list:
            return type(value)(self._exchanged(item, touched) for item in value)
        if type(value) is dict:
            return {key: self._exchanged(item, touched) for key, item in value.items()}
        return value


def _holds_tensor(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return any(_holds_tensor(item) for item in result)
    if isinstance(result, Mapping):
        return any(_holds_tensor(item) for item in result.values())
    return isinstance(result, Tensor)


def evaluation(
    *,
    forward: bool,
    higher: bool,
    inside: bool = False,
    exchange: list[tuple[Tensor, Tensor]] | None = None,
    protect: Sequence[Tensor] = (),
    make: Callable[..., SecondOrderRules] = SecondOrderRules,
) -> AbstractContextManager[SecondOrderRules]:
    """Return the context in which a loss is evaluated once.

    Parameters
    ----------
    forward
        Some level around the loss differentiates in forward mode.
    higher
        Derivatives beyond the second may be taken.
    inside
        Because the loss itself takes one, by `torch.autograd.grad`.
    exchange
        Pairs of a tensor and its stand-in.
    protect
        Tensors that the loss must not write to: the parameters.
    make
        What makes the mode, `SecondOrderRules` or one that extends it.
    """
    rules = make(forward=forward, higher=higher, inside=inside, exchange=exchange, protect=protect)
    return _traced(rules) if torch.compiler.is_compiling() else _Guarded(rules)


def evaluated(
    evaluate: Callable[[SecondOrderRules], T],
    *,
    forward: bool,
    higher: bool,
    exchange: list[tuple[Tensor, Tensor]] | None = None,
    protect: Sequence[Tensor] = (),
    make: Callable[..., SecondOrderRules] = SecondOrderRules,
) -> T:
    """Return `evaluate(rules)` under the rules; arguments as for `evaluation`.

    A loss that turns out to differentiate by `torch.autograd.grad` is evaluated again, with the same random
    numbers, by functions that have right third derivatives.
    """
    begin = partial(evaluation, forward=forward, exchange=exchange, protect=protect, make=make)
    if torch.compiler.is_compiling():
        with begin(higher=higher) as rules:
            return evaluate(rules)
    state = RandomState.now(protect)
    try:
        with begin(higher=higher) as rules:
            return evaluate(rules)
    except DifferentiatesInside:
        state.restore()
    with begin(higher=True, inside=True) as rules:
        return evaluate(rules)


@contextmanager
def _traced(rules: SecondOrderRules) -> Iterator[SecondOrderRules]:
    """Keep Dynamo off the fused inference path of Transformer layers, which has no derivative.

    In eager mode the layers see that a mode is active and leave that path alone; Dynamo does not show it to them, nor
    does it trace `set_fastpath_enabled`.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha._is_fastpath_enabled = False
    try:
        with rules:
            yield rules
    finally:
        torch.backends.mha._is_fastpath_enabled = fused


class _Guarded:
    """The rules, and what of torch's own state an evaluation may not leave changed.

    A class because a generator's context costs several times as much, at every evaluation.
    """

    __slots__ = ("_attributes", "_forward_enabled", "_rules", "_specialising")

    def __init__(self, rules: SecondOrderRules) -> None:
        self._rules = rules
        self._attributes = module_attributes_restored(rules.shadows.is_captured)

    def __enter__(self) -> SecondOrderRules:
        self._forward_enabled = torch._C._is_fwd_grad_enabled()
        # TorchScript specialises a function for the first inputs that it sees. Should these be functorch's, it would
        # give no gradients ever after; unoptimised, it does not specialise. The switch is local to the thread.
        self._specialising = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)
        self._attributes.__enter__()
        self._rules.__enter__()  # type: ignore[no-untyped-call]
        return self._rules

    def __exit__(self, *error: Any) -> None:
        self._rules.__exit__(*error)  # type: ignore[no-untyped-call]
        self._attributes.__exit__(*error)
        torch.clear_autocast_cache()  # an autocast around the call would keep casts of dead wrappers
        torch._C._set_graph_executor_optimize(self._specialising)
        torch._C._set_fwd_grad_enabled(self._forward_enabled)
