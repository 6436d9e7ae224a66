"""The command line: `python -m secorder_func [demo]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from secorder_func import __version__
from secorder_func.errors import MissingExtraError

__all__ = ["main"]

DEFAULT_COMMAND = "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0 when all checks hold, 1 when one does not, 2 when it cannot run."""
    arguments = _parser().parse_args(_with_command(sys.argv[1:] if argv is None else argv))
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (MissingExtraError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


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
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "train a small classifier of digits and report its curvature, every number checked"
    demo = commands.add_parser("demo", help=summary, description=summary.capitalize() + ".")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("secorder-out"),
        metavar="DIR",
        help="folder for the picture, made if missing (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the split, the initial parameters and all random probes (default: %(default)s)",
    )
    demo.add_argument(
        "--quick", action="store_true", help="a smaller network, fewer samples and probes"
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from secorder_func.report import require_extra

    require_extra("python -m secorder_func demo")
    from secorder_func.report.demo import FULL, QUICK, run_demo

    settings = QUICK if arguments.quick else FULL
    return run_demo(arguments.output, seed=arguments.seed, settings=settings)


if __name__ == "__main__":
    sys.exit(main())
