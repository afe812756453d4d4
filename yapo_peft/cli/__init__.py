"""The command `yapo`."""

from __future__ import annotations

import argparse
import sys

from .._version import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: Arguments after the program's name; those of this process if None.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="yapo", description="Sparse activation steering of language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    # Its options are TRL's, and its own parser lists them.
    commands.add_parser("train", help="learn an adapter from preference pairs", add_help=False)
    commands.add_parser("lm-eval", help="run tasks of lm-eval at several strengths", add_help=False)
    commands.add_parser("report", help="write a page about an adapter", add_help=False)
    commands.add_parser("app", help="open a playground on this machine", add_help=False)
    command = parser.parse_known_args(argv[:1])[0].command
    from ..errors import YaPOError
    from .app import app
    from .lm_eval import lm_eval
    from .report import report
    from .train import train

    try:
        return {"train": train, "lm-eval": lm_eval, "report": report, "app": app}[command](argv[1:])
    except (YaPOError, OSError) as error:
        print(f"yapo {argv[0]}: {error}", file=sys.stderr)
        return 2
