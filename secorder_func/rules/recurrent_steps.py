"""Recurrent layers, step by step out of the functions that their cells are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WRITTEN_OUT"]

WRITTEN_OUT: dict[Any, Callable[..., Any]] = {}
"""torch's function -> the same in other functions of torch."""

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Any], State]
"""(what the input adds to the gates, state, weight and bias of the state) -> next state."""


def _lstm_step(gates: Tensor, state: State, weight: Tensor, bias: Any) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(gates: Tensor, state: State, weight: Tensor, bias: Any) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(h, weight, bias).chunk(3, -1)
    update = torch.sigmoid(z + hz)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (new + update * (h - new),)


def _tanh_step(gates: Tensor, state: State, weight: Tensor, bias: Any) -> State:
    return (torch.tanh(gates + F.linear(state[0], weight, bias)),)


def _relu_step(gates: Tensor, state: State, weight: Tensor, bias: Any) -> State:
    return (F.relu(gates + F.linear(state[0], weight, bias)),)


def _layers(name: str, step: Step) -> None:
    """Register a stack of layers, for padded sequences and for packed ones."""

    def body(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            raise TypeError("arguments by name")
        if isinstance(args[3], (list, tuple)):
            data, sizes, hx, params, *options = args
            batch_first = False
        else:
            data, hx, params, *options, batch_first = args
            sizes = None
        has_biases, num_layers, dropout, train, bidirectional = options
        packed = isinstance(args[3], (list, tuple))
        if not packed and batch_first:
            data = data.transpose(0, 1)
        states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        rows = data.shape[0] if not packed else None
        counts = sizes.tolist() if packed else [data.shape[1]] * (rows or 0)
        x = data if packed else data.flatten(0, 1)
        weights = _weights(params, has_biases, states)
        finals = []
        for layer in range(num_layers):
            outputs = []
            for way in range(1 + bool(bidirectional)):
                index = layer * (1 + bool(bidirectional)) + way
                start = tuple(state[index] for state in states)
                out, final = _run(step, x, counts, start, next(weights), reverse=way == 1)
                outputs.append(out)
                finals.append(final)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout, True)
        if not packed:
            x = x.unflatten(0, (rows, -1))
            x = x.transpose(0, 1) if batch_first else x
        return (x, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    WRITTEN_OUT[getattr(torch, name)] = body


def _weights(params: Sequence[Tensor], has_biases: bool, states: list[Tensor]) -> Iterator[Any]:
    """Yield (weight of the input, weight of the state, their biases, projection) layer by layer."""
    projected = len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]
    size = 2 + 2 * bool(has_biases) + projected
    for at in range(0, len(params), size):
        group = list(params[at : at + size])
        projection = group.pop() if projected else None
        biases = group[2:] if has_biases else [None, None]
        yield (*group[:2], *biases, projection)


def _run(
    step: Step, x: Tensor, counts: list[int], start: State, weights: Any, *, reverse: bool
) -> tuple[Tensor, State]:
    """Return the outputs of all steps, one below the other, and the last state of every sequence."""
    w_x, w_h, b_x, b_h, projection = weights
    gates = F.linear(x, w_x, b_x).split(counts)
    outputs: list[Any] = [None] * len(counts)
    ended: list[State] = []
    order = range(len(counts) - 1, -1, -1) if reverse else range(len(counts))
    state = tuple(part[: counts[-1]] for part in start) if reverse else start
    for at in order:
        count, now = counts[at], state[0].shape[0]
        if count < now:
            ended.append(tuple(part[count:] for part in state))
            state = tuple(part[:count] for part in state)
        elif count > now:
            more = tuple(part[now:count] for part in start)
            state = tuple(torch.cat(pair) for pair in zip(state, more, strict=True))
        state = step(gates[at], state, w_h, b_h)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs[at] = state[0]
    whole = [torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)]
    return torch.cat(outputs), tuple(whole)


def _cell(name: str, step: Step) -> None:
    def body(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        found = step(F.linear(input, w_ih, b_ih), state, w_hh, b_hh)
        return found if len(found) > 1 else found[0]

    WRITTEN_OUT[getattr(torch, name)] = body


for _name, _step in {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}.items():
    _layers(_name, _step)
    _cell(f"{_name}_cell", _step)
