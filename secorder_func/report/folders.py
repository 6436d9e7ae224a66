"""The folder of what is written: there and open for writing before anything is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["make_folder"]


def make_folder(folder: Path, where: str, option: str) -> None:
    """Make a folder if it is missing, and write something into it for a moment.

    Raises
    ------
    OSError
        It cannot be made, or cannot be written to; the message names the option that chooses another one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            f"{where}: cannot write into {str(folder)!r} ({reason}). Name another folder with {option}."
        ) from error
