"""Every module and differentiable operator that torch lists for its own tests, as a loss to differentiate twice.

torch's databases come with its own test requirements; `expecttest` is the one that importing them needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from secorder_func import functional_model

Tree = Any


@dataclass(frozen=True)
class Problem:
    """A loss as a pure function of a tree, and the same loss as a closure over the tensors of that tree.

    `subject` is what is tested: the name of a module or of an operator.
    """

    subject: str
    name: str
    params: Tree
    f: Callable[[Tree], Tensor]
    closure: Callable[[], Tensor]


def loss_of(output: Any) -> Tensor:
    """Return a smooth number that depends on every differentiable entry, unevenly and not only linearly."""
    total: Any = torch.zeros((), dtype=torch.float64)
    for tensor in optree.tree_leaves(output):
        if not isinstance(tensor, Tensor) or not (
            tensor.is_floating_point() or tensor.is_complex()
        ):
            continue
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        real = real.reshape(-1).to(torch.float64)
        weights = torch.cos(torch.arange(1.0, real.numel() + 1, dtype=torch.float64))
        total = total + (real * weights).sum() + 0.5 * (real * real).mean().nan_to_num()
    return total


_OF_PROBABILITIES = ("nn.functional.ctc_loss", "nn.CTCLoss")
"""Losses of log_softmax: torch's gradient leaves out what a log_softmax before would cancel."""


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


# --------------------------------------------------------------------------------------- modules


def module_problems() -> Iterator[Problem]:
    """Yield every case of torch's module database, in the modes that it distinguishes, in float64."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        modes = (True, False) if info.train_and_eval_differ else (True,)
        for training in modes:
            torch.manual_seed(0)
            cases = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
            for index, case in enumerate(cases):
                if case.forward_input is None:
                    continue
                built = case.constructor_input
                name = f"{info.name}-{index}-{'train' if training else 'eval'}"
                yield module_problem(
                    info.name,
                    name,
                    lambda info=info, built=built: info.module_cls(*built.args, **built.kwargs),
                    case.forward_input.args,
                    case.forward_input.kwargs,
                    training=training,
                )


def module_problem(
    subject: str,
    name: str,
    make: Callable[[], nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> Problem:
    """Return a module's loss in its parameters and in its floating inputs."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make().to(torch.float64).train(training)
        lazy = any(nn.parameter.is_lazy(p) for p in module.parameters())
        if lazy:
            module(*args, **kwargs)
    return _problem_of(subject, name, module, args, kwargs)


def _problem_of(
    subject: str, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Problem:
    leaves, spec = optree.tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if _is_input(leaf)]
    inputs = {str(index): leaves[index].detach().requires_grad_() for index in places}
    free = dict(module.named_parameters())

    def arguments(tensors: dict[str, Tensor]) -> Any:
        if subject in _OF_PROBABILITIES:
            tensors = {key: torch.log_softmax(tensor, -1) for key, tensor in tensors.items()}
        return spec.unflatten(
            [tensors[str(i)] if i in places else leaf for i, leaf in enumerate(leaves)]
        )

    if free:
        model_fn, _ = functional_model(_Spread(module))

    def f(params: Tree) -> Tensor:
        given = arguments(params["inputs"])
        if not free:
            return loss_of(module(*given[0], **given[1]))
        named = {"module." + key: p for key, p in params["module"].items()}
        return loss_of(model_fn(named, (given,)))

    def closure() -> Tensor:
        given = arguments(inputs)
        return loss_of(module(*given[0], **given[1]))

    return Problem(subject, name, {"module": free, "inputs": inputs}, f, closure)


def _is_input(leaf: Any) -> bool:
    return _differentiable(leaf) and leaf.requires_grad


class _Spread(nn.Module):
    """A module that takes its positional and keyword arguments as one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: Any) -> Any:
        args, kwargs = given
        return self.module(*args, **kwargs)


def function_problem(
    subject: str, name: str, function: Callable[..., Any], tensors: tuple[Tensor, ...]
) -> Problem:
    """Return a function's loss in its tensors."""
    params = {str(index): tensor for index, tensor in enumerate(tensors)}

    def f(at: Tree) -> Tensor:
        return loss_of(function(*(at[str(index)] for index in range(len(tensors)))))

    return Problem(subject, name, params, f, lambda: f(params))


# ------------------------------------------------------------------------------------- operators


def operator_problems(samples: int, seed: int = 0) -> Iterator[Problem]:
    """Yield the first `samples` differentiable cases of every operator of torch's database, in float64."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        found = 0
        torch.manual_seed(seed)
        subject = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        for index, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
            if found == samples:
                break
            problem = operator_problem(op, sample, subject, f"{subject}-{index}")
            if problem is not None:
                found += 1
                yield problem


def operator_problem(op: Any, sample: Any, subject: str, name: str) -> Problem | None:
    """Return an operator's loss in the tensors of one sample that require gradients, None without any entry."""
    leaves, spec = optree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [
        index
        for index, leaf in enumerate(leaves)
        if _differentiable(leaf) and leaf.requires_grad and leaf.numel()
    ]
    if not places:
        return None
    params = {str(index): leaves[index].detach().requires_grad_() for index in places}

    def f(tensors: Tree) -> Tensor:
        placed = [tensors[str(i)] if i in places else leaf for i, leaf in enumerate(leaves)]
        first, args, kwargs = spec.unflatten(placed)
        call = op.gradcheck_wrapper
        if subject in _OF_PROBABILITIES:
            first = torch.log_softmax(first, -1)
        return loss_of(sample.output_process_fn_grad(call(op.get_op(), first, *args, **kwargs)))

    return Problem(subject, name, params, f, lambda: f(params))
