"""`comm-core check`: the faults of one plugin, each with its remedy; with `--ranks`, those that need other ranks."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from comm_core._schema import printable
from comm_core.cli._terminal import show
from comm_core.env import Settings

if TYPE_CHECKING:
    from comm_core._testing.examine import Examination

__all__ = ["add_parser", "run"]

#: Before the names of topologies.
_INDENT = " " * 6


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="find the faults of one plugin",
        description="Load the backend NAME, call its probe(), and ask its is_available about topologies that come with "
        "comm-core. Exits with 0 if it finds no fault, else 1.",
    )
    parser.add_argument("name", metavar="NAME", help="the backend's name: that of its entry point")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="then run the quick tests of the conformance kit in N processes on this machine, on its GPUs if it has N",
    )
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the faults; return 1 if there are some, else 0."""
    from comm_core._testing.examine import examine

    try:
        settings = Settings.read()
    except ValueError as error:
        args.fail(printable(str(error)))
    if args.ranks is not None and args.ranks < 2:
        args.fail(f"--ranks {args.ranks}: expected at least 2")
    found = examine(args.name, settings)
    show("\n".join(_lines(args.name, found)))
    if found.faults:
        return 1
    return 0 if args.ranks is None else _run_quick_tests(args.name, args.ranks)


def _run_quick_tests(name: str, ranks: int) -> int:
    """Run the quick half of the conformance kit, and print a line for each test; return 1 if one fails."""
    from comm_core._testing.quick import run_quick_tests

    failed = 0
    for test, outcome, text in run_quick_tests(name, ranks):
        failed += outcome == "failed"
        show(f"{outcome:>7}  {printable(test)}" + (f": {text}" if text else ""))
    return 1 if failed else 0


def _answers(answers: Mapping[str, str]) -> Iterator[str]:
    """Yield each answer, and below it the topologies that got it."""
    topologies: dict[str, list[str]] = {}
    for topology, answer in answers.items():
        topologies.setdefault(answer, []).append(topology)
    for answer, names in topologies.items():
        yield f"  {printable(answer)}"
        yield textwrap.fill(
            ", ".join(names), 80, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
        )


def _lines(name: str, found: Examination) -> list[str]:
    title = f"backend '{name}'" + (f" ({found.source})" if found.source else "")
    lines = [f"{printable(title)}: {len(found.faults) or 'no'} fault{'' if len(found.faults) == 1 else 's'} found"]
    if found.answers:
        lines += ["", "Its is_available says:", *_answers(found.answers)]
    for number, fault in enumerate(found.faults, 1):
        lines += ["", f"{number}. {printable(fault.what)}"]
        lines += [f"   at {printable(fault.place)}"] if fault.place else []
        lines += [f"   {printable(fault.remedy)}"]
    return lines
