"""`jvp(grad(f))` by plain autograd over plain dual numbers, where no transform is at work around or inside.

It is what `torch.func` does, without its wrappers: the loss is evaluated with dual numbers, and one ordinary backward
pass over them gives the gradient with its tangent, the product. 2.1 instead of 3.3 times a double backward on an MLP of
244 parameters, where overhead is all, 1.2 instead of 1.4 on a GPT.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secorder_func.errors import ArgumentError
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import forward_mode_lock, prepare_forward_mode
from secorder_func.transforms.loss import FlatLoss, Leaves
from secorder_func.transforms.plain_autograd import PlainEvaluation, gradients, recording

__all__ = ["by_dual_numbers"]


_NO_GRAPH_NEEDED = frozenset(
    f"{name}Backward0"
    for name in (
        *(
            "Add",
            "Addmm",
            "Bmm",
            "Convolution",
            "Div",
            "Mean",
            "Mm",
            "Mul",
            "Neg",
            "Pow",
            "Sub",
            "Sum",
        ),
        *(
            "Alias",
            "Cat",
            "Clone",
            "Expand",
            "Permute",
            "Select",
            "Slice",
            "Split",
            "Squeeze",
            "Stack",
            "T",
        ),
        *(
            "ToCopy",
            "Transpose",
            "Unbind",
            "UnsafeView",
            "Unsqueeze",
            "View",
            "MaskedFill",
            "Embedding",
        ),
        *(
            "Cos",
            "Exp",
            "Gelu",
            "Log",
            "Logsumexp",
            "Relu",
            "Rsqrt",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Sqrt",
            "Tanh",
        ),
        *("AvgPool2D", "LogSoftmax", "NativeLayerNorm", "NllLoss", "Softmax"),
    )
) | {
    "AccumulateGrad",
    "_ConstantTimesBackward",
    "_StandardisedBackward",
    "_AffineBackward",
    "_SoftmaxBackward",
    "_LogSoftmaxBackward",
    "MeanBackward1",
    "SplitBackward0",
    "SqueezeBackward1",
    "SumBackward1",
}
"""Nodes whose backward pass computes the same whether it is recorded or not.

That of a solve, say, takes factors which have no tangents where nobody is to differentiate it again.
"""


class _NotOpenError(RuntimeError):
    """The backward pass would call Python, which may keep values without their tangents, or leads to other tensors."""


def by_dual_numbers(loss: FlatLoss, vector: Leaves) -> tuple[Leaves, Leaves, Leaves] | None:
    """Return leaves of the product and of the gradient, and the tensors of the auxiliary output.

    None where this way is not open: to a function without a forward rule, to one that has a backward of its own, to
    hooks, to a `jvp` inside the loss.
    """
    state = RandomState.now(loss.leaves)
    try:
        prepare_forward_mode()
        with forward_mode_lock(), recording():
            return _differentiated(loss, vector)
    except (ArgumentError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        state.restore()
        return None


def _differentiated(loss: FlatLoss, vector: Leaves) -> tuple[Leaves, Leaves, Leaves]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in loss.leaves)
    at: Leaves = ()
    aux: Leaves = ()

    def evaluate() -> Leaves:
        nonlocal at, aux
        at = tuple(map(forward_ad.make_dual, leaves, vector))
        value, aux = loss.plain(at)
        return (value,)

    with forward_ad.dual_level():
        evaluation = PlainEvaluation(evaluate, leaves, create_graph=False, forward=True)
        (value,), history = evaluation.outputs, evaluation.history
        own = {id(leaf) for leaf in leaves}
        if evaluation.hides_tangents or any(id(leaf) not in own for leaf in history.leaves):
            raise _NotOpenError
        found: list[Tensor | None] = [None] * len(at)
        if value.requires_grad:
            found = gradients([value], at, create_graph=not history.kinds <= _NO_GRAPH_NEEDED)
        gradient, hv = zip(*map(_parts, found, leaves), strict=True)
    return tuple(hv), tuple(gradient), tuple(tensor.detach() for tensor in aux)


def _parts(dual: Tensor | None, leaf: Tensor) -> Leaves:
    """Return a dual number's value and tangent, zeros for what is missing."""
    value, tangent = (None, None) if dual is None else forward_ad.unpack_dual(dual)
    return tuple(torch.zeros_like(leaf) if t is None else t.detach() for t in (value, tangent))
