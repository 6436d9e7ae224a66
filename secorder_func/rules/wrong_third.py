"""Functions whose third derivatives in torch are wrong or cannot be taken, in some orders of modes, and are refused.

Each is refused in the orders in which it was seen to fail, a pattern of `Rules.order`: `grad(jvp(grad(f)))` is `"RFR"`.
What can be written out of functions that are right has a rule elsewhere instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from secorder_func import tree
from secorder_func.errors import NoExactRouteError
from secorder_func.rules.levels import differentiating_levels, unwrapped
from secorder_func.rules.registry import Rules, WrongForwardRuleError, repairs

__all__ = ["REFUSED", "refuse_reverse_of_forward"]

NESTED = ".F"
"""Forward mode that is differentiated again, by either mode."""
REVERSE_OF_FORWARD = "R.*F"
REVERSE_OF_FORWARD_OF_REVERSE = "R.*F.*R"

REFUSED: dict[str, str] = {}
"""Name of a function -> what is wrong with its third derivatives, the refusals of this module."""


def _refuse(
    functions: tuple[Any, ...],
    name: str,
    orders: str,
    because: str,
    only: Callable[..., bool] | None = None,
) -> None:
    REFUSED[name] = because

    def register(function: Any) -> None:
        @repairs(function, because=because)
        def _checked(rules: Rules, *args: Any, **kwargs: Any) -> Any:
            if _in_order(rules, orders, args, kwargs) and (only is None or only(*args, **kwargs)):
                raise _error(name, because, forward="F" in orders)
            return function(*args, **kwargs)

    for function in dict.fromkeys(functions):
        register(function)


def refuse_reverse_of_forward(rules: Rules, name: str, *tensors: Tensor) -> None:
    """Refuse what runs through a norm in `grad(jvp(grad(f)))`, for the rules that take one."""
    if _in_order(rules, REVERSE_OF_FORWARD_OF_REVERSE, tensors, {}):
        raise _error(name, _IN_PLACE, forward=True)


def _error(name: str, because: str, *, forward: bool) -> RuntimeError:
    if not forward:
        return NoExactRouteError(f"{name} cannot be differentiated three times: {because}")
    return WrongForwardRuleError(
        f"{name} cannot be differentiated three times if forward mode is differentiated again: {because}. "
        "Take all derivatives but the last by reverse mode: grad in place of jvp, mode='reverse_over_reverse'"
    )


def _in_order(rules: Rules, orders: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call is differentiated more than twice in one of these orders of modes."""
    found = rules.higher and re.search(orders, rules.order) is not None
    return found and _differentiates(args, kwargs)


def _differentiates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a derivative may run through a call: constants, and what a no_grad holds, have none."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(
        tensor.requires_grad or _functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tree.tensors_in(args, tuple(kwargs.values()))
    )


