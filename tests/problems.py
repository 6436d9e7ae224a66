"""Every problem of the tests, once: a function of parameters at a seeded point, in float64 unless it says otherwise."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Tree = Any
Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Problem:
    """A loss `f(params, *args)` and what is known of it.

    Problems with a model have `args == (inputs, targets)`, `f` is `loss_fn(model_fn(params, inputs), targets)`,
    and `model` is the module, if the model is one.
    """

    name: str
    f: Callable[..., Tensor]
    params: Tree
    args: tuple[Any, ...] = ()
    model_fn: Callable[..., Any] | None = None
    loss_fn: Callable[..., Tensor] | None = None
    model: nn.Module | None = None
    hessian: Tensor | None = None
    """The Hessian from a formula."""
    linear: bool = False
    """The model is linear in its parameters."""
    convex: bool = True
    """The loss is convex in the outputs."""
    smooth: bool = True
    """No kinks."""
    random: bool = False
    """The loss draws random numbers."""
    rtol: float = 1e-10


BUILDERS: dict[str, Callable[[], Problem]] = {}


def _problem(builder: Callable[[], Problem]) -> Callable[[], Problem]:
    BUILDERS[builder.__name__] = builder
    return builder


@cache
def load(name: str) -> Problem:
    """Return a problem, built once a process from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        return BUILDERS[name]()


def names(**flags: bool) -> list[str]:
    """Return the problems whose flags have these values."""
    return [n for n in BUILDERS if all(getattr(load(n), k) == v for k, v in flags.items())]


def model_names() -> list[str]:
    """Return the problems that have a model apart from the loss."""
    return [name for name in BUILDERS if load(name).model_fn is not None]


def _from_model_fn(
    name: str,
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    params: Tree,
    inputs: Any,
    targets: Any,
    **rest: Any,
) -> Problem:
    def f(params: Tree, inputs: Any, targets: Any) -> Tensor:
        return loss_fn(model_fn(params, inputs), targets)

    return Problem(name, f, params, (inputs, targets), model_fn, loss_fn, **rest)


def _from_module(
    name: str,
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    **rest: Any,
) -> Problem:
    """Call the module as it stands, buffers and all, so that keeping them is the library's business."""
    params = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def model_fn(params: Tree, inputs: Any) -> Any:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        return functional_call(model, params, args)

    return _from_model_fn(name, model_fn, loss_fn, params, inputs, targets, model=model, **rest)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _jittered(model: nn.Module) -> nn.Module:
    """Move parameters and running statistics from their trivial initial values."""
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.5 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return model


# ---------------------------------------------------------------------- with a Hessian by formula


@_problem
def quadratic() -> Problem:
    A = _randn(7, 7)
    A = A + A.T
    b = _randn(7)
    return Problem("quadratic", lambda p: 0.5 * p @ A @ p + b @ p, _randn(7), hessian=A)


@_problem
def rosenbrock() -> Problem:
    n = 6
    x = 0.5 + 0.3 * _randn(n)

    def f(p: Tensor) -> Tensor:
        return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()

    H = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n - 1):
        H[i, i] += 1200 * x[i] ** 2 - 400 * x[i + 1] + 2
        H[i + 1, i + 1] += 200
        H[i, i + 1] -= 400 * x[i]
        H[i + 1, i] -= 400 * x[i]
    return Problem("rosenbrock", f, x, hessian=H)


@_problem
def least_squares() -> Problem:
    X, y = _randn(9, 5), _randn(9)
    return _from_model_fn(
        "least_squares",
        lambda w, x: x @ w,
        F.mse_loss,
        _randn(5),
        X,
        y,
        hessian=2 * X.T @ X / 9,
        linear=True,
    )


@_problem
def softmax_regression() -> Problem:
    X, W = _randn(8, 4), _randn(3, 4)
    labels = torch.randint(3, (8,))
    p = (X @ W.T).softmax(1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("nij,nk,nl->ikjl", S, X, X).reshape(12, 12) / 8
    return _from_model_fn(
        "softmax_regression",
        lambda w, x: x @ w["W"].T,
        F.cross_entropy,
        {"W": W},
        X,
        labels,
        hessian=H,
        linear=True,
    )


# ------------------------------------------------------------------------------------- networks


def _mlp(activation: nn.Module) -> nn.Module:
    return _jittered(nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).double())


@_problem
def mlp_tanh() -> Problem:
    return _from_module("mlp_tanh", _mlp(nn.Tanh()), F.mse_loss, _randn(8, 4), _randn(8, 3))


@_problem
def mlp_gelu() -> Problem:
    y = torch.randint(3, (8,))
    return _from_module("mlp_gelu", _mlp(nn.GELU()), F.cross_entropy, _randn(8, 4), y)


@_problem
def mlp_relu() -> Problem:
    y = torch.randint(3, (8,))
    return _from_module("mlp_relu", _mlp(nn.ReLU()), F.cross_entropy, _randn(8, 4), y, smooth=False)


@_problem
def mlp_mse_sum() -> Problem:
    loss = nn.MSELoss(reduction="sum")
    return _from_module("mlp_mse_sum", _mlp(nn.Tanh()), loss, _randn(8, 4), _randn(8, 3))


@_problem
def mlp_nonconvex() -> Problem:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cos(outputs - targets).sum() + (outputs.prod(1) ** 2).sum()

    return _from_module(
        "mlp_nonconvex", _mlp(nn.Tanh()), loss, _randn(8, 4), _randn(8, 3), convex=False
    )


