"""What is likely behind an error that a loss raises: its text, beside the data and the parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.typing import LossFn, Tree
from secorder_func.verify._result import Cause

__all__ = ["named", "of_the_loss", "takes"]

Named = list[tuple[str, Tensor]]
"""Tensors of the data, with the expressions that lead to them."""

_WORDS = {
    "float16": r"half|Half",
    "bfloat16": r"bfloat16|BFloat16",
    "float32": r"float|Float",
    "float64": r"double|Double",
    "bool": r"bool|Bool",
    "uint8": r"unsigned char|Byte",
    "int8": r"signed char|Char",
    "int16": r"short|Short",
    "int32": r"int|Int",
    "int64": r"long|long long|long int|Long",
}
_METHODS = {
    torch.float16: "half",
    torch.bfloat16: "bfloat16",
    torch.float32: "float",
    torch.float64: "double",
}


def of_the_loss(
    error: BaseException, f: LossFn, params: Tree, args: tuple[Any, ...]
) -> tuple[Cause, ...]:
    """Return the causes of an error of the loss `f(params, *args)`, none where its text says enough or nothing."""
    text = str(error)
    cause = (
        _of_the_value(text)
        or _of_the_call(f, params, args)
        or _of_outputs(text, error)
        or _of_class_numbers(text)
    )
    if cause is None:
        leaves = tree.tensors_in(params)
        data = list(named(f, args))
        cause = _of_dtypes(text, data, leaves) or _of_devices(text, data, leaves)
    return () if cause is None else (cause,)


def _of_the_value(text: str) -> Cause | None:
    """Return the cause of a refusal by the library itself."""
    if "writes to a parameter in place" in text:
        return Cause(
            "the loss changes its own parameters, so that it has another value the next time",
            "Compute with a copy: w = w * 0.9 in the place of w.mul_(0.9) or w.data *= 0.9. Normalise or clip "
            "parameters after a training step, not in the loss.",
        )
    if "one element, got shape" in text:
        return Cause(
            "the loss is not reduced: it has a value for each sample",
            "Return losses.mean() or losses.sum().",
        )
    if "one element, got float" in text:
        return Cause(
            "the loss was converted to a number, which has no derivatives",
            "Return the tensor, without .item() or float().",
        )
    if re.search(r"real and floating, got torch\.(?:u?int|bool)", text):
        return Cause(
            "the loss is a count or a truth value, which has no derivatives",
            "Return a smooth loss, as the one that is trained.",
        )
    if "one element, got tuple" in text:
        return Cause(
            "the function returns more than the loss",
            "Verify lambda params, *args: f(params, *args)[0]; hvp takes such functions with has_aux=True.",
        )
    return None


def takes(f: LossFn, params: Tree, args: tuple[Any, ...]) -> bool:
    """Say whether a loss can be called so, as far as its signature tells."""
    try:
        inspect.signature(f).bind(params, *args)
    except ValueError:  # it has none
        return True
    except TypeError:
        return False
    return True


def _of_the_call(f: LossFn, params: Tree, args: tuple[Any, ...]) -> Cause | None:
    if len(args) != 1 or takes(f, params, args):
        return None
    (batch,) = args
    what = f"the batch is one argument, a {type(batch).__name__}"
    if isinstance(batch, (tuple, list)):
        return Cause(what, "Spread it: f(params, *batch).")
    if isinstance(batch, Tensor):
        return Cause(
            what, "Pass all that the loss takes. Of a list, each item is a batch: [(x, y)]."
        )
    return Cause(what, "Pass its parts: f(params, x, y).")


def _of_outputs(text: str, error: BaseException) -> Cause | None:
    """Return the cause of a loss function that is given a tuple or a dict by the model, or arrays by the data."""
    if isinstance(error, AttributeError) and not _of_torch(error):
        return None  # of the user's own code
    if "must be Tensor, not numpy.ndarray" in text:
        return Cause("the data are NumPy arrays", "Pass torch.from_numpy(x).")
    found = re.search(
        r"(?:argument 'input'.*must be Tensor, not |^')(tuple|list|dict|OrderedDict|\w+Output\w*)\b",
        text,
    )
    if found is None:
        return None
    kind = found[1]
    part = "outputs[0]" if kind in ("tuple", "list") else 'outputs["logits"]'
    return Cause(
        f"the model returns a {kind}, and the loss function takes a tensor",
        f"Name the part that counts: lambda outputs, targets: loss_fn({part}, targets).",
    )


def _of_torch(error: BaseException) -> bool:
    """Say whether an error comes out of torch's own code, or of what the library puts in its place."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("torch", "secorder_func")


