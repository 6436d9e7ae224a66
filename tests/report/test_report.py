"""`python -m secorder_func report`: the numbers, the page, and what happens when something does not work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secorder_func
from secorder_func.__main__ import main
from secorder_func.errors import ArgumentError
from secorder_func.report import measure, write_report
from secorder_func.report.finding import Number
from secorder_func.report.outcome import Report
from secorder_func.report.parts import PARTS
from secorder_func.report.svg import svg_of
from tests import oracles

NAMES = ["loss", "trace", "eigenvalues", "density", "layers", "samples", "surface"]

USER_MODULE = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from secorder_func import Batches

def data(count=10):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)

def module():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(*data()), batch_size=4)

def squares(p, x):
    return (torch.tanh(x @ p["w"]) ** 2).mean() - (p["b"] ** 2).sum()

def start():
    x, _ = data()
    return {"w": x[0] / 2, "b": x[1, :2]}

def loss():
    return squares, start(), (data()[0],)

def batches():
    x, _ = data()
    return squares, start(), [(x[:6],), (x[6:],)]

def given_batches():
    x, _ = data()
    f = lambda p, x: (torch.tanh(x @ p) ** 2).sum()
    return f, x[0] / 2, Batches([(x[:6],), (x[6:],)], reduction="sum")

def images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 3)).double()
    x = torch.arange(450, dtype=torch.float64).reshape(6, 3, 5, 5).sin()
    return model, nn.CrossEntropyLoss(), (x, torch.arange(6) % 3)

def no_data():
    return (lambda p: (p ** 4).sum()), torch.tensor([1.0, 2.0, -1.0]), ()

def norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    return model, nn.CrossEntropyLoss(), data()

def slow():
    def f(p, x):
        time.sleep(0.01)
        return squares(p, x)
    x, _ = data()
    return f, start(), [(x[:5],), (x[5:],)]

def wrong_reduction():
    f, params, batches = given_batches()
    x, _ = data()
    return f, params, [(x[:6],), (x[6:],)]

def list_of_tensors():
    return (lambda p, x, y: ((x @ p - y) ** 2).mean()), torch.ones(4).double(), list(data())

def vector_loss():
    return (lambda p, x: x @ p), torch.ones(4).double(), (data()[0],)

def no_batches():
    return (lambda p, x: x.sum() * p.sum()), torch.ones(4), []

def only_module():
    return nn.Linear(2, 2), nn.CrossEntropyLoss()

def number():
    return 3

def text():
    return (lambda p, x: p.sum()), torch.ones(2), "batches"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user")
    (path / "report_problem.py").write_text(USER_MODULE)
    return path


@pytest.fixture
def problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be where the user's module is; yield it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, "report_problem", raising=False)
    return __import__("report_problem")


def _run(target: str | None, output: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    of = [] if target is None else ["--problem", f"report_problem:{target}"]
    code = main(["report", *of, "--quick", "--output", str(output), *options])
    page = (output / "report.html").read_text(encoding="utf-8")
    return code, json.loads((output / "report.json").read_text(encoding="utf-8")), page


@pytest.fixture(scope="module")
def digits(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """Report on the digits as a user would."""
    output = tmp_path_factory.mktemp("report") / "new [folder]"
    arguments = ["report", "--quick", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "secorder_func", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return done, numbers, (output / "report.html").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------- the page


class _Page(HTMLParser):
    """What a page would load, and what it runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action", "poster"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.tags.append("script")
            if name == "id":
                self.ids.append(value or "")


def test_the_page_loads_nothing_and_runs_nothing(digits: Any) -> None:
    page = _Page(digits[2])
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(where.startswith(("#", "data:image/png;base64,")) for where in page.loads)
    for where in re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", digits[2]):
        assert where[0].startswith("#")
    outside = set(re.findall(r"https?://[^\"'\s<]*", digits[2]))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_reference_within_the_page_has_one_target(digits: Any) -> None:
    page = _Page(digits[2])
    assert len(set(page.ids)) == len(page.ids)
    assert {where[1:] for where in page.loads if where.startswith("#")} <= set(page.ids)


def test_the_page_has_every_part_with_a_figure_and_how_to_read_it(digits: Any) -> None:
    _, numbers, page = digits
    assert list(numbers["parts"]) == NAMES
    sections = page.split("<section>")
    for part in PARTS:
        (section,) = (s for s in sections if f'id="{part.name}"' in s)
        assert "<svg" in section
        assert part.reading.split(".")[0].replace("'", "&#39;") in section
    assert "the most and the least curved samples" in page
    assert page.count("data:image/png") == 8


