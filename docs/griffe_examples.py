"""Give the examples of short docstrings the heading that mkdocstrings looks for.

A docstring of one paragraph and one example has no `Examples` section in the source, where the heading would be noise;
without it the site would read `>>>` as a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIRST_PROMPT = re.compile(r"^>>> ", re.MULTILINE)


class Examples(griffe.Extension):
    """Insert the heading before the first prompt of a docstring that has none."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None or "Examples\n-----" in obj.docstring.value:
            return
        obj.docstring.value = _FIRST_PROMPT.sub(
            "Examples\n--------\n>>> ", obj.docstring.value, count=1
        )