class TwoHeads(nn.Module):
    """A trunk with outputs in a dict, keys out of order, and a counter that is no function of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.tanh(self.trunk(x))
        return {"two": (self.two(h), None), "one": self.one(h)}


@_problem
def tree_outputs() -> Problem:
    def loss(outputs: Any, targets: Any) -> Tensor:
        both = outputs["one"].sum(1, keepdim=True) - outputs["two"][0]
        return F.cross_entropy(outputs["one"], targets["label"]) + (both**2 * targets["w"]).mean()

    model = _jittered(TwoHeads().double())
    targets = {"label": torch.randint(2, (6,)), "w": torch.rand(6, 1, dtype=torch.float64)}
    return _from_module("tree_outputs", model, loss, _randn(6, 4), targets)


def _cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )
    return _jittered(model.double())


@_problem
def cnn_batchnorm_train() -> Problem:
    y = torch.randint(3, (5,))
    return _from_module("cnn_batchnorm_train", _cnn(), F.cross_entropy, _randn(5, 1, 5, 5), y)


@_problem
def cnn_batchnorm_eval() -> Problem:
    y = torch.randint(3, (5,))
    return _from_module("cnn_batchnorm_eval", _cnn().eval(), F.cross_entropy, _randn(5, 1, 5, 5), y)


class LastState(nn.Module):
    """An LSTM whose last output is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


@_problem
def lstm() -> Problem:
    return _from_module(
        "lstm", _jittered(LastState().double()), F.mse_loss, _randn(3, 4, 3), _randn(3, 3)
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
    return _jittered(layer.double())


@_problem
def encoder_train() -> Problem:
    return _from_module(
        "encoder_train", _encoder(), F.mse_loss, _randn(2, 3, 4), _randn(2, 3, 4), smooth=False
    )


@_problem
def encoder_eval() -> Problem:
    return _from_module(
        "encoder_eval",
        _encoder().eval(),
        F.mse_loss,
        _randn(2, 3, 4),
        _randn(2, 3, 4),
        smooth=False,
    )


class Attention(nn.Module):
    """Self-attention by nn.MultiheadAttention without its weights, which is where it uses fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@_problem
def multihead_attention() -> Problem:
    return _from_module(
        "multihead_attention",
        _jittered(Attention().double()),
        F.mse_loss,
        _randn(2, 3, 4),
        _randn(2, 3, 4),
    )


class Tied(nn.Module):
    """A language model whose output weight is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embedding(tokens))))


@_problem
def tied_embeddings() -> Problem:
    tokens, y = torch.randint(5, (6,)), torch.randint(5, (6,))
    return _from_module("tied_embeddings", _jittered(Tied().double()), F.cross_entropy, tokens, y)


@_problem
def layer_norm() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()
    return _from_module("layer_norm", _jittered(model), F.mse_loss, _randn(6, 4), _randn(6, 2))


@_problem
def instance_norm() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()
    return _from_module(
        "instance_norm", _jittered(model), F.mse_loss, _randn(4, 2, 5), _randn(4, 2)
    )


@_problem
def group_norm() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
    ).double()
    return _from_module("group_norm", _jittered(model), F.mse_loss, _randn(4, 2, 5), _randn(4, 2))


@_problem
def dropout() -> Problem:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    return _from_module(
        "dropout", _jittered(model), F.mse_loss, _randn(8, 4), _randn(8, 3), random=True
    )


class Partial(nn.Module):
    """A model with a frozen first layer and a parameter that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@_problem
def frozen_and_unused() -> Problem:
    return _from_module(
        "frozen_and_unused", _jittered(Partial().double()), F.mse_loss, _randn(6, 4), _randn(6, 2)
    )


# ------------------------------------------------------------------------- functions of any tree


@_problem
def nested_tree() -> Problem:
    params = {
        "z": (_randn(2, 2), None, [_randn(3)]),
        "a": Pair(left=_randn(), right=_randn(0, 2)),
        "m": {"y": _randn(1), "x": _randn(2)},
    }

    def f(p: Tree, scale: Tensor, *, shift: float = 0.5) -> Tensor:
        W, _, (u,) = p["z"]
        inner = torch.tanh(W @ p["m"]["x"] + p["m"]["y"] + shift)
        return (
            scale * (inner**2).sum() * p["a"].left + torch.exp(0.3 * u).prod() + p["a"].right.sum()
        )

    return Problem("nested_tree", f, params, (torch.tensor(1.7, dtype=torch.float64),))


@_problem
def complex_parameters() -> Problem:
    def f(p: Tree) -> Tensor:
        z = p["z"] * torch.exp(1j * p["phase"])
        return (z.abs() ** 4).sum() + (z**3).real.sum() + (z[0] * z[1].conj()).imag ** 2

    params = {"z": torch.randn(3, dtype=torch.complex128), "phase": _randn(3)}
    return Problem("complex_parameters", f, params)


@_problem
def mixed_precision() -> Problem:
    params = {"single": torch.randn(3), "double": _randn(2, 3)}

    def f(p: Tree) -> Tensor:
        return torch.tanh(p["double"] @ p["single"].double()).square().sum()

    return Problem("mixed_precision", f, params, rtol=1e-5)


@_problem
def bfloat16() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).bfloat16()
    x, y = torch.randn(8, 4).bfloat16(), torch.randn(8, 1).bfloat16()
    return _from_module("bfloat16", model, F.mse_loss, x, y, rtol=5e-2)


@_problem
def linear_algebra() -> Problem:
    B, b = _randn(4, 4), _randn(4)

    def f(p: Tensor) -> Tensor:
        A = p @ p.T + 2 * torch.eye(4, dtype=p.dtype) + 0.1 * B
        return torch.linalg.slogdet(A)[1] + (torch.linalg.solve(A, b) ** 2).sum()

    return Problem("linear_algebra", f, _randn(4, 4))