def test_text_of_figures_has_the_colour_of_the_page(digits: Any) -> None:
    assert "prefers-color-scheme: dark" in digits[2]
    for figure in re.findall(r"<svg.*?</svg>", digits[2], flags=re.DOTALL):
        texts = re.findall(r"<text.*?</text>", figure, flags=re.DOTALL)
        assert texts
        assert all("currentColor" in text for text in texts)


def test_every_figure_has_labelled_axes(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, matplotlib.figure.Figure]] = []

    def kept(draw: Any, name: str) -> str:
        seen.append((name, draw()))
        return svg_of(draw, name)

    monkeypatch.setattr(measure, "svg_of", kept)
    assert _run("images", tmp_path)[0] == 0
    assert len(seen) == 8
    for name, figure in seen:
        for axes in figure.axes:
            if axes.get_label() == "<colorbar>":
                assert axes.get_ylabel() == "loss"
            elif "curved samples" in name:
                assert axes.get_xlabel() or not axes.get_visible()
            else:
                assert axes.get_xlabel(), name
                assert axes.get_ylabel(), name


def test_equal_numbers_give_equal_pages_but_for_times(tmp_path: Path, problem: Any) -> None:
    pages, numbers = [], []
    for name in ("a", "b"):
        code, found, page = _run("loss", tmp_path / name, "--seed", "3")
        assert code == 0
        pages.append(re.sub(r"\d+\.\d s", "", page))
        numbers.append({n: part["numbers"] for n, part in found["parts"].items()})
    assert numbers[0] == numbers[1]
    assert pages[0] == pages[1]
    _, other, _ = _run("loss", tmp_path / "c", "--seed", "4")
    assert other["parts"]["trace"]["numbers"] != numbers[0]["trace"]


def test_the_terminal_shows_every_number_with_its_error_and_where_the_files_are(
    digits: Any,
) -> None:
    done, numbers, page = digits
    trace = numbers["parts"]["trace"]["numbers"]
    shown = str(Number("", trace["trace"], trace["standard_error"]))
    for text in (done.stdout, page):
        plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        assert f"trace of the Hessian {shown}" in plain
        assert "largest eigenvalue" in text
    assert "report.html" in done.stdout
    assert done.stderr == ""
    assert max(len(line) for line in done.stdout.splitlines() if "Written" not in line) <= 120


def test_the_json_says_what_was_measured_and_how(digits: Any) -> None:
    _, numbers, page = digits
    assert numbers["schema"] == 1
    assert numbers["problem"] == {
        "num_parameters": 610,
        "num_samples": 256,
        "num_batches": 1,
        "dtype": "float64",
        "device": "cpu",
    }
    assert numbers["settings"]["num_probes"] == 16
    assert numbers["versions"]["torch"] == torch.__version__
    assert "610 parameters, 256 samples, float64, cpu" in page
    assert torch.__version__ in page
    assert all(part["seconds"] > 0 for part in numbers["parts"].values())
    assert not numbers["interrupted"]
    assert numbers["missing"] == []


# ------------------------------------------------------------------------------- the numbers


