"""Short names of what values are, to know them again."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest"]


def digest(value: Any) -> str:
    """Return a name that two values share only if they are equal: structure, numbers, strings, every bit of tensors.

    >>> digest({"a": torch.zeros(2), "b": 1}) == digest({"b": 1, "a": torch.zeros(2)})
    True
    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2, 1)])
    False
    """
    found = hashlib.blake2b(digest_size=16)
    _add(value, found)
    return found.hexdigest()


def _add(value: Any, found: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(value, found)
    elif isinstance(value, dict):
        found.update(f"dict {len(value)}".encode())
        for key in sorted(value, key=repr):
            found.update(repr(key).encode())
            _add(value[key], found)
    elif isinstance(value, (list, tuple)):
        found.update(f"list {len(value)}".encode())
        for item in value:
            _add(item, found)
    else:
        found.update(repr(value).encode())


def _add_tensor(tensor: Tensor, found: Any) -> None:
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.layout != torch.strided:
        tensor = tensor.detach().to_dense()
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = flat.numel() * flat.element_size()
    if size:
        found.update((ctypes.c_char * size).from_address(flat.data_ptr()))
