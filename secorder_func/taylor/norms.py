"""Norms, variances and products along dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secorder_func.taylor.registry import NotCoveredError, Terms, forms, tangent, written

__all__ = ["unreduced"]


def unreduced(out: Tensor, input: Tensor, dim: Any, keepdim: bool) -> Any:
    """Return a reduced tensor with the dimensions that it was reduced over, of length one."""
    if keepdim or not input.ndim or out.ndim == input.ndim:
        return out
    if dim is None or dim == ():
        return out.reshape([1] * input.ndim)
    for place in sorted(d % input.ndim for d in ((dim,) if isinstance(dim, int) else dim)):
        out = out.unsqueeze(place)
    return out


@tangent(torch.linalg.vector_norm, kind="closed")
def _vector_norm(
    t: Terms,
    out: Tensor,
    x: Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    if x.is_complex():
        raise NotCoveredError("a norm of complex entries")
    term = t(x)
    assert term is not None
    if dtype is not None:
        x, term = x.to(dtype), term.to(dtype)
    size = unreduced(out, x, dim, keepdim)
    if ord == 2:
        slope = torch.where(size == 0, 0.0, x / torch.where(size == 0, 1.0, size))
    elif ord == 1:
        slope = x.sgn()
    elif ord == 0:
        return None
    elif math.isinf(ord):
        hits = (x.abs() == size).to(x.dtype)
        dims = tuple(range(x.ndim)) if dim is None else dim
        slope = x.sgn() * hits / hits.sum(dims, keepdim=True) if x.ndim else x.sgn()
    elif ord > 2:
        ratio = torch.where(size == 0, 0.0, x / torch.where(size == 0, 1.0, size))
        slope = ratio * ratio.abs().pow(ord - 2)
    else:
        still = x == 0
        ratio = torch.where(still, 1.0, x) / torch.where(size == 0, 1.0, size)
        slope = torch.where(still, 0.0, ratio.sgn() * ratio.abs().pow(ord - 1))
    product = term * slope
    if not x.ndim:
        return product
    return product.sum(tuple(range(x.ndim)) if dim is None else dim, keepdim)


@written(torch.linalg.norm)
def _norm_of(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if ord is None or (isinstance(ord, (int, float)) and _is_vector(A, dim)):
        where = dim
        if ord is None and dim is None and keepdim:
            where = tuple(range(A.ndim))
        return torch.linalg.vector_norm(A, 2 if ord is None else ord, where, keepdim, dtype=dtype)
    return torch.linalg.matrix_norm(A, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)


def _is_vector(A: Tensor, dim: Any) -> bool:
    return A.ndim == 1 if dim is None else isinstance(dim, int) or len(dim) == 1


@written(torch.norm)
def _norm(
    input: Tensor,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Any:
    if out is not None or p == "nuc":
        raise NotCoveredError("the nuclear norm, or out=")
    order = 2 if p in ("fro", None) else p
    return torch.linalg.vector_norm(input, order, dim, keepdim, dtype=dtype)


@written(torch.norm_except_dim)
def _norm_except_dim(v: Tensor, pow: int = 2, dim: int = 0) -> Any:
    if dim == -1:
        return torch.linalg.vector_norm(v, pow)
    others = tuple(d for d in range(v.ndim) if d != dim % v.ndim)
    return torch.linalg.vector_norm(v, pow, others, True)


@written(*forms("dist"))
def _dist(input: Tensor, other: Tensor, p: Any = 2) -> Any:
    return torch.linalg.vector_norm(input - other, p)


def _moments(
    input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """Return variance, mean and dimensions, as torch.var understands its arguments."""
    if kwargs.keys() - {"dim", "unbiased", "keepdim", "correction"}:
        raise NotCoveredError(f"arguments {sorted(kwargs)}")
    unbiased, keepdim = kwargs.get("unbiased", True), kwargs.get("keepdim", False)
    dim = kwargs.get("dim")
    rest = list(args)
    if rest and isinstance(rest[0], bool):
        unbiased = rest.pop(0)
    elif rest:
        dim = rest.pop(0)
        if rest:
            unbiased = rest.pop(0)
        if rest:
            keepdim = rest.pop(0)
    correction = kwargs.get("correction", 1 if unbiased else 0)
    correction = 1 if correction is None else correction
    dims = (dim,) if isinstance(dim, int) else tuple(dim) if dim else tuple(range(input.ndim))
    count = math.prod(input.shape[d] for d in dims) if input.ndim else 1
    mean = input.mean(dims, keepdim=True)
    centred = input - mean
    squares = (centred * centred.conj()).real if input.is_complex() else centred * centred
    variance = squares.sum(dims, keepdim=keepdim) / max(0, count - correction)
    return variance, mean if keepdim else mean.squeeze(dims), dims


@written(*forms("var"))
def _var(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _moments(input, args, kwargs)[0]


@written(*forms("std"))
def _std(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _root(_moments(input, args, kwargs)[0])


def _root(variance: Tensor) -> Any:
    """Return the standard deviation, whose derivative torch takes for zero where it is zero."""
    still = variance == 0
    return torch.where(still, 0.0, torch.where(still, 1.0, variance).sqrt())


@written(torch.var_mean)
def _var_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _moments(input, args, kwargs)[:2]


@written(torch.std_mean)
def _std_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean, _ = _moments(input, args, kwargs)
    return _root(variance), mean