def _checked(numbers: dict[str, Any], H: torch.Tensor, loss: float, gradient: Any) -> None:
    parts = {name: part["numbers"] for name, part in numbers["parts"].items()}
    assert parts["loss"]["loss"] == pytest.approx(loss, rel=1e-10)
    norm = float(oracles.flat(gradient).norm())
    assert parts["loss"]["gradient_norm"] == pytest.approx(norm, rel=1e-9)
    trace = parts["trace"]
    error = trace["standard_error"]
    assert error < 0.5 * float(H.norm())
    assert abs(trace["trace"] - float(H.trace())) <= 5 * error + 1e-10
    values = torch.linalg.eigvalsh(H)
    k = len(parts["eigenvalues"]["largest"]["eigenvalues"])
    assert k == min(3, len(H) // 2)
    assert parts["eigenvalues"]["largest"]["eigenvalues"] == pytest.approx(
        values.flip(0)[:k].tolist(), abs=1e-6
    )
    assert parts["eigenvalues"]["smallest"]["eigenvalues"] == pytest.approx(
        values[:k].tolist(), abs=1e-6
    )
    density = parts["density"]["hessian"]
    area = torch.trapezoid(torch.tensor(density["density"]), torch.tensor(density["points"]))
    assert float(area) == pytest.approx(1, abs=0.02)
    layers = parts["layers"]["layers"]
    total = sum(layer["trace"] for layer in layers)
    spread = sum(layer["standard_error"] for layer in layers)
    assert abs(total - float(H.trace())) <= 5 * spread + 1e-10


@pytest.mark.parametrize("target", ["loss", "batches"])
def test_numbers_of_a_loss_are_those_of_its_dense_hessian(
    target: str, tmp_path: Path, problem: Any
) -> None:
    code, numbers, _ = _run(target, tmp_path)
    assert code == 0
    f, params, _ = problem.loss()
    x = problem.data()[0]
    H = oracles.hessian(f, params, x)
    _checked(numbers, H, float(f(params, x)), oracles.gradient(f, params, x))
    assert numbers["problem"]["num_samples"] == 10
    assert numbers["problem"]["num_batches"] == (2 if target == "batches" else 1)
    assert numbers["parts"]["density"]["numbers"]["gauss_newton"] is None
    singles = [float(oracles.hessian(f, params, row[None]).trace()) for row in x]
    samples = numbers["parts"]["samples"]["numbers"]
    some = singles if target == "loss" else singles[:6]
    assert samples["traces"] == pytest.approx(some, rel=1e-9)
    order = sorted(range(len(some)), key=lambda i: -some[i])
    assert samples["most_curved"][0]["sample"] == order[0]
    assert samples["least_curved"][0]["sample"] == order[-1]


def test_numbers_of_a_module_are_those_of_its_dense_hessian_and_gauss_newton_matrix(
    tmp_path: Path, problem: Any
) -> None:
    code, numbers, page = _run("module", tmp_path)
    assert code == 0
    torch.manual_seed(0)  # as the command does
    model, _, _ = problem.module()
    x, y = problem.data()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def model_fn(p: Any, inputs: Any) -> Any:
        return torch.func.functional_call(model, p, (inputs,))

    def f(p: Any, inputs: Any, targets: Any) -> Any:
        return F.cross_entropy(model_fn(p, inputs), targets)

    H = oracles.hessian(f, params, x, y)
    _checked(numbers, H, float(f(params, x, y)), oracles.gradient(f, params, x, y))
    assert numbers["problem"]["num_batches"] == 3
    assert "training mode" in page
    G = oracles.ggn(model_fn, F.cross_entropy, params, x, y)
    points = numbers["parts"]["density"]["numbers"]["gauss_newton"]["points"]
    width = numbers["parts"]["density"]["numbers"]["gauss_newton"]["width"]
    assert points[-1] - 4 * width == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-3)


def test_sums_over_given_batches_are_sums(tmp_path: Path, problem: Any) -> None:
    code, numbers, _ = _run("given_batches", tmp_path)
    assert code == 0
    f, params, _ = problem.given_batches()
    x = problem.data()[0]
    assert numbers["parts"]["loss"]["numbers"]["loss"] == pytest.approx(float(f(params, x)))


def test_the_slice_goes_through_the_parameters_along_eigenvectors(
    tmp_path: Path, problem: Any
) -> None:
    _, numbers, page = _run("loss", tmp_path)
    found = numbers["parts"]["surface"]["numbers"]
    losses, places = torch.tensor(found["losses"]), found["coordinates"]
    assert places[5] == pytest.approx(0, abs=1e-12)
    assert float(losses[5, 5]) == pytest.approx(numbers["parts"]["loss"]["numbers"]["loss"])
    assert found["directions"] == "eigenvectors"
    assert "along the eigenvectors of the two largest eigenvalues" in page
    step = places[6]
    top = numbers["parts"]["eigenvalues"]["numbers"]["largest"]["eigenvalues"][0]
    second = float(losses[6, 5] - 2 * losses[5, 5] + losses[4, 5]) / step**2
    assert second == pytest.approx(top, rel=0.2)


def test_probes_and_eigenvalues_can_be_chosen(tmp_path: Path, problem: Any) -> None:
    code, numbers, _ = _run("module", tmp_path, "--probes", "24", "--eigenvalues", "2")
    assert code == 0
    assert numbers["parts"]["trace"]["numbers"]["num_matvecs"] == 24
    assert len(numbers["parts"]["eigenvalues"]["numbers"]["largest"]["eigenvalues"]) == 2


def test_numbers_that_are_not_finite_are_null() -> None:
    report = Report("", "", {"a": float("nan")}, {}, {"b": [float("inf"), 1.0]}, [])
    assert report.as_json()["settings"] == {"a": None}
    assert report.as_json()["problem"] == {"b": [None, 1.0]}


