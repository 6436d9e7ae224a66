"""Every code block of the pages is run or compared: `python` blocks by `conftest.py`, all others here."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

import secorder_func

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(page: str, text: str) -> list[Block]:
    found = FencedCodeBlockLexer(r"[^\n]*")(Document(text, page))
    return [
        Block(page, text.count("\n", 0, b.start) + 1, b.lexemes["language"], b.lexemes["source"])
        for b in found
    ]


BLOCKS = [block for page, text in TEXTS.items() for block in _blocks(page, text)]


def _of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def _run(command: list[str], folder: Path) -> str:
    """Return what a command prints; the folder is its own, and the package that of this checkout."""
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=shared, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- every block has a test


def _is_tested(block: Block) -> bool:
    if block.language == "python":
        return block.page == "README.md" or block.page.startswith("docs/")
    return block.language in ("py", "console") or (block.page, block.language) in COMPARED


def test_every_block_is_run_or_compared() -> None:
    assert [f"{block} {block.language}" for block in BLOCKS if not _is_tested(block)] == []


@pytest.mark.parametrize("page", TEXTS)
def test_nothing_is_skipped_but_the_storing_of_a_picture(page: str) -> None:
    skipped = re.findall(r"^.*(?:doctest: *\+SKIP|<!-*[\s;]*skip).*$", TEXTS[page], re.MULTILINE)
    assert [line for line in skipped if ".savefig(" not in line] == []


def test_no_preparation_is_left_of_a_block_that_is_gone() -> None:
    kinds = {(block.page, block.language) for block in BLOCKS}
    starts = {(block.page, block.text.splitlines()[0]) for block in PROGRAMS}
    assert kinds.issuperset(COMPARED)
    assert starts.issuperset((page, start) for page in GIVEN for start in GIVEN[page])


# ---------------------------------------------------------------- blocks that are compared


def _names_exist(block: Block) -> None:
    known = {name for thing in (secorder_func, secorder_func.Estimate) for name in dir(thing)}
    known |= set(secorder_func.Estimate.__dataclass_fields__)
    names = re.findall(r"\w{2,}(?=\()|\b[A-Z][a-z]\w+|(?<=\.)\w+", block.text)
    assert len(names) > 5
    assert [name for name in names if name not in known] == []


def _layers_are_those_of_the_contract(block: Block) -> None:
    (contract,) = (c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    shown = [re.split(r" {2,}", line)[0] for line in block.text.splitlines()]
    assert shown == [layer.replace("secorder_func.", "") for layer in contract["layers"]]


def _verify_prints_it(block: Block) -> None:
    """Compare all words; the numbers depend on the machine."""
    before = [b for b in _of("python") if b.page == block.page and b.line < block.line]
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(before[-1].text):
        exec(example.source, names)
    shown, printed = (
        re.sub(rf"(?:< )?{NUMBER.pattern}", "#", text).split()
        for text in (block.text, str(names["result"]))
    )
    assert shown == printed


def _citation_is_that_of_the_file(block: Block) -> None:
    file = (ROOT / "CITATION.cff").read_text()
    cited = dict(re.findall(r"^(?:  - )?(\w+): \"?(.+?)\"?$", file, re.MULTILINE))
    shown = dict(re.findall(r"(\w+) += (.+),$", re.sub(r"[{}\\]", "", block.text), re.MULTILINE))
    (year,) = re.findall(r"Copyright \(c\) (\d+) " + cited["name"], (ROOT / "LICENSE").read_text())
    assert shown == {
        "author": cited["name"],
        "title": cited["title"],
        "version": secorder_func.__version__,
        "year": year,
        "license": PROJECT["project"]["license"],
    }
    assert (cited["version"], cited["license"]) == (shown["version"], shown["license"])


COMPARED: dict[tuple[str, str], Callable[[Block], None]] = {
    ("CONTRIBUTING.md", "text"): _layers_are_those_of_the_contract,
    ("README.md", "bibtex"): _citation_is_that_of_the_file,
    ("docs/concepts/idea.md", "text"): _names_exist,
    ("docs/how-to/verify.md", "text"): _verify_prints_it,
}


@pytest.mark.parametrize("block", [b for b in BLOCKS if (b.page, b.language) in COMPARED], ids=str)
def test_a_block_that_is_no_code_is_true(block: Block) -> None:
    COMPARED[block.page, block.language](block)


# ---------------------------------------------------------------- programs

PROBLEM = """
import torch
from torch import nn
model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
x, y = torch.randn(8, 3), torch.randn(8, 2)
"""
OLD_PROGRAM = """
import torch
from torch_secorder.core.hvp import exact_hvp
p = torch.ones(2, requires_grad=True)
assert exact_hvp(lambda: (p**3).sum(), [p], [p.detach()])[0].tolist() == [6.0, 6.0]
"""
CLASSIFIER = """
from lightning.pytorch import LightningModule

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, batch, number):
        return loss_fn(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

classifier = Classifier()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
"""
DROP_IN = "import secorder_func.compat\nsecorder_func.compat.install_as_torch_secorder()\n"

# What a block takes for granted, by its page and its first line.
GIVEN = {
    "docs/how-to/training.md": {"from lightning.pytorch import Trainer": PROBLEM + CLASSIFIER},
    "docs/migration.md": {
        "from torch_secorder.core.hvp import exact_hvp": DROP_IN + PROBLEM,
        "from torch_secorder.approximations.fisher_diagonal import empirical_fisher_diagonal": DROP_IN
        + PROBLEM,
        "from torch.func import grad, vmap": PROBLEM,
        "from secorder_func import functional_loss, hvp, tree": PROBLEM,
    },
}


def _commands(block: Block) -> list[str]:
    return re.findall(r"^\$ (.+?)(?: +# .*)?$", block.text, re.MULTILINE)


def _is_for_a_command(program: Block) -> bool:
    """Say whether a command of the page starts the program, or names a function of it."""
    commands = [c for b in _of("console") if b.page == program.page for c in _commands(b)]
    return any(
        command.startswith("torchrun")
        or any(f"def {function}(" in program.text for function in re.findall(r":(\w+)", command))
        for command in commands
    )


PROGRAMS = [block for block in _of("py") if not _is_for_a_command(block)]


@pytest.mark.parametrize("block", {b.text: b for b in reversed(PROGRAMS)}.values(), ids=str)
def test_a_program_runs(block: Block, tmp_path: Path) -> None:
    if "lightning" in block.text:
        pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    given = GIVEN.get(block.page, {}).get(block.text.splitlines()[0], "")
    (tmp_path / "program.py").write_text(given + block.text)
    (tmp_path / "program_written_for_torch_secorder.py").write_text(OLD_PROGRAM)
    _run([sys.executable, "program.py"], tmp_path)


# ---------------------------------------------------------------- commands

OF_A_USER = """
import torch
from torch import nn

def {function}():
    return nn.Linear(3, 2), nn.CrossEntropyLoss(), torch.randn(8, 3), torch.randint(2, (8,))
"""


def _output(block: Block) -> str:
    return re.sub(r"^\$ .+\n", "", block.text, flags=re.MULTILINE)


def _is_there(command: str) -> None:
    """Fail if a command names what does not exist."""
    match shlex.split(command):
        case ["pip", "install", what]:
            (extras,) = re.findall(r"^(?:\.|secorder-func)(?:\[(.+)\])?$", what)
            known = PROJECT["project"]["optional-dependencies"]
            assert all(extra in known for extra in extras.split(",") if extra), command
        case ["make", target, *_]:
            assert re.search(rf"^{re.escape(target)}:.*## \S", MAKEFILE, re.MULTILINE), command
        case ["python", "-m", module, *_]:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command
        case ["python", file, *_]:
            assert (ROOT / file).is_file(), command
        case ["torchrun", *_]:
            pass
        case _:
            pytest.fail(f"an unknown kind of command: {command}")


@pytest.mark.parametrize("page", TEXTS)
def test_commands_in_the_text_name_what_exists(page: str) -> None:
    prose = re.sub(r"^( *```).*?^\1", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for command in re.findall(r"`((?:python|make|pip|torchrun) [^`]+)`", prose):
        _is_there(command)


@pytest.mark.parametrize("block", _of("console"), ids=str)
def test_commands_of_a_block_name_what_exists(block: Block) -> None:
    assert _commands(block)
    for command in _commands(block):
        _is_there(command)
    if not block.text.startswith("$ torchrun"):
        assert _output(block) == ""  # nothing compares it


def _that_start_with(start: str) -> list[Any]:
    """Return blocks and their commands of a kind, each command once."""
    found = {c: b for b in reversed(_of("console")) for c in _commands(b) if c.startswith(start)}
    return [pytest.param(block, command, id=command) for command, block in found.items()]


@pytest.mark.parametrize(("block", "command"), _that_start_with("python -m secorder_func"))
def test_a_command_of_the_package_runs(block: Block, command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    if "verify" not in words:
        pytest.importorskip("sklearn")
        words.append("--quick")
    for module, function in re.findall(r"([\w.]+):(\w+)", command):
        text = OF_A_USER.format(function=function)
        if "." not in module:  # a file that the page shows
            pages = (b.text for b in _of("py") if b.page == block.page)
            (text,) = (shown for shown in pages if f"def {function}(" in shown)
        file = tmp_path / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    _run([sys.executable, *words], tmp_path)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
@pytest.mark.parametrize(("block", "command"), _that_start_with("torchrun"))
def test_several_processes_print_what_the_page_shows(
    block: Block, command: str, tmp_path: Path
) -> None:
    (program,) = (b for b in _of("py") if b.page == block.page)
    *words, file = shlex.split(command)[1:]
    (tmp_path / file).write_text(program.text)
    launch = [sys.executable, "-m", "torch.distributed.run", *words, file]
    try:
        printed = _run(launch, tmp_path)
    except AssertionError as error:
        # On a busy machine a process has been seen to abort at its exit, when all was printed.
        if "terminate called without an active exception" not in str(error):
            raise
        printed = _run(launch, tmp_path)
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", _output(block))
    for shown, number in zip(NUMBER.findall(_output(block)), NUMBER.findall(printed), strict=True):
        digit = 10.0 ** -len(shown.partition(".")[2])
        assert float(number) == pytest.approx(float(shown), abs=digit)