def _of_class_numbers(text: str) -> Cause | None:
    found = re.search(r"Target (-?\d+) is out of bounds", text)
    if found is None:
        return None
    if found[1].startswith("-"):
        return Cause(
            f"a class number is {found[1]}: they count from 0",
            "If it marks what does not count, pass ignore_index to the loss.",
        )
    return Cause(
        f"a class number is {found[1]}: they count from 0, and the model has too few outputs for it",
        "Give the last layer an output for each class, or number the classes from 0.",
    )


def _of_dtypes(text: str, data: Named, params: list[Tensor]) -> Cause | None:
    if not re.search(r"dtype|scalar types?|type \(|type .* cast", text):
        return None
    if re.search(r"dtype to be Long|scalar types: Long", text):  # of classes, of an embedding
        wrong = [(name, t) for name, t in data if _named_in(t, text.replace("Long", ""))]
        if not wrong:
            return None
        name, t = wrong[0 if "indices" in text else -1]
        what = "indices" if "indices" in text else "class numbers"
        return Cause(f"{name} are {_dtype(t)}, {what} must be int64", f"Use {name}.long().")
    if not params:
        return None
    own = params[0].dtype
    apart = [(name, t) for name, t in data if t.is_floating_point() and t.dtype != own]
    whole = [(name, t) for name, t in data if not t.is_floating_point() and _named_in(t, text)]
    if apart:
        name, t = apart[0]
    elif whole:  # a layer names its input first
        name, t = whole[0 if re.search(r"mat1|m1|^Input", text) else -1]
    else:
        return None
    mends = [f"{name}.{_METHODS[own]}()"] if own in _METHODS else []
    mends += [f"model.{_METHODS[t.dtype]}()"] if t.dtype in _METHODS else []
    what = f"{name} are {_dtype(t)}, the parameters {_dtype(params[0])}"
    return Cause(what, f"Use {', or '.join(mends)}.") if mends else None


def _named_in(t: Tensor, text: str) -> bool:
    """Say whether a text of torch's names the dtype of a tensor."""
    words = _WORDS.get(_dtype(t))
    return words is not None and re.search(rf"(?<!\w)(?:{words})(?:Tensor)?\b", text) is not None


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _of_devices(text: str, data: Named, params: list[Tensor]) -> Cause | None:
    if "device" not in text or not params:
        return None
    own = params[0].device
    for name, t in data:
        if t.device == own:
            continue
        mend = f'Move both to one device: model.to("{t.device}"), or {name}.to("{own}").'
        if t.is_meta or own.type == "meta":
            mend = "A tensor on the meta device has no numbers; make it on another one."
        return Cause(f"{name} are on {t.device}, the parameters on {own}", mend)
    return None


def named(f: LossFn, args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the data under the names that the loss has for its arguments."""
    for name, arg in zip(_names(f, len(args)), args, strict=True):
        for path, leaf in zip(tree.paths(arg), tree.flatten(arg)[0], strict=True):
            if isinstance(leaf, Tensor):
                yield f"{name}{path}", leaf


def _names(f: LossFn, count: int) -> list[str]:
    plain = [f"args[{index}]" for index in range(count)]
    try:
        parameters = list(inspect.signature(f).parameters.values())[1:]
    except (TypeError, ValueError):  # of a builtin, say
        return plain
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [*names[:count], *plain[len(names) :]]
