"""The models that everything is measured on, each once.

Attention is written out of matmul and softmax, because the other packages have no second derivative of the fused
kernels: every candidate, and the gradient that is the unit, evaluates the same functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from secorder_func import functional_loss

__all__ = ["BIG", "PROBLEMS", "SAMPLED", "TIMED", "Problem", "problem", "problem_of"]


@dataclass(frozen=True)
class Problem:
    """A model, a loss and a batch, float32 on the CPU, from a fixed seed."""

    name: str
    description: str
    model: nn.Module
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor
    vector: tuple[Tensor, ...]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @cached_property
    def functional(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        return functional_loss(self.model, self.loss_fn)

    @cached_property
    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    @cached_property
    def vector_dict(self) -> dict[str, Tensor]:
        return self.named(self.vector)

    def named(self, vector: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, vector, strict=True))

    def vectors(self, count: int) -> list[Tensor]:
        """Return `count` vectors, stacked along a leading axis of every leaf."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(count, *v.shape, generator=generator).to(v.dtype) for v in self.vector]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def closure(self) -> Tensor:
        """Return the loss with everything bound, as stateful code has it."""
        loss: Tensor = self.loss_fn(self.model(self.inputs), self.targets)
        return loss

    def double(self) -> Problem:
        """Return the same numbers in float64."""
        return replace(
            self,
            model=copy.deepcopy(self.model).double(),
            inputs=self.inputs.double() if self.inputs.is_floating_point() else self.inputs,
            vector=tuple(v.double() for v in self.vector),
        )

    def rows(self, begin: int, end: int) -> Problem:
        """Return the same model on some of the samples (images, sequences)."""
        targets = self.targets.unflatten(0, (self.inputs.shape[0], -1))
        return replace(
            self, inputs=self.inputs[begin:end], targets=targets[begin:end].flatten(0, 1)
        )


class Attention(nn.Module):
    """Causal multi-head self-attention out of matmul and softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * size**-0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A small causal language model; logits of all positions in one matrix."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.tokens(ids) + self.positions)
        return self.head(self.norm(x)).flatten(0, 1)


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.act = nn.SiLU()
        around = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.around = nn.Sequential() if channels == out else around

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_2(self.second(self.act(self.norm_1(self.first(x)))))
        return self.act(y + self.around(x))


class Encoder(nn.Module):
    """PyTorch's encoder layer, with a classification of the mean over positions."""

    def __init__(self, width: int, heads: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x).mean(1))
        return scores


def problem_of(
    name: str, description: str, model: nn.Module, inputs: Tensor, classes: int
) -> Problem:
    """Return a classification with random targets and a random vector."""
    samples = inputs.numel() if not inputs.is_floating_point() else inputs.shape[0]
    targets = torch.randint(classes, (samples,))
    vector = tuple(torch.randn_like(p) for p in model.parameters())
    return Problem(name, description, model, nn.CrossEntropyLoss(), inputs, targets, vector)


def tiny() -> Problem:
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
    return problem_of("tiny", "MLP 10-16-4, tanh, batch 32", model, torch.randn(32, 10), 4)


def small() -> Problem:
    model = nn.Sequential(
        nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    return problem_of("small", "MLP 64-100-32-10, tanh, batch 32", model, torch.randn(32, 64), 10)


def mlp() -> Problem:
    model = nn.Sequential(
        nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    )
    return problem_of(
        "mlp", "MLP 784-512-512-10, tanh, batch 128", model, torch.randn(128, 784), 10
    )


def cnn() -> Problem:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.GELU()),
        *(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)),
    )
    description = "CNN, 3 convolutions (32, 64, 64 channels), GELU, 32 images of 32 x 32"
    return problem_of("cnn", description, model, torch.randn(32, 3, 32, 32), 10)


def gpt() -> Problem:
    model = GPT(vocabulary=256, width=128, heads=4, layers=4, length=64)
    description = "GPT, 4 layers, width 128, 4 heads, 8 x 64 tokens of 256"
    return problem_of("gpt", description, model, torch.randint(256, (8, 64)), 256)


