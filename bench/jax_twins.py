"""The same models in jax.numpy, with the same weights, and JAX's jitted products with them.

Compilation happens when a product is made; its seconds are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import Candidate, Made, UnavailableError
from bench.problems import GPT, Attention, Block, Problem, Residual
from bench.products import Product

__all__ = ["jax_ggn", "jax_hvp", "jax_linearized", "jax_rows", "jax_several", "jax_trace", "twin"]

Params = dict[str, Any]
_PROBES_AT_ONCE = 8


@cache
def _jax() -> Any:
    try:
        import jax
    except ImportError as error:
        raise UnavailableError("jax is not installed") from error
    return jax


def _array(tensor: Tensor) -> Any:
    return _jax().numpy.asarray(tensor.detach().numpy())


def _arrays(tensors: Any) -> list[Any]:
    return [_array(t) for t in tensors]


def _tensors(result: Any) -> list[Tensor]:
    """Return a product as tensors; JAX sorts nothing here, parameters are lists."""
    return [torch.from_numpy(np.array(leaf)) for leaf in _jax().tree.leaves(result)]


# ------------------------------------------------------------------------------------ the models


def _linear(layer: nn.Linear, p: Params, x: Any) -> Any:
    y = x @ p["weight"].T
    return y + p["bias"] if layer.bias is not None else y


def _convolution(layer: nn.Conv2d, p: Params, x: Any) -> Any:
    padding = [(side, side) for side in layer.padding if isinstance(side, int)]
    y = _jax().lax.conv_general_dilated(x, p["weight"], layer.stride, padding)
    return y + p["bias"][:, None, None] if layer.bias is not None else y


def _batch_norm(layer: nn.BatchNorm2d, p: Params, x: Any) -> Any:
    if layer.running_mean is None or layer.running_var is None or layer.training:
        raise UnavailableError("no twin of BatchNorm in train mode")
    mean, var = _array(layer.running_mean), _array(layer.running_var)
    scale = p["weight"] * (var + layer.eps) ** -0.5
    return (x - mean[:, None, None]) * scale[:, None, None] + p["bias"][:, None, None]


def _layer_norm(layer: nn.LayerNorm, p: Params, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    var = (centred**2).mean(-1, keepdims=True)
    return centred * _jax().lax.rsqrt(var + layer.eps) * p["weight"] + p["bias"]


def _pool(layer: nn.AvgPool2d, _: Params, x: Any) -> Any:
    n, c, h, w = x.shape
    k = int(layer.kernel_size)  # type: ignore[arg-type]
    return x.reshape(n, c, h // k, k, w // k, k).mean((3, 5))


def _sequential(model: nn.Sequential, p: Params, x: Any) -> Any:
    for name, layer in model.named_children():
        x = _apply(layer, p.get(name, {}), x)
    return x


def _residual(m: Residual, p: Params, x: Any) -> Any:
    y = _apply(m.norm_1, p["norm_1"], _apply(m.first, p["first"], x))
    y = _apply(m.second, p["second"], _jax().nn.silu(y))
    y = _apply(m.norm_2, p["norm_2"], y)
    return _jax().nn.silu(y + _apply(m.around, p.get("around", {}), x))


def _attention(m: Attention, p: Params, x: Any) -> Any:
    jax = _jax()
    batch, length, width = x.shape
    size = width // m.heads
    qkv = _linear(m.qkv, p["qkv"], x).reshape(batch, length, 3, m.heads, size)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = (q @ k.swapaxes(-2, -1)) * size**-0.5
    future = jax.numpy.triu(jax.numpy.ones((length, length), bool), 1)
    weights = jax.nn.softmax(jax.numpy.where(future, -jax.numpy.inf, scores), -1)
    mixed = (weights @ v).swapaxes(1, 2).reshape(batch, length, width)
    return _linear(m.out, p["out"], mixed)


def _block(m: Block, p: Params, x: Any) -> Any:
    x = x + _attention(m.attention, p["attention"], _layer_norm(m.norm_1, p["norm_1"], x))
    return x + _sequential(m.mlp, p["mlp"], _layer_norm(m.norm_2, p["norm_2"], x))


def _gpt(m: GPT, p: Params, ids: Any) -> Any:
    x = p["tokens"]["weight"][ids] + p["positions"]
    x = _layer_norm(m.norm, p["norm"], _sequential(m.blocks, p["blocks"], x))
    logits = _linear(m.head, p["head"], x)
    return logits.reshape(-1, logits.shape[-1])


_TWINS: dict[type, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.AvgPool2d: _pool,
    nn.Sequential: _sequential,
    nn.Tanh: lambda m, p, x: _jax().numpy.tanh(x),
    nn.GELU: lambda m, p, x: _jax().nn.gelu(x, approximate=False),
    nn.SiLU: lambda m, p, x: _jax().nn.silu(x),
    nn.Flatten: lambda m, p, x: x.reshape(x.shape[0], -1),
    Residual: _residual,
    Attention: _attention,
    Block: _block,
    GPT: _gpt,
}


def _apply(module: nn.Module, p: Params, x: Any) -> Any:
    if type(module) not in _TWINS:
        raise UnavailableError(f"no twin of {type(module).__name__}")
    return _TWINS[type(module)](module, p, x)


def _nested(names: list[str], values: Any) -> Params:
    tree: Params = {}
    for name, value in zip(names, values, strict=True):
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def twin(p: Problem) -> tuple[Callable[..., Any], Callable[..., Any], list[Any], Any, Any]:
    """Return `forward(params, inputs)`, `loss(outputs, targets)`, the parameters in torch's order, and the data."""
    jax = _jax()

    def forward(params: list[Any], inputs: Any) -> Any:
        return _apply(p.model, _nested(p.names, params), inputs)

    def loss(outputs: Any, targets: Any) -> Any:
        chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], 1)
        return -chosen.mean()

    return forward, loss, _arrays(p.parameters), _array(p.inputs), _array(p.targets)


