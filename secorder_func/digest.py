"""Short names of what values are, to know them again."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest"]


def digest(value: Any) -> str:
    """Return a name that two values share only if they are equal: structure, numbers, strings, every bit of arrays.

    Of other objects only the class counts.

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
        _say(f"dict {len(value)}", found)
        for key in sorted(value, key=repr):
            _say(repr(key), found)
            _add(value[key], found)
    elif isinstance(value, (list, tuple)):
        _say(f"list {len(value)}", found)
        for item in value:
            _add(item, found)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        _say(repr(value), found)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array of NumPy
        _say(f"{value.dtype} {value.shape}", found)
        found.update(value.tobytes())
    else:  # of which nothing is known that would be the same in another process
        _say(type(value).__qualname__, found)


def _say(text: str, found: Any) -> None:
    """Add a text with its length, so that two in a row are not another two."""
    content = text.encode()
    found.update(f"{len(content)}:".encode())
    found.update(content)


def _add_tensor(tensor: Tensor, found: Any) -> None:
    _say(f"{tensor.dtype} {tuple(tensor.shape)}", found)
    if tensor.layout != torch.strided:
        tensor = tensor.detach().to_dense()
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = flat.numel() * flat.element_size()
    if size:
        found.update((ctypes.c_char * size).from_address(flat.data_ptr()))
