"""The HTML report in a browser: one file that asks nobody, in light and dark, wide and narrow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site.browsing import DESKTOP, PHONE, served, visiting

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Write the quick report of the digits into a temporary folder and serve it."""
    folder: Path = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "secorder_func", "report"]
    if subprocess.run([*command, "--help"], capture_output=True, check=False).returncode:
        pytest.skip("there is no command `report` yet")
    done = subprocess.run(
        [*command, "--quick", "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with served(folder) as origin:
        yield origin


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_report_asks_nobody_and_fits_and_can_be_read(
    browser: Any, report: str, width: int, scheme: Any
) -> None:
    with visiting(browser, report, width=width, scheme=scheme) as visit:
        visit.go("report.html")
        assert visit.not_loaded() == []
        assert visit.too_wide() == []
        assert visit.hard_to_read("p, li, td, th, h1, h2") == []
        assert visit.outside == []
        # A browser asks for an icon by itself, and the report is a single file.
        assert [said for said in visit.complaints if "favicon" not in said] == []
