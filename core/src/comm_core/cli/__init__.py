"""The command `comm-core`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = ("bench", "demo", "doctor", "explain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; None: this process's.

    Returns:
        0 fine, 1 a problem found; argparse exits with 2 for a usage error.
    """
    parser = argparse.ArgumentParser(
        prog="comm-core",
        description="All-reduce backends as plugins: what is installed, what a group would use, and why.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS:
        importlib.import_module(f"comm_core.cli.{command}").add_parser(subparsers)
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    args.arguments = arguments  # for a command that starts itself again in other processes
    status: int = args.run(args)
    return status
