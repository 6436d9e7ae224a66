"""Figures as inline SVG: equal numbers give equal text, and it is legible on light and on dark ground."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["svg_of"]

_INK = "#7b7c7d"
"""Stands for the colour of the text around a figure, which the page knows and matplotlib does not."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "axes.titlecolor": _INK,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg_of(draw: Callable[[], Figure], name: str) -> str:
    """Draw a figure and return it as an SVG element.

    Parameters
    ----------
    draw
        Makes the figure, whose text and axes get the colour of the text around it.
    name
        What it shows, for people who do not see it; also keeps its ids apart from those of other figures.
    """
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = draw()
        figure.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # It would hold for the whole page.
    text = text.replace("*{stroke-linejoin", f'svg[aria-label="{name}"] *{{stroke-linejoin')
    text = text.replace(_INK, "currentColor")
    text = _without_unused_ids(text)
    text = re.sub(r"'DejaVu Sans'[^\";]*", "system-ui, sans-serif", text)
    text = re.sub(r"\n\s*\n", "\n", text)
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="([^"]*)"', head.group())
    assert box is not None
    start = (
        f'<svg role="img" aria-label="{name}" viewBox="{box.group(1)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return start + text[head.end() :].strip()


def _without_unused_ids(text: str) -> str:
    """Take away ids that nothing refers to: those of several figures on a page are the same."""
    used = set(re.findall(r'(?:#)([\w-]+)(?=["\')])', text))
    return re.sub(
        r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", text
    )
