"""The command `comm-core`: its own subcommands, and those of other distributions; see `comm_core.command`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from comm_core._version import __version__
from comm_core.command import GROUP, describe, under_torchrun

if TYPE_CHECKING:
    from comm_core._plugins.installed import InstalledPlugin, LoadFailure

__all__ = ["main"]

_COMMANDS = ("check", "demo", "doctor", "explain", "new", "run", "stats")
#: This project's subcommands in other distributions, with the distributions' names.
_SEPARATE_DISTRIBUTIONS = {"bench": "comm-bench", "tune": "comm-bench"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; None: this process's.

    Returns:
        0 fine, 1 a problem found, 130 ended by Ctrl-C; argparse exits with 2 for a usage error.
    """
    parser = _Parser(
        prog="comm-core",
        description="All-reduce backends as plugins: what is installed, what a group would use, and why.",
    )
    parser.add_argument("--version", action="version", version=f"comm-core {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in _COMMANDS:
        importlib.import_module(f"comm_core.cli.{command}").add_parser(subparsers)
    arguments = sys.argv[1:] if argv is None else list(argv)
    completing = "_ARGCOMPLETE" in os.environ  # the shell asks what can follow the words of COMP_LINE
    if completing:
        arguments = os.environ.get("COMP_LINE", "").split()[1:]
    called = next((argument for argument in arguments if not argument.startswith("-")), "")
    if not _add_installed_commands(subparsers, called):
        return 1
    for name, distribution in _SEPARATE_DISTRIBUTIONS.items():
        if name not in subparsers.choices:
            subparsers.add_parser(name, help=f"not installed: pip install {distribution}")
            if name == called:
                parser.error(f"'{name}' isn't installed: pip install {distribution}")
    if completing:
        _complete(parser)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    args.arguments = arguments  # for a command that starts itself again in other processes
    return _run(args)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Tell the shell what can follow, and end this process."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        sys.exit(1)
    argcomplete.autocomplete(parser)


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are printed by one of a job's ranks."""

    def error(self, message: str) -> NoReturn:
        if under_torchrun() and os.environ["RANK"] != "0":
            sys.exit(2)
        super().error(message)


def _run(args: argparse.Namespace) -> int:
    """Run the chosen command; return 1 if the reader of stdout, such as `head`, ends before it."""
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit; let that succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130  # 128 and the number of SIGINT
    return status


def _add_installed_commands(subparsers: Any, called: str) -> bool:
    """Add the commands of other distributions; return False if the called one can't be used, after printing why."""
    for item, summary in _installed_commands():
        if item.name in _COMMANDS:
            if not under_torchrun():  # else every rank would print it
                _print_error(f"the command '{item.name}' of {_origin(item)} isn't used: comm-core has one of that name")
        elif item.name != called:
            subparsers.add_parser(item.name, help=summary)
        elif reason := _load_command(item, subparsers):
            _print_error(f"the command '{called}' of {_origin(item)} can't be used: {reason}")
            return False
    return True


def _installed_commands() -> Iterator[tuple[InstalledPlugin | LoadFailure, str]]:
    """Yield the installed commands, each name once, with a line of help; imports none of them."""
    try:
        from comm_core._plugins.installed import InstalledPlugin, list_installed
        from comm_core._plugins.metadata_backport import metadata

        by_name = {item.name: item for item in list_installed(GROUP)}
        summaries = [
            metadata.metadata(item.distribution).get("Summary") or f"from {_origin(item)}"
            if isinstance(item, InstalledPlugin) and item.distribution
            else f"can't be used: {getattr(item, 'reason', '')}"
            for item in by_name.values()
        ]
    except Exception as error:  # noqa: BLE001 - `doctor` has to print even with a broken installation
        _print_error(f"commands of other distributions can't be listed: {describe(error)}")
        return
    # argparse interprets % in a line of help.
    yield from zip(by_name.values(), (summary.replace("%", "%%") for summary in summaries), strict=True)


def _load_command(item: InstalledPlugin | LoadFailure, subparsers: Any) -> str:
    """Import a command and let it add its parser; return the reason why it can't be used, or ""."""
    from comm_core._plugins.installed import LoadFailure, PluginRejectedError, check_requirements
    from comm_core._plugins.metadata_backport import metadata

    if isinstance(item, LoadFailure):
        return f"{item.reason}. {item.remedy}"
    try:
        check_requirements(item, __version__)
        metadata.EntryPoint(item.name, item.value, GROUP).load().add_parser(subparsers)
    except KeyboardInterrupt:
        raise
    except PluginRejectedError as rejection:
        return f"{rejection.reason}. {rejection.remedy}"
    except BaseException as error:  # noqa: BLE001 - another distribution's code may raise anything, also SystemExit
        module = item.value.partition(":")[0].strip()
        return f"{describe(error)}. See the traceback: python -c 'import {module}'. Fix or uninstall it"
    added = subparsers.choices.get(item.name)
    if added is None or not callable(added.get_default("run")):
        return f"its add_parser must add a parser '{item.name}' with set_defaults(run=function)"
    return ""


def _origin(item: InstalledPlugin | LoadFailure) -> str:
    """Return the distribution of a command, and its version."""
    return " ".join(filter(None, (item.distribution, item.version))) or "an unknown distribution"


def _print_error(text: str) -> None:
    print(f"comm-core: {text}", file=sys.stderr)