# --------------------------------------------------------------------- what does not work


def test_a_part_that_does_not_apply_says_why_and_is_no_failure(
    tmp_path: Path, problem: Any
) -> None:
    code, numbers, page = _run("no_data", tmp_path)
    assert code == 0
    samples = numbers["parts"]["samples"]
    assert (samples["status"], samples["numbers"]) == ("not applicable", None)
    assert "Does not apply: the loss takes no data." in page


def test_a_part_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, problem: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, numbers, page = _run("norm", tmp_path)
    assert code == 1
    status = {name: part["status"] for name, part in numbers["parts"].items()}
    assert status == {**dict.fromkeys(NAMES, "done"), "samples": "failed"}
    assert "batch normalisation" in numbers["parts"]["samples"]["reason"]
    assert "Failed: Curvature of single samples." in page.split("</header>")[0]
    assert "Curvature of single samples: failed." in capsys.readouterr().out


def test_without_eigenvectors_the_directions_are_random(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secorder_func.report.parts import spectrum

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no <eigenvalues> today")

    monkeypatch.setattr(spectrum, "eigsh", fails)
    code, numbers, page = _run("module", tmp_path)
    assert code == 1
    assert numbers["parts"]["surface"]["numbers"]["directions"] == "random"
    assert "no &lt;eigenvalues&gt; today" in page


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("report_problem", "expected package.module:function, with one colon"),
        ("report_problem.py:loss", "Write report_problem:loss, in the file's folder"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("report_problem:los", "report_problem has no function los. Did you mean loss?"),
        (
            "report_problem:number",
            "expected (f, params, batches) or (model, loss_fn, batches), got int",
        ),
        ("report_problem:only_module", "got (Linear, CrossEntropyLoss), a module without data"),
        ("report_problem:text", "the batches must be a tuple for one batch"),
        ("report_problem:no_batches", "there are no batches"),
        ("report_problem:vector_loss", "a tensor of one number, got shape (10,)"),
        ("report_problem:list_of_tensors", "The first batch is one tensor; pass a tuple"),
        ("report_problem:wrong_reduction", "is not the mean of the losses of its first"),
    ],
)
def test_a_problem_that_cannot_be_had_is_said_in_one_line_and_returns_two(
    target: str, said: str, tmp_path: Path, problem: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--problem", target, "--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_missing_extra_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", "--quick"]) == 2
    assert "needs Jinja2, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--probes", "0"], ["--eigenvalues", "x"]])
