"""`comm-core stats`: an unchanged program, and what its all-reduces did."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from comm_core.cli.run import add_program, check_program, run_program
from comm_core.command import describe

if TYPE_CHECKING:
    from comm_core._group.states import GroupState

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "stats",
        help="run a program, and print the calls that its handles served and the waits for peers",
        usage="%(prog)s [-h] [-m] PROGRAM [ARGUMENT ...]",
        description="Runs a Python program as Python does. When a group's handle closes, at the latest with the "
        "program, the group's first rank prints to stderr how many calls and bytes each backend served, and each rank "
        "how long it waited for which peer. Under torchrun: torchrun --nproc-per-node 2 -m comm_core stats serve.py.",
    )
    add_program(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the program in this process; return 0 unless it exits by itself with another status."""
    check_program(args)
    from comm_core._group import states

    states.close_listeners.append(_print)
    try:
        return run_program(args)
    finally:
        for state in states.all_states():
            state.announce_end()
        states.close_listeners.remove(_print)


def _print(state: GroupState) -> None:
    """Print what the group's handle has counted on this rank."""
    from comm_core._plan.explain import explain_calls, explain_waits

    backend, rank = state.backend, 0 if state.control is None else state.control.rank
    if backend is None:
        return
    lines = explain_calls(backend.stats()) if rank == 0 else []
    try:
        waits = backend.waits()
    except Exception as error:  # noqa: BLE001 - plugin boundary: the program goes on
        lines.append(f"the waits can't be read: {describe(error)}")
    else:
        lines += explain_waits(waits, backend.topology) if waits else []
    if lines:
        # As one text: other ranks print, too.
        sys.stderr.write("\n".join([f"rank {rank} of {state.title}", *(f"  {line}" for line in lines), ""]))
        sys.stderr.flush()
