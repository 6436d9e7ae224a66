"""Which exact route a product takes.

- `"reverse_over_forward"` is one backward pass over our own forward propagation, the fastest, where there are rules
  for the functions of the loss.
- `"forward_over_reverse"` is `jvp(grad(f))`, the definition.
- `"reverse_over_reverse"` is `vjp(grad(f))`, the same product because the Hessian is symmetric.
- `"double_backward"` is the same by plain autograd, which differentiates some functions that `torch.func` does not;
  not inside one of its transforms.
- `"auto"`, the default, takes the first where every function of the loss has a rule of ours, without a word. Else it
  takes the second; the third where the second has no right rule in torch for some function of the loss, where the
  product itself is differentiated, and under `torch.compile`, where forward mode would see through a `no_grad` in the
  loss; double backward where that fails too and no transform is active.

A named mode is used or raises. When no route is left, the loss's own error is raised if it has one, else
`NoExactRouteError`.
Only `"auto"` ever changes the route, to another exact one, and says so with a `CurvatureFallbackWarning`
where it was forced to. It looks at the functions of the loss and at who differentiates the product, never at
a clock, so the same call always takes the same route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from torch._C import _functorch

from secorder_func import tree
from secorder_func.errors import (
    ArgumentError,
    CurvatureFallbackWarning,
    HiddenParameterError,
    NoExactRouteError,
    message,
    warn_user,
)
from secorder_func.rules.cut_graphs import UnrecordedBackwardError
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.levels import differentiating_levels, unwrapped
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.registry import WrongForwardRuleError
from secorder_func.taylor import NotPropagatedError
from secorder_func.typing import Mode

__all__ = [
    "check_mode",
    "differentiated_outside",
    "first_exact",
    "in_transform",
    "no_exact_route",
    "refuse_third_derivatives",
    "routes_for",
]

T = TypeVar("T")
Failures = list[tuple[str, RuntimeError]]


def check_mode(mode: str, where: str) -> None:
    """Refuse a mode that is not one of `Mode`."""
    if mode not in get_args(Mode):
        known = ", ".join(repr(name) for name in get_args(Mode))
        raise ValueError(message(where, f"mode must be one of {known}, got {mode!r}"))


def routes_for(mode: Mode, *, outside: bool) -> tuple[Mode, ...]:
    """Return the routes to try in order.

    Parameters
    ----------
    mode
        What the caller asked for; a named mode is the only route.
    outside
        Whether the product is itself differentiated. Third derivatives through forward over reverse are wrong
        for slogdet and solve in torch 2.13, through reverse over reverse they are right.
    """
    if mode == "double_backward" and in_transform():
        raise NoExactRouteError(message("mode='double_backward'", _NOT_INSIDE, _OUTSIDE))
    if mode == "reverse_over_forward" and torch.compiler.is_compiling():
        raise NoExactRouteError(
            message(
                "mode='reverse_over_forward'", "Dynamo does not show its rules the tensors", _AUTO
            )
        )
    if mode != "auto":
        return (mode,)
    if torch.compiler.is_compiling():
        return ("reverse_over_reverse",)
    last: tuple[Mode, ...] = () if in_transform() else ("double_backward",)
    if outside:
        return ("reverse_over_reverse", *last)
    return ("reverse_over_forward", "forward_over_reverse", "reverse_over_reverse", *last)


_NOT_INSIDE = "plain autograd does not work inside vmap, grad, jvp or torch.compile"
_AUTO = "Take mode='auto' under torch.compile"
_OUTSIDE = "Call it outside; several vectors go through hessian_operator(...).mm"


def in_transform() -> bool:
    """Say whether one of torch.func's transforms, or torch.compile, is at work around the caller."""
    if torch.compiler.is_compiling():
        return True
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def differentiated_outside(*trees: Any) -> bool:
    """Say whether someone outside may differentiate what is computed from these tensors."""
    tensors = tree.tensors_in(*trees)
    if torch.compiler.is_compiling():  # Dynamo cannot look at the stack of transforms
        functorch_active: bool = torch._C._are_functorch_transforms_active()
        return functorch_active or (
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        )
    if differentiating_levels():
        return True
    return torch.is_grad_enabled() and any(unwrapped(t).requires_grad for t in tensors)


