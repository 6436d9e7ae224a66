from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

# Nothing that a browser does by itself in the background may disturb what is recorded.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")  # not longer: Playwright's event loop is in the way of other tests'
def browser() -> Iterator[Any]:
    """Start the system's Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the path")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()
