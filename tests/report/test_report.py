"""`python -m secorder_func report`: the numbers, the page, and what happens when something does not work."""

from __future__ import annotations

import html
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secorder_func
from secorder_func import LinearOperator, SpectralDensity, hutchinson_diagonal, spectral_density
from secorder_func.__main__ import main
from secorder_func.algorithms.krylov_spaces import KrylovSpaces
from secorder_func.errors import ArgumentError
from secorder_func.report import measure, write_report
from secorder_func.report.command import FULL, QUICK
from secorder_func.report.finding import Number, with_error
from secorder_func.report.outcome import Report
from secorder_func.report.parts import PARTS, rows, samples
from secorder_func.report.parts.layers import LAYERS, _clear
from secorder_func.report.parts.samples import SAMPLES
from secorder_func.report.parts.shares import share_between
from secorder_func.report.subject import Subject
from secorder_func.report.svg import svg_of
from secorder_func.report.user import subject_of
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

def wide():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return model, nn.CrossEntropyLoss(), data(20)

def shuffled():
    model, loss_fn, _ = module()
    loader = DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True)
    return model, loss_fn, loader

def flat():
    x, _ = data()
    return nn.Linear(4, 2).double(), nn.L1Loss(), (x, 10 + x[:, :2])

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
        assert section.count("<svg") == section.count('aria-label="Figure: ') > 0
        assert part.reading.split(".")[0].replace("'", "&#39;") in section
    assert "The most and the least curved of the first 128 of 256 samples." in page
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
            elif "the most and the least curved" in name:
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
    assert numbers["schema"] == 2
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
    assert samples["traces"] == pytest.approx(singles, rel=1e-9)
    order = sorted(range(10), key=lambda i: -singles[i])
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


# ------------------------------------------------- no number that is noise reads as a fact


def _of(part: str, numbers: dict[str, Any]) -> Any:
    return numbers["parts"][part]["numbers"]


def _plain(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page)).split())


def _key_of(page: str) -> str:
    return page.split('id="key"')[1].split("</section>")[0]


