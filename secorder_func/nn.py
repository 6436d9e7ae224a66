"""From an `nn.Module` to pure functions of its parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secorder_func.checks import check_callable
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.state import module_attributes_restored
from secorder_func.typing import ModelFn

__all__ = ["functional_loss", "functional_model"]

Params = dict[str, Tensor]


def functional_loss(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]
) -> tuple[Callable[[Params, Any, Any], Tensor], Params]:
    """Return `f(params, inputs, targets) = loss_fn(model(inputs), targets)` and the parameters.

    Parameters
    ----------
    model
        Any module. A tuple of inputs is spread over its positional arguments, a mapping over its keywords. What
        `torch.compile`, `nn.DataParallel` and `DistributedDataParallel` wrap is taken out of the wrapper.
    loss_fn
        `loss_fn(outputs, targets) -> loss` with one element. Sum or mean is its choice.

    Returns
    -------
    f : Callable
        `(params, inputs, targets) -> loss`.
    params : dict of str to Tensor
        The parameters with `requires_grad`, by the names of `named_parameters()`, tied ones once, detached (they share
        memory with the model's). Frozen parameters and buffers stay in the model, where `f` reads their
        present values. The model's training or evaluation mode, too, is read when `f` runs.

    Raises
    ------
    TypeError
        `model` is no module, or a ScriptModule; it and the loss function are swapped; at a call, `params` is no dict.
    ValueError
        There is no parameter, or none requires a gradient; at a call, `params` has an unknown name. Parameters that it
        leaves out keep the model's present values.

    Notes
    -----
    `f` leaves the model as it was: it works on copies of the buffers, so that running statistics do not move, and what
    modules assign to their own attributes is put back.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import functional_loss, hvp, tree
    >>> model = torch.nn.Linear(3, 2)
    >>> f, params = functional_loss(model, torch.nn.functional.cross_entropy)
    >>> inputs, targets = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    >>> hv = hvp(f)(params, tree.zeros_like(params), inputs, targets)
    >>> {name: tuple(h.shape) for name, h in hv.items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    _check_order(model, loss_fn, "functional_loss")
    check_callable(loss_fn, "functional_loss", name="loss_fn")
    model_fn, params = _functional(model, "functional_loss")

    def f(params: Params, inputs: Any, targets: Any) -> Tensor:
        return loss_fn(model_fn(params, inputs), targets)

    return f, params


def functional_model(model: nn.Module) -> tuple[ModelFn, Params]:
    """Return `model_fn(params, inputs) -> outputs` and the parameters, as `functional_loss` does.

    Parameters, what is returned beside `model_fn`, and errors are those of `functional_loss`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import functional_model
    >>> model_fn, params = functional_model(torch.nn.Linear(3, 2))
    >>> model_fn(params, torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """
    return _functional(model, "functional_model")


def _check_order(model: Any, loss_fn: Any, where: str) -> None:
    """Refuse a loss function in the place of the model, and the model in its place."""
    if not isinstance(loss_fn, nn.Module) or not any(True for _ in loss_fn.parameters()):
        return
    is_module = isinstance(model, nn.Module)
    if callable(model) and not (is_module and any(True for _ in model.parameters())):
        first = getattr(model, "__name__", type(model).__name__)
        problem = f"the model and the loss function are swapped: {type(loss_fn).__name__} has the parameters"
        mend = f"Write ({type(loss_fn).__name__}, {first})"
        raise ArgumentTypeError(message(where, problem, mend))


def _functional(model: nn.Module, where: str) -> tuple[ModelFn, Params]:
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, f"model must be an nn.Module, got {type(model).__name__}"))
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            message(
                where,
                "the parameters of a ScriptModule cannot be exchanged from Python",
                "Pass the nn.Module that it was made from",
            )
        )
    model = _in_wrappers(model)
    with _alone_with(model):  # another thread may have exchanged them just now
        named: dict[str, Any] = dict(model.named_parameters())
    lazy = [name for name, p in named.items() if nn.parameter.is_lazy(p)]
    if lazy:
        problem = f"parameter {lazy[0]!r} has no shape yet"
        raise ArgumentError(message(where, problem, "Evaluate the model once before"))
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not named:
        problem = f"the model, {type(model).__name__}, has no parameters"
        raise ArgumentError(message(where, problem, "Pass the module that is trained"))
    if not params:
        raise ValueError(
            message(
                where,
                "no parameter of the model requires a gradient",
                "Call requires_grad_() on some",
            )
        )

    known = frozenset(params)

    def model_fn(params: Params, inputs: Any) -> Any:
        _check_names(params, known)
        args, kwargs = _arguments(inputs)
        with _alone_with(model), module_attributes_restored():
            values = _in_every_place(model, params, known)
            return functional_call(model, values, args, kwargs, tie_weights=False)

    return model_fn, params


def _in_wrappers(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile and the data-parallel wrappers hold, whose parameters have its names.

    functional_call refuses nn.DataParallel, and a product is no training step for DistributedDataParallel to reduce.
    """
    inner: Any = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner  # type: ignore[no-any-return]


def _in_every_place(model: nn.Module, params: Params, known: frozenset[str]) -> dict[str, Tensor]:
    """Return what stands in every place of the model: the parameters, free ones left out as constants, buffers copied.

    `functional_call` would find the places of tied tensors itself, but lists those of a module that the model holds
    under two names twice, and afterwards "restores" what it has put there: the module would keep the stand-ins for good
    (2.13). One walk, because it is taken at every evaluation.
    """
    modules = [(prefix and f"{prefix}.", module) for prefix, module in model.named_modules()]
    values: dict[int, Tensor] = {}  # of every tensor by identity, which tied places share
    places: dict[str, Tensor] = {}
    for prefix, module in modules:
        for name, p in module._parameters.items():
            if p is None:
                continue
            place = prefix + name
            if id(p) not in values and place in known:  # else it is frozen, and stays
                values[id(p)] = params[place] if place in params else p.detach()
            if id(p) in values:
                places[place] = values[id(p)]
    for prefix, module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in values:
                    values[id(buffer)] = buffer.clone()
                places[prefix + name] = values[id(buffer)]
    return places


def _check_names(params: Any, known: frozenset[str]) -> None:
    where = "the function of functional_loss or functional_model"
    if not isinstance(params, Mapping):
        given = type(params).__name__
        raise ArgumentTypeError(
            message(
                where,
                f"params must be a dict by parameter name, got {given}",
                "Pass params as returned",
            )
        )
    unknown = sorted(name for name in params if name not in known)
    if unknown:
        raise ArgumentError(
            message(
                where,
                f"params has a name that is no free parameter of the model: {unknown[0]!r}. "
                f"Expected names among {sorted(known)}",
            )
        )


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _alone_with(model: nn.Module) -> AbstractContextManager[Any]:
    """Let one thread at a time exchange a module's parameters: functional_call does so on the module itself."""
    if torch.compiler.is_compiling():
        return nullcontext()
    lock: AbstractContextManager[Any] = _LOCKS.setdefault(model, threading.RLock())
    return lock


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}
