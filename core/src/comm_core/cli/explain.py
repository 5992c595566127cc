"""`comm-core explain`: the backends that serve a group's messages, and why the others don't."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from comm_core._schema import load_json, printable
from comm_core.cli._report import encodable
from comm_core.command import joined, launch, under_torchrun
from comm_core.env import Settings

if TYPE_CHECKING:
    from comm_core.topology import Topology
    from comm_core.types import Decision

__all__ = ["add_parser", "run"]

#: The version of the JSON.
SCHEMA = 1


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        help="show the backends that serve this job or a recorded topology, and why the others don't",
        description="Under torchrun, or with --nproc: negotiates for the job's world group and explains the decision. "
        "With --topology: asks the backends installed here about a topology recorded elsewhere, without connecting "
        "them, so failures to connect don't show. Exits with 1 if a backend that COMM_CORE_BACKENDS names can't serve.",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="start N processes on this host, and explain their group"
    )
    parser.add_argument("--topology", type=pathlib.Path, metavar="FILE", help="JSON that `explain --json` printed")
    parser.add_argument("--json", action="store_true", help="print JSON, the topology included")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the explanation; return 1 if a named backend can't serve or the topology can't be read, else 0."""
    if args.topology is not None:
        return _offline(args.topology, as_json=args.json)
    if not under_torchrun():
        if args.nproc is None:
            args.fail("give --nproc N, or start it under torchrun as you would your job, or give --topology FILE")
        if args.nproc < 1:
            args.fail(f"--nproc {args.nproc}: expected at least one process")
        return launch(args.nproc, args.arguments)
    import comm_core as comm

    with joined() as rank:
        backend = comm.get_backend()
        if rank == 0:
            _print(backend.explain(), backend.topology, backend.decision, as_json=args.json)
    return _status(backend.decision)


def _status(decision: Decision) -> int:
    """Return 1 if a backend that COMM_CORE_BACKENDS names can't serve, else 0."""
    found = {candidate.name: candidate.verdict for candidate in decision.candidates}
    return int(any(found.get(name) != "serves" for name in Settings.read().backends or ()))


def _offline(path: pathlib.Path, *, as_json: bool) -> int:
    from comm_core._group.offline import decide_offline
    from comm_core._plan import explain
    from comm_core.topology import Topology

    try:
        data = load_json(path.read_text(encoding="utf-8"))
        topology = Topology.from_json(data.get("topology", data) if isinstance(data, dict) else data)
    except (OSError, ValueError) as error:
        print(f"comm-core: {printable(str(path))} isn't a recorded topology: {printable(str(error))}", file=sys.stderr)
        return 1
    decision = decide_offline(topology)
    text = explain.explain(f"{printable(path.name)}, with the backends installed here", topology, decision)
    _print(text, topology, decision, as_json=as_json)
    return _status(decision)


def _print(text: str, topology: Topology, decision: Decision, *, as_json: bool) -> None:
    if as_json:
        data = {"schema": SCHEMA, "topology": topology.to_json(), "decision": decision.to_json()}
        print(json.dumps(data, indent=1))
    else:
        print(encodable(text, sys.stdout))
