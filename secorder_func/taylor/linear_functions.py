"""Functions that are linear in what they differentiate: the term passes through the function itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func.rules.levels import unwrapped
from secorder_func.taylor.registry import (
    NotCoveredError,
    Terms,
    forms,
    jointly_linear,
    linear,
    repaired,
    tangent,
    written,
)

__all__: list[str] = []

_TENSOR: Any = torch.Tensor

_SHAPES = (
    *("reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as"),
    *("reshape_as", "transpose", "t", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("adjoint", "expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"),
    *("narrow", "narrow_copy", "select", "select_copy", "unbind", "split", "split_with_sizes"),
    *("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "tensor_split"),
    *("hsplit", "vsplit", "dsplit", "unfold", "diagonal", "diag", "diag_embed", "diagflat"),
    *("tril", "triu", "flip", "fliplr", "flipud", "roll", "rot90", "contiguous", "clone"),
    *("index_select", "gather", "take", "take_along_dim", "masked_select", "alias_copy"),
    *("unfold_copy", "view_copy", "expand_copy", "permute_copy", "t_copy", "transpose_copy"),
    *("squeeze_copy", "unsqueeze_copy", "split_copy", "unbind_copy", "slice_copy"),
    *("diagonal_copy", "sum_to_size"),
)
_COPIES = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
_COMPLEX = ("real", "imag", "view_as_real", "view_as_complex", "conj", "conj_physical")
_COMPLEX_TOO = ("resolve_conj", "resolve_neg", "chalf", "cfloat", "cdouble")
_SUMS = ("sum", "mean", "cumsum", "trace", "deg2rad", "rad2deg", "neg")
_SUMS_TOO = ("negative", "positive", "fftshift", "ifftshift")
_WINDOWS = (
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "fold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("native_channel_shuffle", "interpolate", "upsample", "upsample_nearest"),
    "upsample_bilinear",
)
_TRANSFORMS = tuple(
    f"{name}{dims}"
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
    for dims in ("", "2", "n")
)

linear(*forms(*_SHAPES, *_COPIES, *_COMPLEX, *_COMPLEX_TOO, *_SUMS, *_SUMS_TOO, *_WINDOWS))
linear(*(getattr(torch.fft, name) for name in (*_TRANSFORMS, "fftshift", "ifftshift")))
linear(torch.stft, _TENSOR.stft, torch.istft, _TENSOR.istft)
linear(_TENSOR.__getitem__)
linear(*(getattr(_TENSOR, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")))

jointly_linear(
    *forms("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack"),
    *forms("column_stack", "block_diag", "atleast_1d", "atleast_2d", "atleast_3d", "meshgrid"),
    *forms("broadcast_tensors", "complex", "diff"),
)
jointly_linear(
    *forms("diagonal_scatter", "select_scatter", "slice_scatter", "masked_scatter", "index_copy"),
    torch.as_strided_scatter,
    _TENSOR.as_strided_scatter,
    indexed=True,
)


@tangent(_TENSOR.view, kind="linear", by_output=True)
def _view(t: Terms, out: Any, input: Tensor, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or any(isinstance(part, torch.dtype) for part in shape):
        raise NotCoveredError("a view of the bits in another dtype")
    return t(input).reshape(out.shape)


@tangent(*forms("as_strided"), kind="linear")
def _as_strided(t: Terms, out: Any, input: Tensor, *places: Any, **kwargs: Any) -> Any:
    term = t(input)
    if (term.stride(), term.storage_offset()) != (input.stride(), input.storage_offset()) or (
        unwrapped(term).untyped_storage().nbytes() != unwrapped(input).untyped_storage().nbytes()
    ):
        raise NotCoveredError("the term does not lie in memory as its value does")
    return term.as_strided(*places, **kwargs)


@written(*forms("as_strided_copy"))
def _as_strided_copy(input: Tensor, *places: Any, **kwargs: Any) -> Any:
    return torch.as_strided(input, *places, **kwargs).clone()


@written(*forms("nanmean"))
def _nanmean(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    there = input.isnan().logical_not()
    dims = tuple(range(input.ndim)) if dim is None else dim
    total = torch.where(there, input, 0.0).sum(dims, keepdim, dtype=dtype)
    return total / there.sum(dims, keepdim)


@written(*forms("nansum"))
def _nansum(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return torch.where(input.isnan(), 0.0, input).sum(*args, **kwargs)


@tangent(torch.where, _TENSOR.where, kind="linear", by_output=True)
def _where(t: Terms, out: Any, first: Tensor, *others: Any, **kwargs: Any) -> Any:
    names = ("input", "other") if first.dtype == torch.bool else ("condition", "other")
    given = {**dict(zip(names, others, strict=False)), **kwargs}
    parts = {"condition": first, "input": first, **given}
    return torch.where(
        parts["condition"], *(_term_or_zero(t, parts[name], out) for name in ("input", "other"))
    )


def _term_or_zero(t: Terms, part: Any, out: Tensor) -> Any:
    term = t(part)
    return out.new_zeros(()) if term is None else term.to(out.dtype)


@tangent(*forms("masked_fill", "masked_fill_"), kind="linear", by_output=True)
def _masked_fill(t: Terms, out: Any, input: Tensor, mask: Tensor, value: Any) -> Any:
    term, filled = t(input), t(value)
    if filled is None:
        return None if term is None else term.masked_fill(mask, 0.0)
    return torch.where(mask, filled.to(out.dtype), _term_or_zero(t, input, out))


@tangent(*forms("index_fill", "index_fill_"), kind="linear", by_output=True)
def _index_fill(t: Terms, out: Any, input: Tensor, dim: int, index: Any, value: Any) -> Any:
    filled = t(value)
    filled = 0.0 if filled is None else filled
    return repaired(t, torch.index_fill)(t.or_zeros(input), dim, index, filled)


@tangent(*forms("scatter", "scatter_"), kind="linear", by_output=True)
def _scatter(
    t: Terms, out: Any, input: Tensor, dim: int, index: Tensor, src: Any = None, **kwargs: Any
) -> Any:
    if kwargs.keys() - {"value"}:
        raise TypeError("scatter with a reduction")
    source = t(src if src is not None else kwargs.get("value"))
    if source is None:
        source = torch.zeros_like(src) if isinstance(src, Tensor) else 0.0
    return t.or_zeros(input).scatter(dim, index, source)


@tangent(*forms("scatter_add", "scatter_add_"), kind="linear", by_output=True)
def _scatter_add(t: Terms, out: Any, input: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    source = t(src)
    term = t.or_zeros(input)
    return term if source is None else term.scatter_add(dim, index, source)


@tangent(*forms("index_add", "index_add_"), kind="linear", by_output=True)
def _index_add(
    t: Terms, out: Any, input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1
) -> Any:
    added, term = t(source), t.or_zeros(input)
    if added is None:
        return term
    added = added.to(term.dtype)
    return repaired(t, torch.index_add)(term, dim, index, added, alpha=alpha)


@tangent(*forms("index_put", "index_put_"), kind="linear", by_output=True)
def _index_put(
    t: Terms, out: Any, input: Tensor, indices: Any, values: Tensor, accumulate: bool = False
) -> Any:
    return t.or_zeros(input).index_put(indices, t.or_zeros(values), accumulate)


@tangent(_TENSOR.__setitem__, kind="linear", by_output=True)
def _set_item(t: Terms, out: Any, input: Tensor, index: Any, value: Any) -> Any:
    term = t.or_zeros(input).clone()
    put = t(value)
    term[index] = 0.0 if put is None else put
    return term


@tangent(_TENSOR.copy_, kind="linear", by_output=True)
def _copy(t: Terms, out: Any, input: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    term = t(src)
    return None if term is None else term.to(input)


@tangent(*forms("zero_", "fill_", "fill", "zero"), kind="linear", by_output=True)
def _fill(t: Terms, out: Any, input: Tensor, value: Any = 0.0) -> Any:
    return t(value)


@tangent(F.pad, torch.constant_pad_nd, kind="linear")
def _pad(
    t: Terms, out: Any, input: Tensor, pad: Any, mode: Any = "constant", value: Any = None
) -> Any:
    return F.pad(t(input), pad, mode if isinstance(mode, str) else "constant")


@tangent(F.embedding, kind="linear")
def _embedding(t: Terms, out: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    padding = kwargs.get("padding_idx", args[0] if args else None)
    by_frequency = kwargs.get("scale_grad_by_freq", args[3] if len(args) > 3 else False)
    if by_frequency:
        raise TypeError("its gradient is scaled, so that it is not the derivative of its output")
    rows = F.embedding(input, t(weight))
    if padding is None:
        return rows
    padding = padding if padding >= 0 else weight.shape[0] + padding
    return rows.masked_fill((input == padding).unsqueeze(-1), 0.0)


@tangent(torch.embedding, kind="linear")
def _torch_embedding(
    t: Terms,
    out: Any,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    padding = None if padding_idx < 0 else padding_idx
    return _embedding(t, out, indices, weight, padding, None, 2.0, scale_grad_by_freq)


_CONSTANT = (
    *("floor", "ceil", "round", "trunc", "fix", "sign", "heaviside", "floor_divide"),
    *("zeros_like", "ones_like", "argmax", "bernoulli"),
)


@tangent(*forms(*_CONSTANT), _TENSOR.__floordiv__, kind="constant", by_output=True)
def _constant(t: Terms, out: Any, *args: Any, **kwargs: Any) -> None:
    return None
