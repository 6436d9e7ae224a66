"""What a user's function returned: a model with its loss, or a loss with its parameters, and the data.

The usual mistakes are named; whatever else is wrong shows when the loss is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from secorder_func.nn import functional_loss
from secorder_func.operators import Batches
from secorder_func.typing import LossFn, Tree
from secorder_func.verify.target import BATCHES, TargetError, quoted

__all__ = ["Returned", "first_batch", "read"]

_OF_LOSS, _OF_MODULE = "(f, params, batches)", "(model, loss_fn, batches)"
_EXPECTED = f"{_OF_LOSS} or {_OF_MODULE}"


class Returned(NamedTuple):
    """A problem.

    Attributes
    ----------
    f, params
        `f(params, *batch) -> loss`.
    batch, batches
        The only batch, or all of them where they are several; the other one is None.
    model, loss_fn
        What `f` is made of, None where it was given itself.
    """

    f: LossFn
    params: Tree
    batch: tuple[Any, ...] | None
    batches: Batches | None
    model: nn.Module | None = None
    loss_fn: Any = None


def read(returned: Any) -> Returned:
    """Read what a user's function returned: `(f, params, batches)` or `(model, loss_fn, batches)`.

    One batch may also be spread: `(f, params, *batch)`, `(model, loss_fn, inputs, targets)`.

    Raises
    ------
    TargetError
        It is something else.
    """
    if not isinstance(returned, (tuple, list)):
        what = "nothing" if returned is None else type(returned).__name__
        raise TargetError(f"expected {_EXPECTED}, got {what}")
    given = f"({', '.join(type(item).__name__ for item in returned)})"
    if len(returned) < 2 or not callable(returned[0]):
        raise TargetError(f"expected {_EXPECTED}, got {given}")
    first, second, *rest = returned
    try:
        if isinstance(first, nn.Module):
            _require_loss_and_data(first, second, rest, given)
            f, params = functional_loss(first, second)
            return Returned(f, params, *_data_of(rest), first, second)
        _require_params(first, second)
        return Returned(first, second, *_data_of(rest))
    except (TypeError, ValueError) as error:
        raise TargetError(_without_place(str(error))) from error


def _without_place(text: str) -> str:
    """Take the function of the library away that raises: of a command nobody called it."""
    return text.removeprefix("functional_loss: ").removeprefix("Batches: ")


def _require_loss_and_data(model: nn.Module, loss_fn: Any, data: list[Any], given: str) -> None:
    expected = f"expected {_OF_MODULE}, got {given}"
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        name = loss_fn.__name__
        raise TargetError(f"the loss function is the class {name}. Make one of it: {name}()")
    if not callable(loss_fn) and isinstance(loss_fn, (Iterable, Dataset)) and not _is_text(loss_fn):
        raise TargetError(f"the loss function is missing: {expected}")
    if not callable(loss_fn):
        name = type(loss_fn).__name__
        raise TargetError(f"the second item must be a loss function, got {name}: {expected}")
    if not data:
        raise TargetError(f"the data are missing: {expected}")


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes))


def _require_params(f: Any, params: Any) -> None:
    if isinstance(f, type) and issubclass(f, nn.Module):
        raise TargetError(f"the model is the class {f.__name__}. Make one of it: {f.__name__}(...)")
    if isinstance(params, nn.Module):
        name = type(params).__name__
        raise TargetError(
            f"the second item is the module {name}. A model comes first, its loss function second: {_OF_MODULE}. "
            "With a loss f(params, *batch) give the parameters themselves: (f, dict(model.named_parameters()), batches)"
        )
    if isinstance(params, DataLoader):
        raise TargetError(
            f"the parameters are missing: expected {_OF_LOSS}, got a DataLoader second"
        )
    if isinstance(params, Iterator):
        raise TargetError(
            f"the parameters are a {type(params).__name__}, which can be read once. "
            "Give dict(model.named_parameters())"
        )


def _data_of(rest: list[Any]) -> tuple[tuple[Any, ...] | None, Batches | None]:
    """Return the one batch, or the batches: what a user's function returns behind a loss and its parameters.

    Several items are the arguments of one batch, as are no items, a tuple, a tensor, a dict, a number. A list, a
    loader and `Batches` are batches.
    """
    if len(rest) != 1:
        return tuple(rest), None
    (data,) = rest
    if isinstance(data, Batches):
        return None, data
    if isinstance(data, tuple):
        return data, None
    if _is_text(data):
        raise TypeError(f"the batches must be {BATCHES}, got {type(data).__name__}")
    if isinstance(data, (Tensor, dict)) or not isinstance(data, Iterable):
        return (data,), None
    return None, Batches(data)


# ------------------------------------------------------------------------------- the first batch


def first_batch(given: Returned, read: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return what `read` does, the first batch.

    Raises
    ------
    TargetError
        It cannot be had, or is not what the loss of a module takes.
    """
    try:
        batch = read()
    except StopIteration:
        raise TargetError("there are no batches") from None
    except Exception as error:  # whatever the user's data do
        raise TargetError(f"reading the data raises {quoted(error)}") from error
    if given.model is not None and len(batch) != 2:
        several = given.batches is not None
        raise TargetError(
            _no_pair(batch[0], several) if len(batch) == 1 else _parts(batch, several)
        )
    return batch


def _parts(batch: tuple[Any, ...], several: bool) -> str:
    what = (
        f"the batches have {len(batch)} parts" if several else f"the batch has {len(batch)} parts"
    )
    return (
        f"{what}. With a module they must be inputs and targets; inputs may be a tuple: ((a, b), targets). "
        f"For other losses give {_OF_LOSS} with f(params, *batch)"
    )


def _no_pair(data: Any, several: bool) -> str:
    """Say what to do with a batch of one part in which inputs and targets are to be found."""
    if isinstance(data, Mapping) and len(data) > 1:
        return _of_keys([str(key) for key in data], several)
    if isinstance(data, Dataset):
        return f"the data are a {type(data).__name__}. Make batches of it: DataLoader(dataset, batch_size=...)"
    what = "one tensor" if isinstance(data, Tensor) else f"one {type(data).__name__}"
    if not several:
        return (
            f"with a module the data must be inputs and targets, got {what}: "
            "expected (model, loss_fn, inputs, targets)"
        )
    return (
        f"with a module a batch must be inputs and targets. The first batch is {what}; pass {BATCHES}. "
        f"For other losses give {_OF_LOSS} with f(params, batch)"
    )


def _of_keys(keys: list[str], several: bool) -> str:
    targets = next((k for k in keys if "label" in k.lower() or "target" in k.lower()), keys[-1])
    inputs = next(key for key in keys if key != targets)
    pair, shown = f'b["{inputs}"], b["{targets}"]', ", ".join(map(repr, keys))
    if several:
        return (
            f"the batches are dicts with the keys {shown}. Give [({pair}) for b in loader], or "
            "(f, params, loader) with f(params, batch)"
        )
    return f"the batch is a dict with the keys {shown}. Give ({pair}), or (f, params, b) with f(params, b)"
