"""The command line: `python -m secorder_func [demo | report | verify | bench]`."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from secorder_func import __version__, progress
from secorder_func.errors import MissingExtraError
from secorder_func.report import INTERRUPTED

__all__ = ["main"]

DEFAULT_COMMAND = "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0 when all is well, 1 when something is not, 2 when it cannot run.

    After Ctrl-C it is 130.
    """
    given = _with_command(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    if given[0] == "bench":  # its options are not ours
        given, rest = given[:1], given[1:]
    arguments = _parser().parse_args(given, argparse.Namespace(rest=rest))
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (MissingExtraError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _with_command(argv: Sequence[str]) -> list[str]:
    """Put the default command in front of options that come without one."""
    about_the_program = {"-h", "--help", "--version"}
    if not argv or (argv[0].startswith("-") and argv[0] not in about_the_program):
        return [DEFAULT_COMMAND, *argv]
    return list(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m secorder_func",
        description="Second-order curvature for PyTorch as composable functional transforms.",
        epilog=f"Without a command, {DEFAULT_COMMAND} runs.",
    )
    parser.add_argument("--version", action="version", version=f"secorder_func {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_report(commands)
    _add_verify(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "train a small classifier of digits and report its curvature, every number checked"
    demo = commands.add_parser("demo", help=summary, description=summary.capitalize() + ".")
    _add_output(demo, "the picture")
    _add_seed(demo, "of the split, the initial parameters and all random probes")
    demo.add_argument(
        "--quick", action="store_true", help="a smaller network, fewer samples and probes"
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from secorder_func.report import require_extra

    require_extra("python -m secorder_func demo", digits=True)
    from secorder_func.report.demo import FULL, QUICK, run_demo

    settings = QUICK if arguments.quick else FULL
    return run_demo(arguments.output, seed=arguments.seed, settings=settings)


def _add_problem(parser: argparse.ArgumentParser, what: str) -> None:
    """Let the user's function be named with or without the option."""
    parser.add_argument("target", nargs="?", metavar="MODULE:FUNCTION", help=what)
    parser.add_argument("--problem", metavar="MODULE:FUNCTION", help="the same")
    parser.set_defaults(parser=parser)


def _problem(arguments: argparse.Namespace) -> str | None:
    """Return the name of the user's function, if one is given."""
    if arguments.target is not None and arguments.problem is not None:
        arguments.parser.error("MODULE:FUNCTION is given twice")
    name: str | None = arguments.target if arguments.problem is None else arguments.problem
    return name


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("secorder-out"),
        metavar="DIR",
        help=f"folder for {what}, made if missing (default: %(default)s)",
    )


def _add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"{what} (default: %(default)s)")


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return number


_REPORT_EXAMPLES = """\
examples:
  python -m secorder_func report
      of the digits that come with scikit-learn
  python -m secorder_func report my_package.my_module:my_function
      of your own: a function without arguments, in a module that the current
      folder or the environment has, that returns (f, params, batches) with a
      loss f(params, *batch), or (model, loss_fn, batches) with an nn.Module
  python -m secorder_func report train:problem --probes 256 --output out
      more probes, smaller errors

batches: a tuple is one batch; or a list of batches, a DataLoader, or
secorder_func.Batches, which knows of losses that are sums.

Ctrl-C leaves a report of what was measured so far. Exit code: 0; 1 if a part
failed; 2 if the problem cannot be had; 130 after Ctrl-C.
"""


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "measure the curvature of your own loss and write a page about it"
    report = commands.add_parser(
        "report",
        help=summary,
        description=summary.capitalize() + ": report.html, and report.json with all numbers.",
        epilog=_REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_problem(report, "whose loss (default: that of the digits)")
    _add_output(report, "the report")
    _add_seed(report, "of torch, before the function is called, and of all random probes")
    report.add_argument("--quick", action="store_true", help="fewer probes, steps and samples")
    report.add_argument(
        "--probes",
        type=_count,
        metavar="N",
        help="for traces and diagonals (default: 64, with --quick 16)",
    )
    report.add_argument(
        "--eigenvalues",
        type=_count,
        metavar="K",
        help="how many at either end (default: 5, with --quick 3)",
    )
    report.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> int:
    from secorder_func.report import require_extra

    problem = _problem(arguments)
    require_extra("python -m secorder_func report", digits=problem is None)
    from secorder_func.report.command import run_report

    return run_report(
        arguments.output,
        problem=problem,
        seed=arguments.seed,
        quick=arguments.quick,
        num_probes=arguments.probes,
        num_eigenvalues=arguments.eigenvalues,
    )


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "check that a loss is fit for second derivatives and that its products are right"
    verify = commands.add_parser(
        "verify",
        help=summary,
        description=summary.capitalize() + ", and name the likely cause where not.",
        epilog="Exit code: 0 when no check failed, 1 when one did, 2 when the problem cannot be had.",
    )
    _add_problem(
        verify,
        "a function without arguments, in a module that the current folder or the environment has, that returns "
        "(f, params, *args) or (model, loss_fn, inputs, targets), or batches in place of the data, as for report: then "
        "the first one is taken; without it the demonstration's model is checked",
    )
    _add_seed(verify, "of torch, before the function is called, and of the directions")
    verify.add_argument(
        "--rtol",
        type=float,
        help="what exact answers may differ by (default: the square root of the unit roundoff)",
    )
    verify.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
    problem = _problem(arguments)
    if problem is not None:
        from secorder_func.verify.command import run

        with _bars():
            return run(problem, seed=arguments.seed, rtol=arguments.rtol)
    from secorder_func.report import require_extra

    require_extra("python -m secorder_func verify without a function", digits=True)
    from secorder_func.report.example import verify_digits

    with _bars():
        return verify_digits(seed=arguments.seed, rtol=arguments.rtol)


@contextmanager
def _bars() -> Iterator[None]:
    """Show what takes long, if what shows it is installed."""
    with ExitStack() as stack:
        with suppress(MissingExtraError):
            stack.enter_context(progress())
        yield


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "run the benches of a checkout of the repository: python -m bench, with its options"
    bench = commands.add_parser("bench", help=summary, add_help=False)
    bench.set_defaults(run=_run_bench)


def _run_bench(arguments: argparse.Namespace) -> int:
    if not _has_bench():
        print(
            "The benches are in the repository, not in the installed package. "
            "Run the command in the folder of a checkout.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "bench", *arguments.rest], check=False).returncode


def _has_bench() -> bool:
    """Say whether `python -m bench` is ours, in the current folder or the environment."""
    if Path("bench/harness.py").is_file():
        return True
    try:
        return importlib.util.find_spec("bench.harness") is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
