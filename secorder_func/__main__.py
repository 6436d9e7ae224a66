"""The command line: `python -m secorder_func [demo | verify]`."""

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
    _add_verify(commands)
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


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "check that a loss is fit for second derivatives and that its products are right"
    verify = commands.add_parser(
        "verify",
        help=summary,
        description=summary.capitalize() + ", and name the likely cause where not.",
        epilog="Exit code: 0 when no check failed, 1 when one did, 2 when the problem cannot be had.",
    )
    verify.add_argument(
        "target",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="a function without arguments, in a module that the current folder or the environment has, that returns "
        "(f, params, *args) or (model, loss_fn, inputs, targets); without it the demonstration's model is checked",
    )
    verify.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of torch, before the function is called, and of the directions (default: %(default)s)",
    )
    verify.add_argument(
        "--rtol",
        type=float,
        help="what exact answers may differ by (default: the square root of the unit roundoff)",
    )
    verify.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
    if arguments.target is not None:
        from secorder_func.verify.command import run

        return run(arguments.target, seed=arguments.seed, rtol=arguments.rtol)
    from secorder_func.report import require_extra

    require_extra("python -m secorder_func verify without a function")
    from secorder_func.report.example import verify_digits

    return verify_digits(seed=arguments.seed, rtol=arguments.rtol)


if __name__ == "__main__":
    sys.exit(main())