def _quadrature(d: torch.Tensor, v: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes and weights of one vector, by Rayleigh and Ritz over its Krylov space."""
    basis = v[:, None] / v.norm()
    for _ in range(steps - 1):
        w = d * basis[:, -1]
        for _ in range(3):
            w = w - basis @ (basis.T @ w)
        basis = torch.cat([basis, (w / w.norm())[:, None]], 1)
    values, vectors = torch.linalg.eigh(basis.T @ (d[:, None] * basis))
    return values, (vectors.T @ (basis.T @ v / v.norm())) ** 2


SPECTRA = {
    "uniform": torch.linspace(-1, 1, 300, dtype=torch.float64),
    "decaying": torch.logspace(-6, 0, 300, dtype=torch.float64),
    "of a network": torch.cat(
        [
            torch.logspace(-7, 0, 150, dtype=torch.float64),
            -torch.logspace(-7, -1, 100, dtype=torch.float64),
            torch.zeros(50, dtype=torch.float64),
        ]
    ),
    "of low rank": torch.cat([torch.zeros(280).double(), torch.linspace(0.5, 1, 20).double()]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 30])
def test_what_lanczos_steps_leave_open_is_bounded_for_every_vector(name: str, steps: int) -> None:
    d = SPECTRA[name]
    v = torch.randn(len(d), dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    if name == "of low rank":
        steps = min(steps, 12)
    nodes, weights = _quadrature(d, v, steps)
    density = SpectralDensity(nodes[None], weights[None], len(d), steps)
    for low, high in ((-math.inf, -0.01), (-0.01, 0.01), (0.3, math.inf), (-2, 0.7), (1.5, 2)):
        share = share_between(density, low, high)
        exact = float((v**2 / (v @ v))[(d >= low) & (d <= high)].sum())
        assert abs(share.value - exact) <= share.blur + 1e-9
        assert share.blur <= 0.5


@pytest.mark.parametrize("name", SPECTRA)
def test_shares_are_within_their_errors_of_those_of_the_dense_spectrum(name: str) -> None:
    d = SPECTRA[name]
    op = LinearOperator(lambda v: d * v, torch.zeros_like(d))
    exact = [float((d.abs() <= 0.01).double().mean()), float((d < -0.01).double().mean())]
    for vectors, steps in ((4, 24), (8, 48), (8, 5)):
        right = 0
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            density = spectral_density(op, vectors, num_steps=steps, generator=generator)
            shares = [
                share_between(density, -0.01, 0.01),
                share_between(density, -math.inf, -0.01),
            ]
            right += sum(
                abs(share.value - truth) <= 2 * share.error + 1e-9
                for share, truth in zip(shares, exact, strict=True)
            )
            if steps == 48:
                assert max(share.blur for share in shares) < 0.06
        assert right >= 18, (vectors, steps)


def test_shares_of_the_page_are_those_of_the_dense_hessian(tmp_path: Path, problem: Any) -> None:
    code, numbers, page = _run("wide", tmp_path)
    assert code == 0
    model, _, (x, y) = problem.wide()
    params = {name: p.detach() for name, p in model.named_parameters()}
    H = oracles.hessian(
        lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y), params
    )
    values = torch.linalg.eigvalsh(H)
    largest = float(values.abs().max())
    found = _of("density", numbers)
    assert found["largest_magnitude"] == pytest.approx(largest, rel=1e-6)
    for name, truth in (
        ("near_zero", (values.abs() <= 0.01 * largest).double().mean()),
        ("negative", (values < -0.01 * largest).double().mean()),
    ):
        error = found[f"share_{name}_standard_error"] + found[f"share_{name}_bound_of_steps"]
        assert abs(found[f"share_{name}"] - float(truth)) <= 2 * error
    key = _plain(_key_of(page))
    assert "share of eigenvalues near zero (|λ| ≤ 1 % of the largest)" in key
    assert "share clearly negative (λ < −1 % of the largest)" in key
    assert "a bound for what 24 Lanczos steps leave open" in key
    assert "From 4 random vectors of 24 Lanczos steps each." in _plain(page)


def test_a_density_that_was_cut_short_says_what_it_is_from_and_gives_no_key_numbers(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = KrylovSpaces._step

    def interrupted(self: KrylovSpaces) -> None:
        right(self)
        if self.done == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(KrylovSpaces, "_step", interrupted)
    code, numbers, page = _run("wide", tmp_path)
    assert code == 130
    assert numbers["parts"]["density"]["status"] == "partial"
    assert "share" not in _key_of(page)
    said = "From 4 random vectors of 5 Lanczos steps each. Cut short after 20 of 96 products"
    assert said in _plain(page)
    assert "The Gauss-Newton matrix was not come to." in page
    assert _of("density", numbers)["cut_short"]


def test_of_a_hessian_that_is_zero_there_are_no_shares(tmp_path: Path, problem: Any) -> None:
    code, numbers, page = _run("flat", tmp_path)
    assert code == 0
    assert "share" not in _key_of(page)
    assert "The Hessian is zero:" in page
    assert "Is the loss piecewise linear in the parameters?" in page
    assert "learning rate" not in page
    assert _of("density", numbers)["hessian"] is None


def _quadratic(A: torch.Tensor) -> Subject:
    """Return the subject whose Hessian is this matrix, half of its entries in either of two layers."""
    half = len(A) // 2
    params = {"a.w": torch.ones(half).double(), "b.w": torch.ones(len(A) - half).double()}

    def f(p: Any) -> Any:
        v = torch.cat([p["a.w"], p["b.w"]])
        return v @ A @ v / 2

    return Subject("t", f, params, (), None)


def _measured(part: Any, subject: Subject, settings: Any, seed: int = 0) -> Any:
    return part.measure(subject, settings, torch.Generator().manual_seed(seed), {})


def test_noise_of_the_diagonal_is_no_negative_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(400, 400, dtype=torch.float64, generator=generator)
    A = B @ B.T / 400 + 0.2 * (B + B.T)
    A = A - A.diag().diag() + 0.05 * torch.eye(400).double()  # no entry of the diagonal is negative
    found = _measured(LAYERS, _quadratic(A), replace(FULL, num_probes=48))
    (table,) = found.tables
    assert list(table.head) == ["layer", "parameters", "trace", "mean diagonal", "clearly negative"]
    assert [row[-1] for row in table.rows] == ["none resolved", "none resolved"]
    keys = set(found.numbers["layers"][0]["estimated_diagonal"])
    assert not keys & {"least", "greatest", "share_negative"}
    values = hutchinson_diagonal(_quadratic(A).hessian, 48).value["a.w"]
    assert float(values.min()) < -1  # what the column would have said


def test_entries_that_are_clearly_negative_are_counted_and_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(600, 600, dtype=torch.float64, generator=generator)
    diagonal = torch.ones(600, dtype=torch.float64)
    diagonal[:40] = -30
    A = 0.1 * (B + B.T)
    A = A - A.diag().diag() + diagonal.diag()
    found = _measured(LAYERS, _quadratic(A), FULL)
    first, second = (entry["estimated_diagonal"] for entry in found.numbers["layers"])
    assert 30 <= first["num_clearly_negative"] <= 40
    assert second["num_clearly_negative"] == 0
    assert found.tables[0].rows[0][-1] == f"at least {first['num_clearly_negative']}"


def test_chance_alone_makes_entries_clearly_negative_as_seldom_as_is_said() -> None:
    """Of sums of random signs, one of them large or all alike: neither is a normal distribution."""
    generator = torch.Generator().manual_seed(0)
    for entries, probes in ((1, 8), (10, 16), (50, 64)):
        bound, wrong = _clear(entries, probes), 0
        for weights in (torch.tensor([1.0]), torch.ones(3), torch.tensor([3.0, 1.0, 0.1])):
            shape = (1500, entries, probes, len(weights))
            signs = torch.randint(2, shape, generator=generator, dtype=torch.int8).float() * 2 - 1
            noise = (signs * weights).sum(-1)
            error = noise.std(-1) / math.sqrt(probes)
            wrong += int((noise.mean(-1) < -bound * error.clamp(min=1e-30)).any(1).sum())
        assert wrong <= 0.05 * 3 * 1500, (entries, probes)
    assert math.isinf(_clear(10_000, 16))


def test_the_diagonal_of_few_parameters_is_exact(tmp_path: Path, problem: Any) -> None:
    code, numbers, page = _run("module", tmp_path)
    assert code == 0
    torch.manual_seed(0)  # as the command does
    model, _, _ = problem.module()
    x, y = problem.data()
    params = {name: p.detach() for name, p in model.named_parameters()}
    H = oracles.hessian(
        lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y), params
    )
    d = H.diag()  # leaves by name: 0.bias, 0.weight, 2.bias, 2.weight
    for entry, part in zip(_of("layers", numbers)["layers"], (d[:15], d[15:]), strict=True):
        assert entry["trace"] == pytest.approx(float(part.sum()), rel=1e-9)
        assert entry["standard_error"] == 0
        found = entry["exact_diagonal"]
        assert found["least"] == pytest.approx(float(part.min()), rel=1e-9)
        assert found["greatest"] == pytest.approx(float(part.max()), rel=1e-9)
        assert found["num_negative"] == int((part < 0).sum())
        assert f"{int((part < 0).sum())} of {len(part)}" in page


# ------------------------------------------------------------------------- which samples


def test_samples_of_a_shuffled_loader_are_all_read_and_numbered_as_they_are(
    tmp_path: Path, problem: Any
) -> None:
    code, numbers, page = _run("shuffled", tmp_path)
    assert code == 0
    torch.manual_seed(0)  # as the command does
    model, loss_fn, _ = problem.module()
    x, y = problem.data()
    params = {name: p.detach() for name, p in model.named_parameters()}
    singles = [
        float(
            oracles.hessian(
                lambda p, i: loss_fn(
                    torch.func.functional_call(model, p, (x[i, None],)), y[i, None]
                ),
                params,
                i,
            ).trace()
        )
        for i in range(10)
    ]
    found = _of("samples", numbers)
    assert sorted(found["traces"]) == pytest.approx(sorted(singles), rel=1e-9)
    assert found["traces"] != pytest.approx(singles, rel=1e-3)
    most = found["most_curved"][0]
    assert found["traces"][most["sample"]] == most["trace"] == pytest.approx(max(singles))
    assert found["shuffled"]
    assert "numbers count the samples in the order of reading" in page
    assert "The most curved of all 10 samples" in page
    assert "median trace of a sample (all 10 samples)" in _key_of(page)


def test_of_a_large_model_only_the_first_batch_is_looked_at_and_it_is_said(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_WORK", 27 * 4)
    code, numbers, page = _run("module", tmp_path)
    assert code == 0
    assert len(_of("samples", numbers)["traces"]) == 4
    plain = _plain(page)
    assert (
        "The first 4 of 10 samples, exactly. There are no more because the model is large" in plain
    )
    assert "The most curved of the first 4 of 10 samples" in plain
    assert "largest trace of a sample (the first 4 of 10 samples)" in _plain(_key_of(page))


def test_an_interruption_among_the_samples_keeps_the_batches_that_are_done(
    tmp_path: Path, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = samples._measured, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return right(*args)

    monkeypatch.setattr(samples, "_measured", interrupted)
    code, numbers, page = _run("module", tmp_path)
    assert code == 130
    assert numbers["parts"]["samples"]["status"] == "partial"
    assert len(_of("samples", numbers)["traces"]) == 4
    assert "The most curved of the first 4 of 10 samples" in page
    assert "because the model is large" not in page


def test_the_samples_that_stand_out_are_measured_again_from_whatever_batch(
    problem: Any,
) -> None:
    model, loss_fn, (x, y) = problem.wide()
    settings = replace(QUICK, num_sample_probes=4)
    whole = _measured(SAMPLES, subject_of((model, loss_fn, x, y), "t"), settings)
    split = _measured(
        SAMPLES, subject_of((model, loss_fn, [(x[:7], y[:7]), (x[7:], y[7:])]), "t"), settings
    )
    assert split.numbers["traces"] == pytest.approx(whole.numbers["traces"], rel=1e-9)
    chosen = [
        [entry["sample"] for entry in found.numbers["most_curved"]] for found in (split, whole)
    ]
    assert chosen[0] == chosen[1]
    params = {name: p.detach() for name, p in model.named_parameters()}
    for entry in split.numbers["most_curved"]:
        i = entry["sample"]
        H = oracles.hessian(
            lambda p, i: loss_fn(torch.func.functional_call(model, p, (x[i, None],)), y[i, None]),
            params,
            i,
        )
        assert entry["trace"] == pytest.approx(float(H.trace()), rel=1e-9)
        assert [f"#{i}", str(int(y[i]))] in [list(row[:2]) for row in split.tables[0].rows]


def test_there_is_one_median_and_it_has_the_typical_error_of_a_sample(digits: Any) -> None:
    _, numbers, page = digits
    found = _of("samples", numbers)
    median = statistics.median(found["traces"])
    error = statistics.median(found["standard_errors"])
    assert found["median"] == pytest.approx(median)
    assert found["typical_error_of_one_sample"] == pytest.approx(error)
    key = _plain(_key_of(page))
    label = "median trace of a sample (the first 128 of 256 samples)"
    assert f"{label} {with_error(median, error)} typical error of one sample" in key
    assert "were measured again exactly: there they have other, better numbers" in page


def _best(values: list[float], errors: list[float | None]) -> Any:
    everyone = list(range(len(values)))
    return samples._Best(
        everyone, everyone, dict(enumerate(values)), dict(enumerate(errors)), {}, {}, "", ""
    )


@pytest.mark.parametrize(
    ("values", "errors", "said"),
    [
        ([241.0, 194.0, 191.0], [72.0, 70.0, 85.0], "The order is not resolved: these"),
        ([241.0, 100.0, 99.0], [3.0, 3.0, 3.0], "The order is not resolved where neighbours"),
        ([241.0, 194.0, 191.0], [0.7, 0.7, 0.7], ""),
        ([241.0, 194.0, 191.0], [None, None, None], ""),
        ([0.0, 0.0], [None, None], "All of them are equal."),
    ],
)
def test_an_order_within_the_errors_is_not_resolved(
    values: list[float], errors: list[float | None], said: str
) -> None:
    note = samples._order(list(range(len(values))), _best(values, errors))
    assert note.startswith(said)
    assert bool(note) == bool(said)


def test_samples_that_may_be_more_curved_than_those_listed_are_counted(problem: Any) -> None:
    model, loss_fn, (x, y) = problem.wide()
    settings = replace(QUICK, num_sample_probes=2, num_shown=1)
    found = _measured(SAMPLES, subject_of((model, loss_fn, x, y), "t"), settings)
    values, errors = found.numbers["traces"], found.numbers["standard_errors"]
    least = found.numbers["most_curved"][-1]["trace"]
    again = sorted(range(20), key=lambda i: -values[i])
    others = [i for i in range(20) if i not in again[:2] + again[-2:]]
    count = sum(values[i] + 2 * errors[i] > least for i in others)
    assert count > 0
    noun = "other" if count == 1 else "others"
    assert f"{count} {noun}, not measured again, may belong here" in found.tables[0].note


# ---------------------------------------------------------------------- what the texts say


def test_tolerance_and_learning_rate_are_named(tmp_path: Path, problem: Any) -> None:
    _, numbers, page = _run("loss", tmp_path)
    f, params, _ = problem.loss()
    top = float(torch.linalg.eigvalsh(oracles.hessian(f, params, problem.data()[0]))[-1])
    plain = _plain(page)
    said = "every residual is within the tolerance, 0.01 % of the largest eigenvalue in magnitude."
    assert said in plain
    assert f"unstable above a learning rate of 2/λmax = {2 / top:.3g}." in plain
    assert "within the errors: they are from other probes than it" in plain
    width = _of("density", numbers)["hessian"]["width"]
    assert f"spread out to a bell of standard deviation {width:.2g}" in plain


def test_on_a_narrow_screen_figures_scroll_and_no_column_is_lost(digits: Any) -> None:
    style = digits[2].split("<style>")[1].split("</style>")[0]
    assert "display: none" not in style
    assert re.search(r"figure svg \{[^}]*min-width: 30rem", style)
    for figure in re.findall(r"<figure>(.*?)</figure>", digits[2], flags=re.DOTALL):
        assert figure.strip().startswith('<div class="wide"')


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
        (
            "report_problem:only_module",
            "the data are missing: expected (model, loss_fn, batches), got (Linear, C",
        ),
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
    assert "my_package.my_module:my_function" in capsys.readouterr().out


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
    with pytest.raises(ArgumentError, match="write_report: folder must be a path, got int"):
        write_report(model, loss_fn, loader, folder=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="write_report: seed must be a whole number, got str"):
        write_report(model, loss_fn, loader, folder=tmp_path, seed="x")  # type: ignore[arg-type]
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
        if re.match(r"\s*(\d+ of \d+: )?trace", line):  # that part has ended
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
        (131.0, 228.0, "130 ± 230"),
        (194.3, 70.4, "194 ± 70"),
        (-0.3, 230.0, "0 ± 230"),
        (0.0, 0.0012, "0.0000 ± 0.0012"),
        (99.96, 0.0999, "99.96 ± 0.10"),
        (-0.008234, 9e-5, "-0.008234 ± 0.000090"),
        (2.0178612, 1.1e-11, "2.01786 ± 1.1e-11"),
        (3.21e-7, 4e-8, "(3.21 ± 0.40)e-07"),
        (1234567.0, 89000.0, "(1.235 ± 0.089)e+06"),
    ],
)
def test_a_number_has_the_digits_that_its_error_allows(
    value: float, error: float | None, text: str
) -> None:
    assert str(Number("", value, error)) == text


def test_inputs_that_look_like_images_are_drawn_as_such() -> None:
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
