"""What the site needs beyond its configuration: the notebooks' folder, and no request to anyone else's server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent

_OUTSIDE = re.compile(
    r"<script\b[^>]*>(?:(?!</script>).)*?https?://(?:(?!</script>).)*?</script>\s*"  # loaders
    r"|<script\b[^>]*\bsrc=\"(?:https?:[^\"]*)?\"[^>]*>\s*</script>\s*"  # and empty ones
    r"|<link\b[^>]*\bhref=\"https?:[^\"]*\"[^>]*\brel=\"(?:stylesheet|preconnect)\"[^>]*>\s*",
    re.DOTALL | re.IGNORECASE,
)


@event_priority(100)  # before mkdocs-jupyter, which turns notebooks into pages
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks, which live outside of the documentation's folder."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Strip the loaders that mkdocs-jupyter embeds (a diagram library, an empty script)."""
    return _OUTSIDE.sub("", output)
