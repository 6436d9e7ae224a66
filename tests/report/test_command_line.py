from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import secorder_func
from secorder_func.__main__ import main
from secorder_func.report import demo, results
from secorder_func.report.progress import make_console

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def quick(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the demonstration as a user would, into a folder that is not there yet, with brackets in its name."""
    output = tmp_path_factory.mktemp("demo") / "new [folder]"
    command = [sys.executable, "-W", "error::UserWarning", "-m", "secorder_func"]
    done = subprocess.run(
        [*command, "--quick", "--output", str(output)], capture_output=True, text=True, check=False
    )
    return done, output


def test_without_a_command_the_demo_runs_and_all_checks_hold(quick: Any) -> None:
    done, _ = quick
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "11 of 11 checks hold" in done.stdout


def test_the_table_names_what_was_measured(quick: Any) -> None:
    done, _ = quick
    for name in (
        "product H v",
        "last layer's block of H",
        "cosine of H v and G v",
        "trace of G",
        "trace of H, estimated",
        "3 largest eigenvalues of H",
        "smallest eigenvalue of H",
        "traces of 256 samples",
        "the most curved sample",
        "the model after all this",
        "The least curved digits",
        "Read next",
    ):
        assert name in done.stdout


def test_a_log_has_no_control_characters_and_is_not_too_wide(quick: Any) -> None:
    lines = quick[0].stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert max(len(line) for line in lines if not line.startswith("Picture")) <= 120


def test_the_picture_is_where_the_output_says(quick: Any) -> None:
    done, output = quick
    path = output / "demo.png"
    assert f"Picture: {path}" in done.stdout
    assert path.read_bytes().startswith(PNG)


def test_signs_that_the_encoding_lacks_do_not_stop_the_demo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    make_console().print("1 ± 2, in [folder]")
    sys.stdout.flush()
    assert written.getvalue().splitlines() == [b"1 ? 2, in [folder]"]


def test_main_runs_the_demo_and_returns_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--quick", "--seed", "1", "--output", str(tmp_path)]) == 0
    assert "checks hold" in capsys.readouterr().out
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_a_check_that_does_not_hold_is_shown_and_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo, "rows", lambda r: results.rows(replace(r, block=0.5, untouched=False))
    )
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "9 of 11 checks hold" in out
    assert out.count("OFF") == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"secorder_func {secorder_func.__version__}"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "demo" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["dance"])
    assert "invalid choice: 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"), [("rich", "rich"), ("sklearn", "scikit-learn"), ("scipy", "SciPy")]
)
def test_a_missing_extra_is_said_in_one_line(
    module: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--quick"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"python -m secorder_func demo needs {package}, which is not installed. "
        "Install it with: pip install 'secorder-func[report]'.\n"
    )


def test_a_folder_that_cannot_be_made_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    assert main(["demo", "--quick", "--output", str(taken)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(taken) in captured.err
    assert captured.err.count("\n") == 1


def test_importing_the_library_imports_nothing_that_only_the_report_needs() -> None:
    heavy = {"rich", "matplotlib", "sklearn", "scipy"}
    code = f"import sys, secorder_func; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