def test_counts_are_checked(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["report", *options])
    assert "expected a whole number from 1 on" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "--problem my_package.my_module:my_function" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run("loss", tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def broken(file: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", broken)
    code = main(
        ["report", "--problem", "report_problem:loss", "--quick", "--output", str(tmp_path)]
    )
    assert code == 2
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


# ------------------------------------------------------------------------------- from Python


def test_from_python_it_is_the_same_report_and_prints_nothing(
    tmp_path: Path, problem: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, of_command, _ = _run("module", tmp_path / "command", "--probes", "5")
    capsys.readouterr()
    torch.manual_seed(0)  # as the command does before it makes the model
    model, loss_fn, loader = problem.module()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    page = write_report(
        model,
        loss_fn,
        loader,
        folder=tmp_path / "new" / "python",
        title="a <small> model",
        quick=True,
        num_probes=5,
    )
    assert page == tmp_path / "new" / "python" / "report.html"
    assert "Curvature of a &lt;small&gt; model" in page.read_text(encoding="utf-8")
    numbers = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    for name in NAMES:
        assert numbers["parts"][name]["numbers"] == of_command["parts"][name]["numbers"]
    assert numbers["settings"] == of_command["settings"]
    assert capsys.readouterr() == ("", "")
    assert all(bool((p == before[name]).all()) for name, p in model.state_dict().items())


def test_from_python_a_loss_has_the_name_of_its_function(tmp_path: Path, problem: Any) -> None:
    page = write_report(*problem.loss(), folder=str(tmp_path), quick=True)
    assert "Curvature of squares" in page.read_text(encoding="utf-8")


def test_from_python_bad_input_is_an_argument_error(tmp_path: Path, problem: Any) -> None:
    model, loss_fn, loader = problem.module()
    with pytest.raises(ArgumentError, match=r"write_report: expected \(f, params, batches\) or"):
        write_report(3, loss_fn, loader, folder=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="write_report: the batches must be a tuple for one"):
        write_report(model, loss_fn, "data", folder=tmp_path)
    with pytest.raises(ArgumentError, match="num_probes must be at least 1, got 0"):
        write_report(model, loss_fn, loader, folder=tmp_path, num_probes=0)
    assert list(tmp_path.iterdir()) == []


def test_from_python_a_part_that_fails_warns_and_the_others_go_on(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secorder_func.report.parts import spectrum

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no eigenvalues today")

    monkeypatch.setattr(spectrum, "eigsh", fails)
    with pytest.warns(UserWarning, match="eigenvalues failed.*no eigenvalues today") as caught:
        page = write_report(*problem.module(), folder=tmp_path, quick=True)
    assert caught[0].filename == __file__
    assert "A slice of the loss surface" in page.read_text(encoding="utf-8")


def test_from_python_ctrl_c_leaves_a_partial_report_and_is_raised(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secorder_func.report.parts import spectrum

    right = spectrum.eigsh

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return right(*args, **options)

    monkeypatch.setattr(spectrum, "eigsh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(*problem.module(), folder=tmp_path, quick=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Interrupted: this report is partial." in page


# ------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for a child")
def test_ctrl_c_in_the_middle_leaves_a_partial_report(folder: Path, tmp_path: Path) -> None:
    options = ["--problem", "report_problem:slow", "--output", str(tmp_path)]
    root = str(Path(secorder_func.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "secorder_func", "report", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip().startswith("trace"):  # that part has ended
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    status = [part["status"] for part in numbers["parts"].values()]
    assert status[0] == "done"
    assert status[1] in ("done", "partial")
    assert status[-1] == "missing"
    assert numbers["interrupted"]
    assert "surface" in numbers["missing"]
    header = (tmp_path / "report.html").read_text(encoding="utf-8").split("</header>")[0]
    assert "Interrupted: this report is partial. Missing parts:" in header
    assert "A slice of the loss surface" in header
    assert "Interrupted: this report is partial" in out


def test_an_interruption_within_a_part_keeps_what_it_had(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secorder_func.report.parts import spectrum

    right = spectrum.eigsh

    def interrupted(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(spectrum, "eigsh", interrupted)
    code, numbers, page = _run("module", tmp_path)
    assert code == 130
    part = numbers["parts"]["eigenvalues"]
    assert part["status"] == "partial"
    assert len(part["numbers"]["largest"]["eigenvalues"]) == 3
    assert numbers["missing"] == NAMES[3:]
    assert "Cut short, with what there was then: Largest and smallest eigenvalues." in page


# ------------------------------------------------------------------------------------- bench


def test_bench_outside_of_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--quick"]) == 2
    assert capsys.readouterr().err.startswith("The benches are in the repository")


def test_bench_of_a_checkout_gets_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    for name in ("__init__", "harness"):  # a package: else the one of this checkout would run
        (tmp_path / "bench" / f"{name}.py").write_text("")
    (tmp_path / "bench" / "__main__.py").write_text(
        "import pathlib, sys; pathlib.Path('given').write_text(' '.join(sys.argv[1:])); sys.exit(7)"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "trace", "--quick", "--threads", "1"]) == 7
    assert (tmp_path / "given").read_text() == "trace --quick --threads 1"


# ----------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.21, "12.35 ± 0.21"),
        (12.3456, None, "12.3456"),
        (2.0, float("inf"), "2 ± ?"),
        (float("nan"), 1.0, "not finite"),
        (0.0, 0.0, "0 ± 0"),
    ],
)
def test_a_number_has_the_digits_that_its_error_allows(
    value: float, error: float | None, text: str
) -> None:
    assert str(Number("", value, error)) == text


def test_inputs_that_look_like_images_are_drawn_as_such() -> None:
    from secorder_func.report.user import subject_of

    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    x = torch.rand(3, 1, 6, 5)
    model(x)
    subject = subject_of((model, F.cross_entropy, x, torch.zeros(3).long()), "t")
    picture = subject.picture(x[0])
    assert picture is not None
    assert picture.shape == (6, 5)
    assert (float(picture.min()), float(picture.max())) == (0, 1)
    colours = subject.picture(torch.rand(3, 6, 5))
    assert colours is not None
    assert colours.shape == (6, 5, 3)
    assert subject.picture(torch.rand(64)) is None
    assert subject.picture(torch.rand(2, 6, 5)) is None