def refuse_third_derivatives(product: Sequence[Tensor], where: str) -> None:
    """Let a backward pass through this product raise: only tensors that the loss captured can ask for it.

    Nothing was known of them when the loss was evaluated by functions whose third derivatives are wrong in torch.
    """

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(
            message(
                where,
                "a product cannot be differentiated in a tensor that the function captures",
                "Pass that tensor as an argument of the function",
            )
        )

    if torch.compiler.is_compiling():
        return
    for leaf in product:
        if leaf.requires_grad and not _functorch.is_functorch_wrapped_tensor(leaf):
            leaf.register_hook(refuse)


def first_exact(
    routes: Sequence[tuple[str, Callable[[], T]]],
    *,
    where: str,
    tensors: Sequence[Tensor],
    eager: Callable[[], object],
) -> tuple[str, T]:
    """Compute by the first route that works; return its name and the result.

    Parameters
    ----------
    routes
        Names and computations, best first.
    where
        The public function, for messages.
    tensors
        Tensors on the devices whose random state a retry must find as the first attempt found it.
    eager
        The plain evaluation of the loss, whose own error is the one worth raising when all routes fail.
    """
    if torch.compiler.is_compiling():
        name, compute = routes[0]
        return name, compute()
    state = RandomState.now(tensors)
    failures: Failures = []
    for name, compute in routes:
        hidden = any(isinstance(error, HiddenParameterError) for _, error in failures)
        if hidden and name != "double_backward":
            continue
        try:
            with out_of_inference_mode():
                result = compute()
        except (ArgumentError, UnrecordedBackwardError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if name != "reverse_over_forward" or len(routes) == 1:  # else it was worth a try
                failures.append((name, error))
            state.restore()
            continue
        if failures:
            _warn(where, failures, name)
        return name, result

    try:
        # What a rule refused by name is no mistake in the loss.
        if not any(isinstance(error, NoExactRouteError) for _, error in failures):
            eager()  # a mistake in the loss itself is raised here, as the user's own error
    except WrongForwardRuleError:
        pass
    except RuntimeError as error:  # inside a transform torch may refuse the function here as before
        if not in_transform() or str(error) != str(failures[-1][1]):
            raise
    state.restore()
    raise no_exact_route(where, failures) from failures[0][1]


_REPLACE = (
    "Replace the function that is to blame, or estimate the product by finite differences: "
    "finite_difference_hvp for functions, approximate_hvp for closures"
)


_RULE = "Take mode='auto', or give the function a rule with secorder_func.taylor.tangent"


def no_exact_route(where: str, failures: Failures, mend: str = _REPLACE) -> NoExactRouteError:
    """Return the error that names what torch said about each route that was tried."""
    if all(isinstance(error, NotPropagatedError) for _, error in failures):
        cause = _first_line(failures[0][1])
        return NoExactRouteError(
            message(where, f"mode='reverse_over_forward' cannot take this loss: {cause}", _RULE)
        )
    tried = "; ".join(f"{names}: {cause}" for names, cause in _by_cause(failures))
    if in_transform():
        mend += f". Or try double backward: {_NOT_INSIDE}. {_OUTSIDE}"
    problem = f"torch has no exact second derivative of this loss; tried {tried}"
    return NoExactRouteError(message(where, problem, mend))


def _warn(where: str, failures: Failures, name: str) -> None:
    causes = [f"no {names}: {cause}" for names, cause in _by_cause(failures)]
    mend = f"Took {name} instead, which is exact too"
    warn_user(message(where, "; ".join(causes), mend), CurvatureFallbackWarning)


def _by_cause(failures: Failures) -> list[tuple[str, str]]:
    """Return the routes that failed and why, those with one cause together."""
    causes: dict[str, list[str]] = {}
    for name, error in failures:
        causes.setdefault(_first_line(error), []).append(name)
    return [(" or ".join(names), cause) for cause, names in causes.items()]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
