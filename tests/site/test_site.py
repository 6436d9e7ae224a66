"""The built site in a browser: it asks nobody else, shows what it should, and can be read anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag
from urllib.request import urlopen

import pytest

from tests.site.browsing import PHONE, served, visiting

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
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site into a temporary folder and serve it."""
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
    with served(folder) as origin:
        yield origin


@pytest.mark.parametrize("path", PAGES)
def test_a_page_asks_nobody_else_and_has_all_that_it_asks_for(
    browser: Any, site: str, path: str
) -> None:
    with visiting(browser, site) as visit:
        visit.go(path)
        assert visit.not_loaded() == []
        assert visit.outside == []
        assert visit.complaints == []


@pytest.mark.parametrize("path", WITH_MATHS)
def test_formulas_are_rendered(browser: Any, site: str, path: str) -> None:
    with visiting(browser, site) as visit:
        visit.go(path)
        assert visit.page.locator("article .katex").count() > 0
        assert visit.page.locator("article .katex-error").count() == 0
        unrendered = "e => [...e].filter(s => !s.querySelector('.katex')).map(s => s.textContent)"
        assert visit.page.locator("article .arithmatex").evaluate_all(unrendered) == []


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


@pytest.mark.parametrize("path", PAGES)
def test_a_page_does_not_scroll_sideways_on_a_phone(browser: Any, site: str, path: str) -> None:
    with visiting(browser, site, width=PHONE) as visit:
        visit.go(path)
        assert visit.too_wide() == []


def test_links_within_the_site_lead_somewhere(browser: Any, site: str) -> None:
    links = set()
    with visiting(browser, site) as visit:
        for path in PAGES:
            visit.go(path)
            links |= set(visit.page.locator("a[href]").evaluate_all("e => e.map(a => a.href)"))
    inside = {urldefrag(link) for link in links if link.startswith(site)}
    assert len({link.url for link in inside}) > 30

    anchors = {}
    for address in {link.url for link in inside}:
        with urlopen(address) as response:
            assert response.status == 200
            text = response.read().decode(errors="replace")
        anchors[address] = set(re.findall(r'\b(?:id|name)="?([^"\s>]+)', text))
    nowhere = [
        f"{link.url}#{link.fragment}"
        for link in inside
        if link.url.endswith(".html")
        and link.fragment
        and link.fragment != "__codelineno"
        and unquote(link.fragment) not in anchors[link.url]
    ]
    assert nowhere == []
