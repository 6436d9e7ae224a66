from __future__ import annotations

import io
import os
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


# --------------------------------------------------------------------------------------- verify

USER_MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

value = 3

def module():
    return nn.Linear(4, 3), F.cross_entropy, torch.randn(8, 4), torch.randint(3, (8,))

def loss():
    return lambda p, x: torch.tanh(x @ p).square().mean(), torch.randn(4), torch.randn(8, 4)

def loader():
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))
    return nn.Linear(4, 3), F.cross_entropy, torch.utils.data.DataLoader(data, batch_size=5)

def one_batch():
    return nn.Linear(4, 3), F.cross_entropy, (torch.randn(8, 4), torch.randint(3, (8,)))

def batches_of_loss():
    return lambda p, x: torch.tanh(x @ p).square().mean(), torch.randn(4), [(torch.randn(8, 4),)]

def of_a_dict():
    return lambda p, d: (d["x"] @ p).square().mean(), torch.randn(4), {"x": torch.randn(8, 4)}

def no_batches():
    return nn.Linear(4, 3), F.cross_entropy, []

def kink():
    return lambda p: p.relu().sum(), torch.zeros(3)

def nothing():
    pass

def too_few():
    return nn.Linear(4, 3), F.cross_entropy

def only_f():
    return [lambda p: p.sum()]

def not_callable():
    return torch.ones(2), 3

def frozen():
    return nn.Linear(4, 3).requires_grad_(False), F.cross_entropy, torch.randn(8, 4), torch.ones(8)

def numbers():
    return lambda p: p, [1.0]

def raises():
    return 1 / 0

def takes_one(size):
    return nn.Linear(size, 3), F.cross_entropy, []
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder with a user's module, which no other test imports."""
    (tmp_path / "user_problem.py").write_text(USER_MODULE)
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "no_python.py").write_text("def f(:\n")
    (tmp_path / "of_torch.py").write_text("from torch import relu, tanh\n")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_folder" / "it.py").write_text("def f():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    # As for an installed command: the current folder is not on the path.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "user_problem", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "function", ["module", "loss", "loader", "one_batch", "batches_of_loss", "of_a_dict"]
)
def test_verify_of_a_good_problem_returns_zero(
    function: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    assert main(["verify", f"user_problem:{function}"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"user_problem:{function}\n\nAll is well: 11 checks passed.\n")
    assert captured.err == ""
    assert sys.path == path


def test_verify_of_a_broken_problem_returns_one_and_names_the_cause(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "user_problem:kink"]) == 1
    assert "on a kink of the loss (relu)" in " ".join(capsys.readouterr().out.split())


def test_verify_takes_a_tolerance_and_a_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for seed in ("1", "1", "2"):
        assert main(["verify", "user_problem:loss", "--seed", seed, "--rtol", "0.001"]) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]
    assert "1e-03 allowed" in reports[0]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("user_problem", "expected package.module:function, with one colon"),
        ("user_problem.py:loss", "Write user_problem:loss, in the file's folder"),
        ("no_such_module:f", "there is no module no_such_module. Run the command in the folder"),
        ("needs_more:f", "importing needs_more raises ModuleNotFoundError"),
        ("no_python:f", "importing no_python raises SyntaxError"),
        ("user_problem:los", "user_problem has no function los. Did you mean loss?"),
        (
            "user_problem:zzz",
            "has no function zzz. It has module, loss, loader, one_batch, batches",
        ),
        ("of_torch:zzz", "of_torch has no function zzz. It defines no function"),
        (
            "a_folder:f",
            "a_folder, not a module. Run the command inside of it, or name a_folder.it:f",
        ),
        ("a_folder:g", "not a module. Run the command inside of it, or name a_folder.FILE:g"),
        ("user_problem:value", "value must be a function without arguments, got int"),
        ("user_problem:raises", "raises ZeroDivisionError: division by zero\nin raises"),
        ("user_problem:nothing", "(f, params, batches) or (model, loss_fn, batches), got nothing"),
        ("user_problem:not_callable", "got (Tensor, int)"),
        ("user_problem:only_f", "or (model, loss_fn, batches), got (function)"),
        (
            "user_problem:too_few",
            "the data are missing: expected (model, loss_fn, batches), got (Lin",
        ),
        ("user_problem:takes_one", "takes_one must be a function without arguments: missing a req"),
        ("user_problem:no_batches", "there are no batches"),
        ("user_problem:frozen", "no parameter of the model requires a gradient"),
        ("user_problem:numbers", "verify: every leaf of params must be a tensor"),
    ],
)
def test_a_problem_that_cannot_be_had_is_said_and_returns_two(
    target: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", target]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_verify_without_a_function_checks_the_model_of_the_demo(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "All is well: 11 checks passed." in out
    assert "Your own problem: python -m secorder_func verify package.module:function" in out


def test_verify_of_a_users_function_needs_torch_and_optree_only(folder: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('scipy', 'matplotlib', 'rich', 'sklearn', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from secorder_func.__main__ import main\n"
        "sys.exit(main(['verify', 'user_problem:loss']))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    root = Path(secorder_func.__file__).parents[1]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "All is well" in done.stdout


def test_verify_without_the_extra_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["verify"]) == 2
    assert "needs scikit-learn, which is not installed" in capsys.readouterr().err