def gpt_tiny() -> Problem:
    model = GPT(vocabulary=256, width=64, heads=4, layers=2, length=64)
    description = "GPT, 2 layers, width 64, 4 heads, 8 x 64 tokens of 256"
    return problem_of("gpt_tiny", description, model, torch.randint(256, (8, 64)), 256)


def deep() -> Problem:
    """Return 32 layers, orthogonal so that the signal arrives."""
    layers: list[nn.Module] = []
    for _ in range(32):
        layer = nn.Linear(32, 32)
        nn.init.orthogonal_(layer.weight)
        layers += [layer, nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    description = "MLP, 32 layers of width 32, tanh, batch 32"
    return problem_of("deep", description, model, torch.randn(32, 32), 4)


def _deep_wide(name: str, activation: nn.Module) -> Problem:
    """Return 24 layers whose activations take twice the memory of their weights."""
    layers: list[nn.Module] = []
    for _ in range(24):
        layers += [nn.Linear(256, 256), activation]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    description = f"MLP, 24 layers of width 256, {activation}, batch 512"
    return problem_of(name, description, model, torch.randn(512, 256), 10)


def deep_tanh() -> Problem:
    return _deep_wide("deep_tanh", nn.Tanh())


def deep_relu() -> Problem:
    return _deep_wide("deep_relu", nn.ReLU())


def resnet() -> Problem:
    """Return it with running statistics of three batches, in eval: a batch is then a sum over its samples."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()),
        *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)),
        *(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)),
    )
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    description = (
        "ResNet, 3 stages (16, 32, 64 channels), BatchNorm in eval, SiLU, 16 images of 32 x 32"
    )
    return problem_of("resnet", description, model.eval(), torch.randn(16, 3, 32, 32), 10)


def samples_mlp() -> Problem:
    model = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    return problem_of("samples_mlp", "MLP 32-64-64-10, tanh", model, torch.randn(256, 32), 10)


def samples_cnn() -> Problem:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Tanh()),
        *(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    description = "CNN, 2 convolutions (8, 16 channels), tanh, images of 16 x 16"
    return problem_of("samples_cnn", description, model, torch.randn(256, 3, 16, 16), 10)


def samples_encoder() -> Problem:
    model = Encoder(width=32, heads=4, hidden=64, classes=10)
    description = "Transformer encoder layer of PyTorch, width 32, 4 heads, 12 positions"
    return problem_of("samples_encoder", description, model, torch.randn(256, 12, 32), 10)


def stack(width: int, depth: int, batch: int) -> Problem:
    """Return an MLP of `depth` equal hidden layers: what growth is measured on."""
    hidden = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    name = f"stack-{width}-{depth}-{batch}"
    description = f"MLP, {depth} layers of width {width}, tanh, batch {batch}"
    return problem_of(name, description, model, torch.randn(batch, width), 10)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tiny": tiny,
    "small": small,
    "deep": deep,
    "deep_tanh": deep_tanh,
    "deep_relu": deep_relu,
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "gpt_tiny": gpt_tiny,
    "gpt": gpt,
    "samples_mlp": samples_mlp,
    "samples_cnn": samples_cnn,
    "samples_encoder": samples_encoder,
}
SAMPLED = ("samples_mlp", "samples_cnn", "samples_encoder")
"""Those of the curvature of every sample: small models, 256 samples."""
TIMED = tuple(
    name for name in PROBLEMS if name not in ("small", "deep_tanh", "deep_relu", *SAMPLED)
)
"""Those that products are timed on; the others are for the drop-in and for memory."""
BIG = ("cnn", "resnet", "gpt_tiny", "gpt")
"""Those of which one gradient takes 10 ms or more."""


def problem(name: str) -> Problem:
    """Return a problem by name, or `stack-WIDTH-DEPTH-BATCH`; the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name.startswith("stack-"):
            return stack(*(int(number) for number in name.split("-")[1:]))
        return PROBLEMS[name]()