def _has_zero(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or bool((unwrapped(tensor) == 0).any())


# ---------------------------------------------------------------------------- silently wrong


def _refuse_eigh(function: Callable[..., Any]) -> None:
    name, complex_name = "linalg.eigh, linalg.eigvalsh", "linalg.eigh of a complex matrix"
    wrong, raising = (
        "third derivatives are NaN",
        "third derivatives raise under torch.func; differentiate by plain autograd",
    )
    REFUSED.update({name: wrong, complex_name: raising})

    @repairs(function, because=f"{wrong}; of a complex matrix {raising}")
    def _checked(rules: Rules, A: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _in_order(rules, REVERSE_OF_FORWARD, (A,), {}):
            raise _error(name, wrong, forward=True)
        transformed = torch.compiler.is_compiling() or bool(differentiating_levels())
        if A.is_complex() and transformed and _in_order(rules, "RRR", (A,), {}):
            raise _error(complex_name, raising, forward=False)
        return function(A, *args, **kwargs)


_refuse_eigh(torch.linalg.eigh)
_refuse_eigh(torch.linalg.eigvalsh)
_refuse(
    (torch.linalg.eig, torch.linalg.eigvals),
    "linalg.eig, linalg.eigvals",
    NESTED,
    "third derivatives are NaN, or 10 to 100 % off",
)
_refuse(
    (torch.Tensor.cumprod_,),
    "cumprod_",
    NESTED,
    "third derivatives are NaN or wrong where a factor is zero; use cumprod",
)
_safe_softmax = torch.ops.aten._safe_softmax
_refuse(
    (_safe_softmax, _safe_softmax.default),
    "aten._safe_softmax",
    REVERSE_OF_FORWARD,
    "third derivatives are NaN",
)


def _zero_to_a_tensor(base: Any, exponent: Any, **kwargs: Any) -> bool:
    return isinstance(base, Tensor) and isinstance(exponent, Tensor) and _has_zero(base)


_refuse(
    (
        torch.pow,
        torch.Tensor.pow,
        torch.Tensor.pow_,
        torch.float_power,
        torch.Tensor.float_power,
    ),
    "pow of zero to a tensor",
    REVERSE_OF_FORWARD,
    "third derivatives are NaN; write the exponent as a number",
    only=_zero_to_a_tensor,
)


def _in_training(*args: Any, **kwargs: Any) -> bool:
    place = 5 if len(args) > 6 else 3  # one overload has no running statistics
    return bool(kwargs.get("training", args[place] if len(args) > place else True))


_refuse(
    (torch._native_batch_norm_legit,),
    "_native_batch_norm_legit",
    "",
    "third derivatives are 7 to 100 % off; use torch.nn.functional.batch_norm",
    only=_in_training,
)
_batch_norm_with_update = torch.ops.aten._batch_norm_with_update
_refuse(
    (_batch_norm_with_update, _batch_norm_with_update.default),
    "aten._batch_norm_with_update",
    "",
    "third derivatives are 10 to 130 % off; use torch.nn.functional.batch_norm",
)

# ------------------------------------------------- raised by torch, without the name of the function

_IN_PLACE = "torch overwrites what its forward rule needs"
_NORMS = (
    torch.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    torch.linalg.matrix_norm,
)
_refuse(_NORMS, "norm", REVERSE_OF_FORWARD_OF_REVERSE, _IN_PLACE)
for _functions, _name in (
    ((torch.std, torch.Tensor.std, torch.std_mean), "std"),
    ((torch.dist, torch.Tensor.dist), "dist"),
    ((torch.renorm, torch.Tensor.renorm), "renorm"),
    ((F.normalize,), "normalize"),
    ((F.cosine_similarity, torch.cosine_similarity), "cosine_similarity"),
    ((F.pairwise_distance, torch.pairwise_distance), "pairwise_distance"),
    ((F.triplet_margin_loss, torch.triplet_margin_loss), "triplet_margin_loss"),
    ((F.triplet_margin_with_distance_loss,), "triplet_margin_with_distance_loss"),
):
    _refuse(_functions, _name, REVERSE_OF_FORWARD_OF_REVERSE, _IN_PLACE)


def _is_complex(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    return input.is_complex()


_refuse(
    (torch.sgn, torch.Tensor.sgn),
    "sgn of complex numbers",
    REVERSE_OF_FORWARD_OF_REVERSE,
    _IN_PLACE,
    only=_is_complex,
)
_refuse((F.glu,), "glu", NESTED, "its forward rule has no derivative; use a * sigmoid(b)")
_refuse((torch.Tensor.to_sparse,), "to_sparse", "", "its second derivative has no derivative")


def _pads_output(*args: Any, **kwargs: Any) -> bool:
    return any(kwargs.get("output_padding", args[7] if len(args) > 7 else ()))


_refuse(
    (torch.convolution,),
    "convolution with output_padding",
    "",
    "third derivatives raise; use torch.nn.functional.conv_transpose2d and its relatives",
    only=_pads_output,
)
