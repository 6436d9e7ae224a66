"""The built site in a browser: it asks nobody else, shows what it should, and can be read anywhere."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import DefragResult, unquote, urldefrag

import pytest

from tests.site.browsing import DESKTOP, PHONE, served, visiting

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [
    "index.html",
    "how-to/influence.html",
    "api/transforms.html",
    "notebooks/02-per-sample-curvature.html",
    "performance.html",
    "coverage.html",
]
WITH_MATHS = ["index.html", "how-to/influence.html", "notebooks/02-per-sample-curvature.html"]
TEXT = "article p, article li, article td, article th, article a:not(.headerlink), article pre"


@pytest.fixture(scope="module")
def built(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site into a temporary folder."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(built: Path) -> Iterator[str]:
    """Serve the built site."""
    with served(built) as origin:
        yield origin


@dataclass
class Sight:
    """What one visit to a page showed, on a phone."""

    path: str
    not_loaded: list[str]
    outside: list[str]
    complaints: list[str]
    too_wide: list[str]
    formulas: int
    unrendered: list[str]
    links: set[str]


@pytest.fixture(scope="module")
def sights(browser: Any, built: Path, site: str) -> list[Sight]:
    """Visit every page of the site once."""
    found = []
    with visiting(browser, site, width=PHONE) as visit:
        for path in pages_of(built):
            visit.forget()
            visit.go(path)
            formulas, unrendered = visit.formulas()
            found.append(
                Sight(
                    path,
                    visit.not_loaded(),
                    list(visit.outside),
                    list(visit.complaints),
                    visit.too_wide(),
                    formulas,
                    unrendered,
                    set(visit.page.locator("a[href]").evaluate_all("e => e.map(a => a.href)")),
                )
            )
    return found


def pages_of(folder: Path) -> list[str]:
    """Return the pages of a built site, without documents that are shown within a page."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    return sorted(path for path in found if not path.startswith("assets/") and path != "404.html")


def of_each(sights: list[Sight], what: str) -> dict[str, Any]:
    """Return what is wrong on the pages on which something is."""
    return {sight.path: getattr(sight, what) for sight in sights if getattr(sight, what)}


def test_every_page_of_the_navigation_is_visited(built: Path) -> None:
    pages = pages_of(built)
    named = re.findall(r"\S+\.(?:md|ipynb)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {str(Path(name).with_suffix(".html")) for name in named} == set(pages)
    assert set(PAGES) <= set(pages)


def test_pages_have_all_that_they_ask_for(sights: list[Sight]) -> None:
    assert of_each(sights, "not_loaded") == {}


def test_pages_ask_nobody_else(sights: list[Sight]) -> None:
    assert of_each(sights, "outside") == {}


def test_pages_have_nothing_to_complain_of(sights: list[Sight]) -> None:
    assert of_each(sights, "complaints") == {}


def test_pages_do_not_scroll_sideways_on_a_phone(sights: list[Sight]) -> None:
    assert of_each(sights, "too_wide") == {}


def test_formulas_are_rendered(sights: list[Sight]) -> None:
    assert of_each(sights, "unrendered") == {}
    assert of_each(sights, "formulas").keys() >= set(WITH_MATHS)


def test_the_search_finds_hvp(browser: Any, site: str) -> None:
    with visiting(browser, site) as visit:
        visit.go("index.html")
        field = visit.page.locator("input.md-search__input")
        field.click()  # the index is fetched when the field has the focus
        field.press_sequentially("hvp")
        found = visit.page.locator(".md-search-result__item")
        found.first.wait_for()
        assert "hvp" in found.first.inner_text()
        assert visit.outside == []
        assert visit.complaints == []


def test_the_search_finds_hvp_in_a_site_that_is_opened_as_a_file(browser: Any, built: Path) -> None:
    context = browser.new_context(viewport={"width": DESKTOP, "height": 900})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((built / "how-to" / "report.html").as_uri(), wait_until="networkidle")
    field = page.locator("input.md-search__input")
    field.click()
    field.press_sequentially("hvp")
    found = page.locator(".md-search-result__item")
    found.first.wait_for()
    assert "hvp" in found.first.inner_text()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


@pytest.mark.parametrize("path", PAGES)
def test_text_can_be_read_in_light_and_dark_and_buttons_change_between_them(
    browser: Any, site: str, path: str
) -> None:
    with visiting(browser, site) as visit:
        visit.go(path)
        scheme = visit.page.locator("body")
        for title, name in (("Dark", "slate"), ("Light", "default")):
            visit.page.locator(f"label[title={title}]").click()
            assert scheme.get_attribute("data-md-color-scheme") == name
            visit.page.wait_for_timeout(400)  # colours change gradually
            assert visit.hard_to_read(TEXT) == []


def test_code_is_copied_as_it_stands(browser: Any, site: str) -> None:
    with visiting(browser, site) as visit:
        visit.go("index.html")
        block = visit.page.locator("article .highlight").first
        block.hover()
        block.locator("button[data-md-type=copy]").click()
        copied = visit.page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == block.locator("code").inner_text().strip()
        assert "hvp(f)(params, v, torch.eye(2))" in copied


def test_links_within_the_site_lead_somewhere(built: Path, site: str, sights: list[Sight]) -> None:
    inside = {
        (sight.path, urldefrag(link.removeprefix(site).lstrip("/")))
        for sight in sights
        for link in sight.links
        if link.startswith(site)
    }
    assert len({target.url for _, target in inside}) > 40
    assert [
        f"{path}: {target.geturl()}" for path, target in inside if not leads(built, target)
    ] == []


@functools.cache
def anchors(page: Path) -> set[str]:
    """Return the names of all places in a page that a link can lead to."""
    return set(re.findall(r'\b(?:id|name)="?([^"\s>]+)', page.read_text(errors="replace")))


def leads(folder: Path, target: DefragResult) -> bool:
    """Tell whether a link within the site leads to a file, and to a place in it."""
    page = folder / (unquote(target.url) or "index.html")
    if not page.is_file():
        return False
    to_place = page.suffix == ".html" and target.fragment not in ("", "__codelineno")
    return not to_place or unquote(target.fragment) in anchors(page)
