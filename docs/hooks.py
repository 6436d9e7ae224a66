"""What the site needs beyond its configuration.

The notebooks' folder, no request to anyone else's server, and parameters that are documented together shown together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent

_OUTSIDE = re.compile(
    r"<script\b[^>]*>(?:(?!</script>).)*?https?://(?:(?!</script>).)*?</script>\s*"  # loaders
    r"|<script\b[^>]*\bsrc=\"(?:https?:[^\"]*)?\"[^>]*>\s*</script>\s*"  # and empty ones
    r"|<link\b[^>]*\bhref=\"https?:[^\"]*\"[^>]*\brel=\"(?:stylesheet|preconnect)\"[^>]*>\s*",
    re.DOTALL | re.IGNORECASE,
)

_HEADING = re.compile(r'<h[1-6] id="([^"]+)">(.*?)<a class="anchor-link"', re.DOTALL)


@event_priority(100)  # before mkdocs-jupyter, which turns notebooks into pages
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks, which live outside of the documentation's folder."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> None:
    """Name the sections of a notebook as its page does: the reader of notebooks leaves code out of their names."""
    if page.file.src_uri.endswith(".ipynb"):
        headings = _HEADING.findall(html)
        for item, (anchor, title) in zip(_flat(page.toc), headings, strict=True):
            item.id, item.title = anchor, re.sub(r"<[^>]+>", "", title)


def _flat(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield item
        yield from _flat(item.children)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Strip the loaders that mkdocs-jupyter embeds (a diagram library, an empty script)."""
    return _OUTSIDE.sub("", output)


class Together(griffe.Extension):
    """Show parameters that share a description, as `f, params, *args` do, in one line and not in one for each.

    The parser repeats the description and gives all of them the type of the first. Types are in the signature.
    """

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _join(func)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _join(cls)


def _join(documented: griffe.Object) -> None:
    sections = documented.docstring.parsed if documented.docstring else []
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            runs = groupby(section.value, key=lambda parameter: parameter.description)
            section.value = [_one(list(run)) for _, run in runs]


def _one(run: list[Any]) -> Any:
    if len(run) == 1:
        return run[0]
    names = ", ".join(parameter.name for parameter in run)
    return griffe.DocstringParameter(names, description=run[0].description)