# ---------------------------------------------------------------------------------- the products


def _compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Any]:
    """Jit it, call it once, and return it blocking, with the seconds of that call."""
    jax = _jax()
    jitted = jax.jit(function)
    begin = perf_counter()
    jax.block_until_ready(jitted(*arguments))
    facts = {"compile_seconds": round(perf_counter() - begin, 2)}
    return lambda *given: jax.block_until_ready(jitted(*given)), facts


def _hvp(p: Problem) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    forward, loss, params, x, y = twin(p)
    jax = _jax()

    def product(v: Any, params: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(lambda q: loss(forward(q, x), y))
        return jax.jvp(gradient, (params,), (v,))[1]

    return product, (params, x, y)


def jax_hvp(p: Problem) -> Product:
    """Return `jit(jvp(grad(f)))`, everything an argument."""
    product, rest = _hvp(p)
    run, facts = _compiled(product, _arrays(p.vector), *rest)
    return Product(lambda v: run(v, *rest), _arrays, facts)


def jax_linearized(p: Problem) -> Product:
    """Return the jitted linear map of `linearize(grad(f))`: JAX's operator that has paid."""
    forward, loss, params, x, y = twin(p)
    jax = _jax()
    _, linear = jax.linearize(jax.grad(lambda q: loss(forward(q, x), y)), params)
    run, facts = _compiled(lambda linear, v: linear(v), linear, _arrays(p.vector))
    return Product(lambda v: run(linear, v), _arrays, facts)


def jax_ggn(p: Problem) -> Product:
    """Return the Gauss-Newton product: forward, the loss's Hessian, back."""
    forward, loss, params, x, y = twin(p)
    jax = _jax()

    def product(v: Any, params: Any, x: Any, y: Any) -> Any:
        outputs, tangent = jax.jvp(lambda q: forward(q, x), (params,), (v,))
        bent = jax.jvp(jax.grad(lambda z: loss(z, y)), (outputs,), (tangent,))[1]
        return jax.vjp(lambda q: forward(q, x), params)[1](bent)[0]

    run, facts = _compiled(product, _arrays(p.vector), params, x, y)
    return Product(lambda v: run(v, params, x, y), _arrays, facts)


def _candidate(name: str, make: Callable[[Problem], Made]) -> Candidate:
    return Candidate(name, make, True, read=_tensors)


def _one_by_one(p: Problem) -> bool:
    """Say whether to loop in Python: convolutions under `vmap` or `lax.map` took ten times as long on a CPU."""
    return any(isinstance(module, nn.Conv2d) for module in p.model.modules())


def jax_several(name: str, count: int) -> Candidate:
    """Return the candidate `jit(vmap(jvp(grad(f))))` over `count` vectors, or a loop of the jitted product."""

    def make(p: Problem) -> Made:
        product, rest = _hvp(p)
        vectors = _arrays(p.vectors(count))
        if _one_by_one(p):
            rows = [[leaf[i] for leaf in vectors] for i in range(count)]
            run, facts = _compiled(product, rows[0], *rest)
            return Made(lambda: [run(row, *rest) for row in rows], lambda: facts)
        run, facts = _compiled(_jax().vmap(product, (0, None, None, None)), vectors, *rest)
        return Made(lambda: run(vectors, *rest), lambda: facts)

    return _candidate(name, make)


def jax_rows(name: str) -> Candidate:
    """Return the candidate of every sample's product."""

    def make(p: Problem) -> Made:
        product, (params, x, y) = _hvp(p)
        samples = x[:, None], y.reshape(x.shape[0], -1)
        vector = _arrays(p.vector)
        rows = _jax().vmap(product, (None, None, 0, 0))
        run, facts = _compiled(rows, vector, params, *samples)
        return Made(lambda: run(vector, params, *samples), lambda: facts)

    return _candidate(name, make)


def jax_trace(name: str, count: int) -> Candidate:
    """Return the candidate of a trace: probes drawn and multiplied inside one jitted function."""

    def make(p: Problem) -> Made:
        product, rest = _hvp(p)
        jax = _jax()

        def form(key: Any, params: Any, *data: Any) -> Any:
            keys = jax.random.split(key, len(params))
            v = [
                jax.random.rademacher(k, q.shape, q.dtype)
                for k, q in zip(keys, params, strict=True)
            ]
            hv = product(v, params, *data)
            return sum(jax.numpy.vdot(a, b) for a, b in zip(v, hv, strict=True))

        def mean(key: Any, *rest: Any) -> Any:
            keys = jax.random.split(key, count)
            forms = jax.lax.map(lambda k: form(k, *rest), keys, batch_size=_PROBES_AT_ONCE)
            return forms.mean()

        seeds = iter(range(1, 10**9))
        if _one_by_one(p):
            one, facts = _compiled(form, jax.random.key(0), *rest)

            def looped() -> Any:
                forms = [one(jax.random.key(next(seeds)), *rest) for _ in range(count)]
                return sum(forms) / count

            return Made(looped, lambda: facts)
        run, facts = _compiled(mean, jax.random.key(0), *rest)
        return Made(lambda: run(jax.random.key(next(seeds)), *rest), lambda: facts)

    return _candidate(name, make)
