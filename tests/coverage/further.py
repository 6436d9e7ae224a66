"""What torch's databases leave out of `torch.nn` and `torch.nn.functional`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coverage.problems import Problem, function_problem, module_problem

NO_FUNCTION = {
    **dict.fromkeys(
        ("Container", "Module", "RNNBase", "RNNCellBase"), "a base class without forward"
    ),
    **dict.fromkeys(
        ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
        "a container without forward",
    ),
    "SyncBatchNorm": "runs on GPUs only",
    "CrossMapLRN2d": "its backward is once_differentiable; tests/rules/test_cut_graphs.py",
    **dict.fromkeys(
        (
            "assert_int_or_pair",
            "boolean_dispatch",
            "handle_torch_function",
            "has_torch_function",
            "has_torch_function_unary",
            "has_torch_function_variadic",
        ),
        "no function of tensors",
    ),
    "native_channel_shuffle": "torch has no derivative of it at all",
    **dict.fromkeys(("grouped_mm", "scaled_grouped_mm", "scaled_mm"), "low precision kernels"),
}
"""Public names that cannot be differentiated here, and why."""


def _x(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


LABELS = torch.tensor([0, 3, 9, 5])
_MAXIMA: Any = partial(torch.arange, 0, 8, 2)

MODULES: dict[str, list[tuple[Callable[[], nn.Module], tuple[Any, ...]]]] = {
    "AdaptiveLogSoftmaxWithLoss": [
        (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [4, 7], div_value=2.0), (_x(4, 6), LABELS)),
        (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [5], head_bias=True), (_x(4, 6), LABELS)),
    ],
    "AlphaDropout": [(lambda: nn.AlphaDropout(0.4), (_x(4, 3),))],
    "ChannelShuffle": [(lambda: nn.ChannelShuffle(2), (_x(2, 4, 3, 3),))],
    "CosineSimilarity": [
        (lambda: nn.CosineSimilarity(1), (_x(4, 3), _x(4, 3, seed=1))),
        (lambda: nn.CosineSimilarity(-1, eps=1e-3), (_x(2, 4, 3), _x(2, 4, 3, seed=1))),
    ],
    "DataParallel": [(lambda: nn.DataParallel(nn.Linear(3, 2)), (_x(4, 3),))],
    "Dropout": [(lambda: nn.Dropout(0.4), (_x(4, 3),))],
    "Dropout1d": [(lambda: nn.Dropout1d(0.4), (_x(2, 4, 3),))],
    "Dropout2d": [(lambda: nn.Dropout2d(0.4), (_x(2, 4, 3, 3),))],
    "Dropout3d": [(lambda: nn.Dropout3d(0.4), (_x(2, 4, 2, 3, 3),))],
    "EmbeddingBag": [
        (partial(nn.EmbeddingBag, 5, 3, mode=mode), args)
        for mode in ("mean", "sum", "max")
        for args in (
            (torch.tensor([[0, 1, 1], [2, 3, 0]]),),
            (torch.tensor([0, 1, 4, 2, 3]), torch.tensor([0, 2, 2])),
        )
    ],
    "FeatureAlphaDropout": [(lambda: nn.FeatureAlphaDropout(0.4), (_x(2, 4, 3),))],
    "Flatten": [(nn.Flatten, (_x(2, 3, 4),)), (lambda: nn.Flatten(0, 1), (_x(2, 3, 4),))],
    "Fold": [(lambda: nn.Fold((4, 5), (2, 2)), (_x(1, 8, 12),))],
    "Hardsigmoid": [(nn.Hardsigmoid, (_x(4, 3),))],
    "Identity": [(nn.Identity, (_x(4, 3),))],
    "LazyBatchNorm1d": [(nn.LazyBatchNorm1d, (_x(4, 3),))],
    "LazyBatchNorm2d": [(nn.LazyBatchNorm2d, (_x(4, 3, 2, 2),))],
    "LazyBatchNorm3d": [(nn.LazyBatchNorm3d, (_x(4, 3, 2, 2, 2),))],
    "LazyInstanceNorm1d": [(lambda: nn.LazyInstanceNorm1d(affine=True), (_x(2, 3, 5),))],
    "LazyInstanceNorm2d": [(lambda: nn.LazyInstanceNorm2d(affine=True), (_x(2, 3, 4, 4),))],
    "LazyInstanceNorm3d": [(lambda: nn.LazyInstanceNorm3d(affine=True), (_x(2, 3, 2, 3, 3),))],
    "LazyLinear": [(lambda: nn.LazyLinear(2), (_x(4, 3),))],
    "MaxUnpool1d": [(lambda: nn.MaxUnpool1d(2), (_x(1, 1, 4), _MAXIMA().reshape(1, 1, 4)))],
    "MaxUnpool2d": [
        (
            lambda: nn.MaxUnpool2d(2),
            (_x(1, 1, 2, 2), torch.tensor([0, 3, 9, 10]).reshape(1, 1, 2, 2)),
        )
    ],
    "MaxUnpool3d": [
        (lambda: nn.MaxUnpool3d(2), (_x(1, 1, 2, 2, 2), 8 * torch.arange(8).reshape(1, 1, 2, 2, 2)))
    ],
    "NLLLoss2d": [(nn.NLLLoss, (_x(2, 4, 3, 3), torch.arange(18).remainder(4).reshape(2, 3, 3)))],
    "PairwiseDistance": [
        (partial(nn.PairwiseDistance, p), (_x(4, 3), _x(4, 3, seed=1))) for p in (1.0, 2.0, 3.0)
    ],
    "PixelShuffle": [(lambda: nn.PixelShuffle(2), (_x(1, 8, 2, 3),))],
    "PixelUnshuffle": [(lambda: nn.PixelUnshuffle(2), (_x(1, 2, 4, 6),))],
    "RReLU": [(nn.RReLU, (_x(4, 3),))],
    "Sequential": [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), (_x(4, 3),))
    ],
    "TransformerDecoder": [
        (
            lambda: nn.TransformerDecoder(
                nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
            ),
            (_x(2, 3, 8), _x(2, 4, 8, seed=1)),
        )
    ],
    "TripletMarginLoss": [
        (
            partial(nn.TripletMarginLoss, margin=3.0, p=p, swap=swap),
            (_x(4, 3), _x(4, 3, seed=1), _x(4, 3, seed=2)),
        )
        for p in (2.0, 3.0)
        for swap in (False, True)
    ],
    "TripletMarginWithDistanceLoss": [
        (
            lambda: nn.TripletMarginWithDistanceLoss(
                distance_function=nn.PairwiseDistance(), margin=3.0
            ),
            (_x(4, 3), _x(4, 3, seed=1), _x(4, 3, seed=2)),
        )
    ],
    "Unflatten": [(lambda: nn.Unflatten(1, (2, 3)), (_x(4, 6),))],
    "Unfold": [(lambda: nn.Unfold(2, stride=2), (_x(1, 2, 4, 6),))],
    "Upsample": [
        (partial(nn.Upsample, scale_factor=2, mode=mode), (_x(1, 2, *[3] * dims),))
        for mode, dims in (
            ("nearest", 1),
            ("nearest", 2),
            ("nearest", 3),
            ("linear", 1),
            ("bilinear", 2),
            ("bicubic", 2),
            ("trilinear", 3),
        )
    ],
    "UpsamplingBilinear2d": [(lambda: nn.UpsamplingBilinear2d(scale_factor=2), (_x(1, 2, 3, 3),))],
    "UpsamplingNearest2d": [(lambda: nn.UpsamplingNearest2d(scale_factor=2), (_x(1, 2, 3, 3),))],
}

FUNCTIONS: dict[str, list[tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "adaptive_max_pool1d_with_indices": [
        (lambda x: F.adaptive_max_pool1d(x, 2, True)[0], (_x(1, 2, 5),))
    ],
    "adaptive_max_pool2d_with_indices": [
        (lambda x: F.adaptive_max_pool2d(x, 2, True)[0], (_x(1, 2, 5, 5),))
    ],
    "adaptive_max_pool3d_with_indices": [
        (lambda x: F.adaptive_max_pool3d(x, 2, True)[0], (_x(1, 2, 4, 4, 4),))
    ],
    "affine_grid": [
        (lambda t: F.affine_grid(t, [1, 1, 3, 4], align_corners=False), (_x(1, 2, 3),))
    ],
    "conv_tbc": [
        (lambda x, w, b: F.conv_tbc(x, w, b, pad=1), (_x(5, 2, 3), _x(3, 3, 4, seed=1), _x(4)))
    ],
    "dropout1d": [(lambda x: F.dropout1d(x, 0.4), (_x(2, 4, 3),))],
    "fold": [(lambda x: F.fold(x, (4, 5), (2, 2)), (_x(1, 8, 12),))],
    "fractional_max_pool2d_with_indices": [
        (
            lambda x: F.fractional_max_pool2d(x, 2, output_size=3, return_indices=True)[0],
            (_x(1, 2, 7, 7),),
        )
    ],
    "fractional_max_pool3d_with_indices": [
        (
            lambda x: F.fractional_max_pool3d(x, 2, output_size=2, return_indices=True)[0],
            (_x(1, 2, 5, 5, 5),),
        )
    ],
    "gumbel_softmax": [
        (lambda x: F.gumbel_softmax(x, tau=0.7), (_x(4, 3),)),
        (lambda x: F.gumbel_softmax(x, hard=True), (_x(4, 3),)),
    ],
    "lp_pool1d": [(lambda x: F.lp_pool1d(x.square() + 1, 3.0, 2), (_x(1, 2, 6),))],
    "lp_pool2d": [(lambda x: F.lp_pool2d(x.square() + 1, 2.0, 2), (_x(1, 2, 4, 4),))],
    "lp_pool3d": [(lambda x: F.lp_pool3d(x.square() + 1, 2.0, 2), (_x(1, 1, 4, 4, 4),))],
    "max_pool1d_with_indices": [
        (lambda x: F.max_pool1d(x, 2, return_indices=True)[0], (_x(1, 2, 6),))
    ],
    "max_pool2d_with_indices": [
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (_x(1, 2, 4, 4),))
    ],
    "max_pool3d_with_indices": [
        (lambda x: F.max_pool3d(x, 2, return_indices=True)[0], (_x(1, 1, 4, 4, 4),))
    ],
    "upsample": [(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (_x(1, 2, 3, 3),))],
}


def further_problems() -> Iterator[Problem]:
    """Yield the modules in both modes, then the functions."""
    for name, cases in MODULES.items():
        for index, (make, args) in enumerate(cases):
            for training in (True, False):
                label = f"nn.{name}-{index}-{'train' if training else 'eval'}"
                yield module_problem(f"nn.{name}", label, make, args, {}, training=training)
    for name, calls in FUNCTIONS.items():
        for index, (function, tensors) in enumerate(calls):
            yield function_problem(f"nn.functional.{name}", f"{name}-{index}", function, tensors)


def public_modules() -> set[str]:
    """Return the names of all modules of torch.nn."""
    return {
        name
        for name, value in vars(nn).items()
        if inspect.isclass(value) and issubclass(value, nn.Module)
    }


def public_functions() -> set[str]:
    """Return the names of all functions of torch.nn.functional but the in-place ones."""
    return {
        name
        for name, value in vars(F).items()
        if callable(value)
        and not inspect.isclass(value)
        and name[0].islower()
        and not name.endswith("_")
    }
