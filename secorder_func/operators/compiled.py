"""Products compiled by torch.compile, once for a function and shapes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.errors import NoExactRouteError, message
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.versions import Versions
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.policy import in_transform
from secorder_func.typing import Tree

__all__ = ["compiled_operator"]

Product = Callable[..., Tree]


@dataclass
class _Compiled:
    """A compiled product, and for which shapes it was compared with the eager one.

    `key` keeps alive what the product is known by.
    """

    run: Product
    key: tuple[Any, ...]
    checked: set[Any] = field(default_factory=set)


_COMPILED: OrderedDict[Any, _Compiled] = OrderedDict()
_KEPT = 16
"""Functions whose compiled products are remembered, the ones used last."""


def compiled_operator(
    product: Product,
    key: tuple[Any, ...],
    mode: str,
    params: Tree,
    rest: Any,
    where: str,
) -> LinearOperator:
    """Return an operator whose product is `product(params, v, rest)`, compiled.

    Parameters
    ----------
    product
        A pure function of its three arguments.
    key
        Products with equal keys are the same function; it holds the user's functions.
    mode
        Of the product.
    where
        The public function, for messages.

    Notes
    -----
    Where the shapes are new, the first product is compared with an eager one.
    """
    if in_transform():
        problem = "compile=True has no effect inside a transform or torch.compile"
        raise ValueError(message(where, problem, "Make the operator outside"))
    leaves, unflatten = tree.flatten(params)
    at = unflatten([leaf.detach() for leaf in leaves])
    compiled = _compiled(product, (where, mode, *key))
    versions = Versions(leaves)

    def multiply(v: Tree) -> Tree:
        versions.require_unchanged()
        watched = torch._C._len_torch_dispatch_stack() > 0  # under which Dynamo compiles nothing
        with torch.inference_mode(False), torch.no_grad():
            return (product if watched else compiled.run)(at, tree.map(Tensor.detach, v), rest)

    key = tuple(_kind(leaf) for leaf in tree.flatten_fully((at, rest))[0])
    probe = unflatten([_probe(leaf) for leaf in leaves])
    begin = time.perf_counter()
    if key in compiled.checked:
        multiply(probe)
    else:
        _check(multiply, lambda: product(at, probe, rest), probe, leaves, where)
        compiled.checked.add(key)
    return LinearOperator(
        matvec=multiply,
        like=at,
        mode="reverse_over_reverse" if mode == "auto" else mode,
        compile_seconds=time.perf_counter() - begin,
    )


def _compiled(product: Any, key: tuple[Any, ...]) -> _Compiled:
    names = tuple(part if isinstance(part, (str, bool)) else id(part) for part in key)
    if names in _COMPILED:
        _COMPILED.move_to_end(names)
        return _COMPILED[names]
    # Dynamo counts compilations by code object, and stops at eight: every product has one of its own.
    own = FunctionType(product.__code__.replace(), product.__globals__, closure=product.__closure__)
    run: Any = torch.compile(own, fullgraph=True, dynamic=False)
    _COMPILED[names] = _Compiled(run, key)
    if len(_COMPILED) > _KEPT:
        _COMPILED.popitem(last=False)
    return _COMPILED[names]


def _check(
    compiled: Callable[[Tree], Tree],
    eager: Callable[[], Tree],
    probe: Tree,
    leaves: list[Tensor],
    where: str,
) -> None:
    """Compile, and compare with an eager product."""
    state = RandomState.now(leaves)
    expected = tree.flatten(eager())[0]
    if state.has_changed():
        state.restore()
        problem = "the function draws random numbers, which a compiled product would draw anew for every vector"
        raise NoExactRouteError(message(where, problem, "Pass compile=False"))
    try:
        found = tree.flatten(compiled(probe))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines()
        problem = (
            f"torch.compile cannot make this product: {cause[0] if cause else type(error).__name__}"
        )
        raise NoExactRouteError(message(where, problem, "Pass compile=False")) from error
    pairs = list(zip(found, expected, strict=True))
    apart = sum(float((a - b).abs().square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.abs().square().sum()) for b in expected) ** 0.5
    eps = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
    if not apart <= eps**0.5 * size:
        problem = f"the compiled product differs from the eager one by {apart / size if size else apart:.1g}"
        raise NoExactRouteError(message(where, problem, "Pass compile=False"))


def _probe(leaf: Tensor) -> Tensor:
    """Return a vector without symmetry, the same at every run."""
    places = torch.arange(1, leaf.numel() + 1, device=leaf.device, dtype=torch.float64)
    return torch.sin(places**1.5).reshape(leaf.shape).to(leaf.dtype)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf)
