"""Functions with a rule of our own, each as torch has it, on tensors of given shapes; `hypothesis` draws the shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Fn = Callable[..., Any]


def _mask(x: Tensor) -> Tensor:
    return torch.arange(x.numel()).reshape(x.shape) % 3 == 0


def _index(x: Tensor, dim: int = -1) -> Tensor:
    return torch.arange(x.shape[dim]).flip(0)


def _positive(x: Tensor) -> Tensor:
    return x.exp() + 0.1


UNARY: dict[str, Fn] = {
    **{name: getattr(torch, name) for name in ("exp", "exp2", "expm1", "sin", "cos", "square")},
    **{name: getattr(torch, name) for name in ("sinh", "cosh", "tanh", "atan", "asinh", "erf")},
    **{name: getattr(torch, name) for name in ("erfc", "sigmoid", "abs", "frac", "relu")},
    **{name: getattr(F, name) for name in ("gelu", "silu", "mish", "softplus", "logsigmoid")},
    **{name: getattr(F, name) for name in ("elu", "celu", "selu", "leaky_relu", "hardtanh")},
    **{name: getattr(F, name) for name in ("relu6", "hardswish", "hardshrink")},
    **{name: getattr(F, name) for name in ("softshrink", "tanhshrink", "softsign", "rrelu")},
    "tan": lambda x: torch.tan(x / 4),
    "log": lambda x: _positive(x).log(),
    "log2": lambda x: _positive(x).log2(),
    "log10": lambda x: _positive(x).log10(),
    "log1p": lambda x: _positive(x).log1p(),
    "sqrt": lambda x: _positive(x).sqrt(),
    "rsqrt": lambda x: _positive(x).rsqrt(),
    "reciprocal": lambda x: _positive(x).reciprocal(),
    "lgamma": lambda x: _positive(x).lgamma(),
    "digamma": lambda x: _positive(x).digamma(),
    "asin": lambda x: torch.asin(x.tanh() / 2),
    "acos": lambda x: torch.acos(x.tanh() / 2),
    "atanh": lambda x: torch.atanh(x.tanh() / 2),
    "acosh": lambda x: torch.acosh(_positive(x) + 1),
    "erfinv": lambda x: torch.erfinv(x.tanh() / 2),
    "logit": lambda x: torch.logit(x.sigmoid() / 2 + 0.25),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "threshold": lambda x: F.threshold(x, 0.3, -1.0),
    "pow of a number": lambda x: x**3 + _positive(x) ** -1.5 + x**1 + x**0,
    "number to a power": lambda x: 2.0**x,
    "numbers": lambda x: 1.0 - 2.0 / _positive(x) + 3 * x / 2 - x,
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + x.clamp(max=0.2),
    "softmax": lambda x: F.softmax(x, -1) + torch.softmax(x, 0) + x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1) + x.log_softmax(0),
    "softmin": lambda x: F.softmin(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True) + x.logsumexp((0, -1)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norms": lambda x: x.norm() + x.norm(dim=-1).sum() + torch.linalg.vector_norm(x, 3, -1).sum(),
    "variance": lambda x: x.var() + x.std(-1).sum() + torch.var_mean(x, 0)[0].sum(),
    "sums": lambda x: x.sum() * x.mean(-1).sum() + x.cumsum(-1).pow(2).sum() + x.sum((0, -1)),
    "selections": lambda x: x.max(-1)[0].sum() + x.amax() + x.min() * x.sort(-1)[0][0].sum(),
    "topk": lambda x: x.topk(2, -1)[0] + x.kthvalue(2, -1)[0].sum() + x.cummax(-1)[0].sum(),
    "median": lambda x: x.median(-1)[0] * x.median(0, keepdim=True)[0].sum(),
    "views": lambda x: x.mT.reshape(-1).unflatten(0, (1, -1)) * x.flatten(),
    "indexing": lambda x: torch.cat([x[0].flatten(), x[..., 1:].flatten(), x[_mask(x)]]),
    "pieces": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(2, -1))], -1),
    "stacks": lambda x: torch.stack([x, x.flip(0), torch.ones_like(x)]) * torch.hstack([x])[None],
    "repeats": lambda x: (
        x.repeat(2, *[1] * (x.ndim - 1)) + x.roll(1, 0).expand_as(x).tile(2, *[1] * (x.ndim - 1))
    ),
    "triangles": lambda x: x.tril() + x.triu(1).diagonal(0, -2, -1).sum(),
    "where": lambda x: torch.where(_mask(x), x * x, torch.sin(x)) + torch.where(x > 0, x, 0.0),
    "masks": lambda x: x.masked_fill(_mask(x), 2.0) * x.masked_select(_mask(x)).sum(),
    "gather": lambda x: x.gather(-1, _index(x).expand(x.shape)) * x.index_select(-1, _index(x)),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(-1, _index(x).expand(x.shape), x * x),
    "index_add": lambda x: (
        x.index_add(-1, _index(x), x.sin()) + x.index_fill(-1, _index(x)[:1], 1.0)
    ),
    "pad": lambda x: F.pad(x, (1, 2)) + F.pad(x, (2, 1), value=3.0),
    "glu": lambda x: F.glu(torch.cat([x, x * x], -1)),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(-1) + 1, -1),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.roll(1, -1) * 2),
    "kl_div": lambda x: F.kl_div(F.log_softmax(x, -1), F.softmax(x.flip(-1), -1), reduction="sum"),
    "nll": lambda x: F.nll_loss(F.log_softmax(x.reshape(-1, x.shape[-1]), -1), _targets(x)),
    "cross_entropy": lambda x: F.cross_entropy(x.reshape(-1, x.shape[-1]), _targets(x)),
    "cross_entropy smoothed": lambda x: F.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        _targets(x),
        weight=torch.linspace(0.5, 2, x.shape[-1]).double(),
        ignore_index=0,
        label_smoothing=0.2,
    ),
    "cross_entropy of shares": lambda x: F.cross_entropy(
        x.reshape(-1, x.shape[-1]), F.softmax(x.reshape(-1, x.shape[-1]).flip(-1), -1)
    ),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), _mask(x).double()),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(
        x, _mask(x).double(), pos_weight=torch.tensor(2.0).double()
    ),
    "mse": lambda x: F.mse_loss(x, x.flip(-1).sin()) + F.mse_loss(x, x.cos(), reduction="sum"),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, 2 * x.flip(-1).cos()),
    "huber": lambda x: F.huber_loss(x, x.flip(-1).sin(), delta=0.4),
    "l1": lambda x: F.l1_loss(x * x, x.flip(-1), reduction="none"),
    "poisson": lambda x: F.poisson_nll_loss(x, x.abs() + 2, full=True),
    "soft_margin": lambda x: F.soft_margin_loss(x, _mask(x) * 2.0 - 1),
    "integers among floats": lambda x: (
        torch.cat([x, torch.ones_like(x, dtype=torch.int64)])
        * torch.where(_mask(x), x, torch.full_like(x, 3, dtype=torch.int64)).repeat(
            2, *[1] * (x.ndim - 1)
        )
    ),
    "diff": lambda x: x.diff(dim=-1) + x.diff(dim=-1, prepend=x[..., :1] + 2)[..., 1:],
    "nansum": lambda x: torch.where(_mask(x), torch.nan, x).nansum(-1) ** 2,
    "nanmean": lambda x: torch.where(_mask(x), torch.nan, x).nanmean(-1) ** 2,
    "as_strided": lambda x: x.clone().as_strided((2, 2), (2, 1), 0) ** 2,
    "views of views": lambda x: x.mT.contiguous().view(-1).view(x.mT.shape).mT * x,
    "dtypes": lambda x: (x.float() * x).to(torch.float64) + x.type(torch.float64),
}
"""On one tensor of two or more dimensions, the last two of length two or more."""


def _targets(x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    return torch.arange(rows) % x.shape[-1]


BINARY: dict[str, Fn] = {
    "add": lambda x, y: torch.add(x, y, alpha=2) + x + y,
    "sub": lambda x, y: torch.sub(x, y, alpha=2) - y,
    "mul": lambda x, y: x * y * torch.mul(x, 2.0),
    "div": lambda x, y: x / _positive(y),
    "pow": lambda x, y: _positive(x) ** y,
    "atan2": torch.atan2,
    "hypot": lambda x, y: torch.hypot(x, y + 3),
    "logaddexp": lambda x, y: torch.logaddexp(x, y) + torch.logaddexp2(x, y),
    "xlogy": lambda x, y: torch.xlogy(x, _positive(y)),
    "maximum": lambda x, y: torch.maximum(x, y) + torch.minimum(x, 2 * y) + torch.max(x, y),
    "fmax": lambda x, y: torch.fmax(x, y) * torch.fmin(x, y),
    "addcmul": lambda x, y: torch.addcmul(x * y, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x * y, x, _positive(y), value=0.5),
    "lerp": lambda x, y: torch.lerp(x * y, y, 0.3) + torch.lerp(x, y, x * y),
    "remainder": lambda x, y: torch.remainder(x, _positive(y)) + torch.fmod(x, _positive(y)),
    "clamp": lambda x, y: torch.clamp(x, y - 0.5, y + 0.5),
    "where": lambda x, y: torch.where(x > y, x, y),
}
"""On two tensors that broadcast."""

PRODUCTS: dict[str, tuple[Fn, list[tuple[int, ...]]]] = {
    "matmul": (torch.matmul, [(2, 3, 4), (4, 2)]),
    "matmul of vectors": (torch.matmul, [(4,), (4,)]),
    "mm": (torch.mm, [(3, 4), (4, 2)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 2)]),
    "mv": (torch.mv, [(3, 4), (4,)]),
    "outer": (torch.outer, [(3,), (4,)]),
    "dot": (torch.dot, [(3,), (3,)]),
    "inner": (torch.inner, [(2, 3), (4, 3)]),
    "kron": (torch.kron, [(2, 3), (2, 2)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), [(2, 3), (3, 4)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=2, alpha=3), [(2,), (3, 4), (4, 2)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 2), (2, 3, 4), (2, 4, 2)]),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)]),
    "einsum": (lambda a, b, c: torch.einsum("ij,jk,k->i", a, b, c), [(2, 3), (3, 4), (4,)]),
    "linear": (F.linear, [(2, 5, 3), (4, 3), (4,)]),
    "linear without bias": (F.linear, [(5, 3), (4, 3)]),
    "bilinear": (F.bilinear, [(5, 3), (5, 2), (4, 3, 2), (4,)]),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1),
        [(2, 3, 7), (4, 3, 3), (4,)],
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=2, dilation=2, groups=2),
        [(2, 4, 5, 6), (6, 2, 3, 3), (6,)],
    ),
    "conv2d same": (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 2, 5, 5), (3, 2, 3, 3)]),
    "conv3d": (F.conv3d, [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)]),
    "conv_transpose1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, output_padding=1),
        [(2, 3, 5), (3, 4, 3), (4,)],
    ),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2),
        [(2, 4, 3, 3), (4, 2, 3, 3)],
    ),
    "conv_transpose3d": (F.conv_transpose3d, [(1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)]),
    "attention causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 3, 4), (2, 3, 4), (2, 3, 4)],
    ),
    "attention with a mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3),
        [(2, 3, 4), (2, 5, 4), (2, 5, 4), (3, 5)],
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        [(4, 3, 2), (3,), (3,)],
    ),
    "batch_norm in evaluation": (
        lambda x, w, b: F.batch_norm(x, torch.ones(3).double(), torch.ones(3).double(), w, b),
        [(4, 3, 2, 2), (3,), (3,)],
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
    "instance_norm": (lambda x, w: F.instance_norm(x, weight=w), [(2, 3, 5), (3,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), [(2, 3, 4), (4,)]),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), [(2, 5, 4, 3)]),
    "prelu": (F.prelu, [(2, 3, 4), (3,)]),
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2), [(2, 3, 8)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2, padding=1), [(2, 3, 6, 6)]),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), [(1, 2, 4, 4, 4)]),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), [(2, 2, 7, 5)]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, 1, ceil_mode=True), [(2, 3, 5, 5)]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), [(2, 3, 5, 5)]),
    "lp_pool2d": (lambda x: F.lp_pool2d(x.exp(), 3.0, 2), [(1, 2, 4, 4)]),
    "interpolate": (
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
        [(1, 2, 3, 3)],
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), [(1, 8, 2, 3)]),
    "unfold and fold": (
        lambda x: F.fold(F.unfold(x, 2).square(), (4, 4), 2),
        [(1, 2, 4, 4)],
    ),
    "reflection": (lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect"), [(1, 2, 4, 4)]),
    "embedding": (
        lambda w: F.embedding(torch.tensor([[0, 2, 2], [1, 3, 0]]), w, padding_idx=1),
        [(4, 3)],
    ),
    "triplet": (F.triplet_margin_loss, [(4, 3), (4, 3), (4, 3)]),
    "fft": (lambda x: torch.fft.rfft(x).abs().square(), [(3, 6)]),
    "complex": (lambda x, y: torch.view_as_real(torch.complex(x, y).tanh() ** 2), [(3, 2), (3, 2)]),
}
"""On tensors of these shapes."""
