"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["write_whole"]


def write_whole(content: Any, path: Path, part: Path) -> None:
    """Write a file whole or not at all, by way of another one beside it."""
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
