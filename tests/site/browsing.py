"""A visit to a page: what it asked for, what it complained about, and what can be read on it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

PHONE = 390
DESKTOP = 1400

# The ratio of WCAG, of what is painted: colours are mixed by a canvas, whatever notation they are in.
_CONTRASTS = """
selector => {
  const canvas = document.createElement("canvas")
  const paint = canvas.getContext("2d", { willReadFrequently: true })
  canvas.width = canvas.height = 1
  const luminance = ([r, g, b]) => [r, g, b]
    .map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const painted = colours => {
    paint.fillStyle = "white"
    paint.fillRect(0, 0, 1, 1)
    for (const colour of colours) {
      paint.fillStyle = colour
      paint.fillRect(0, 0, 1, 1)
    }
    return luminance(paint.getImageData(0, 0, 1, 1).data)
  }
  const seen = [...document.querySelectorAll(selector)]
    .filter(e => e.checkVisibility() && e.textContent.trim())
  return seen.map(e => {
    const behind = []
    for (let at = e; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor)
    const back = painted(behind), front = painted([...behind, getComputedStyle(e).color])
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05)
    return [ratio, `${e.tagName.toLowerCase()}: ${e.textContent.trim().slice(0, 40)}`]
  })
}
"""

_NOT_LOADED = """
() => [
  ...[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
  ...[...document.querySelectorAll("link[rel=stylesheet]")].filter(l => !l.sheet).map(l => l.href),
]
"""

_TOO_WIDE = """
() => {
  const page = document.scrollingElement
  return page.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => `${e.tagName.toLowerCase()}.${e.className}: ${e.getBoundingClientRect().right}`)
    .slice(0, 8).concat(`the page: ${page.scrollWidth} of ${innerWidth}`)
}
"""


# Rendered formulas, and what should have been one: with KaTeX's mark of an error, or as it was written.
_FORMULAS = """
() => {
  const article = document.querySelector("article") ?? document.body
  const written = element => {
    const copy = element.cloneNode(true)
    copy.querySelectorAll("code, pre, script, .katex").forEach(e => e.remove())
    return copy.textContent
  }
  const failed = [...article.querySelectorAll(".katex-error")].map(e => e.textContent)
  const left = [...article.querySelectorAll("p, li, td, th, h1, h2, h3")]
    .map(written)
    .filter(text => /\\\\[(\\[]|\\$[^$\\s][^$]*\\$/.test(text))
  return [article.querySelectorAll(".katex").length, [...failed, ...left]]
}
"""


@dataclass
class Visit:
    """An open page, and everything that went wrong on it so far."""

    page: Any
    origin: str
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def go(self, path: str) -> None:
        """Open a page, and wait until its scripts have run and it has all that it asks for."""
        self.page.goto(f"{self.origin}/{path}", wait_until="networkidle")

    def not_loaded(self) -> list[str]:
        """Return the images and style sheets that are not there."""
        self.page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
        loaded = "() => [...document.images].every(i => i.complete)"
        self.page.wait_for_function(loaded)
        return list(self.page.evaluate(_NOT_LOADED))

    def forget(self) -> None:
        """Begin to record anew, for another page."""
        self.outside.clear()
        self.complaints.clear()

    def formulas(self) -> tuple[int, list[str]]:
        """Return how many formulas are rendered, and the texts in which one is not."""
        count, unrendered = self.page.evaluate(_FORMULAS)
        return int(count), [text.strip()[:80] for text in unrendered]

    def too_wide(self) -> list[str]:
        """Return what makes the page scroll sideways."""
        return list(self.page.evaluate(_TOO_WIDE))

    def hard_to_read(self, selector: str, least: float = 4.5) -> list[str]:
        """Return the visible texts whose contrast with what is behind them is too small."""
        found = self.page.evaluate(_CONTRASTS, selector)
        assert found, f"nothing to read at {selector}"
        return [f"{ratio:.2f}, {what}" for ratio, what in found if ratio < least]


@contextmanager
def visiting(
    browser: Any,
    origin: str,
    *,
    width: int = DESKTOP,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Visit]:
    """Open an empty page that reaches nothing but ``origin``."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    visit = Visit(page, origin)

    def only_ours(route: Any) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(origin).netloc:
            route.continue_()
        else:
            visit.outside.append(route.request.url)
            route.abort()

    def heard(message: Any) -> None:
        if message.type == "error":
            visit.complaints.append(f"console: {message.text}")

    def answered(response: Any) -> None:
        if response.status >= 400:
            visit.complaints.append(f"{response.status}: {response.url}")

    context.route("**/*", only_ours)
    page.on("console", heard)
    page.on("pageerror", lambda error: visit.complaints.append(f"error: {error}"))
    page.on("response", answered)
    try:
        yield visit
    finally:
        context.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; return its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
