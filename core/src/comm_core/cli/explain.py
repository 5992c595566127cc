"""`comm-core explain`: the backends that serve a group's messages, and why the others don't."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from comm_core._schema import printable
from comm_core.cli._machines import load_machine, print_machines
from comm_core.cli._terminal import encodable, show
from comm_core.command import joined, launch, parse_size, table, under_torchrun
from comm_core.env import Settings
from comm_core.types import DTYPES, MODES, OPS

if TYPE_CHECKING:
    import comm_core as comm
    from comm_core._group.offline import WhatIf
    from comm_core.types import Decision, Route

__all__ = ["add_parser", "run"]

#: The version of the JSON.
SCHEMA = 1
#: The operations by their names on the command line, as in `comm-core bench`.
_OPS = dict(zip(("all_reduce", "fused", "fused_quant"), OPS, strict=True))


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        help="show the backends that serve this job, or another machine, and why the others don't",
        description="Under torchrun, or with --nproc: negotiates for the job's world group and explains the decision. "
        "With --topology: asks the backends installed here about another machine, without connecting them, so failures "
        "to connect don't show. Exits with 1 if a backend that COMM_CORE_BACKENDS names can't serve.",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="start N processes on this host, and explain their group"
    )
    parser.add_argument(
        "--topology", metavar="NAME|FILE", help="a machine that --list names, or JSON that `explain --json` printed"
    )
    parser.add_argument("--list", action="store_true", help="list the machines that --topology knows by name")
    parser.add_argument("--json", action="store_true", help="print JSON, the topology included")
    message = parser.add_argument_group("one message", "with --size: say in one line who serves such a message")
    message.add_argument("--size", type=_nbytes, metavar="SIZE", help="its bytes, such as 8, 64K or 1M")
    message.add_argument("--op", choices=_OPS, help="the operation (default all_reduce)")
    message.add_argument("--mode", choices=MODES, help="run at once, or in a CUDA graph (default eager)")
    message.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help="torch's name of its dtype (default bfloat16)")
    message.add_argument("--device", metavar="TYPE", help="cuda or cpu (default: that of the group's main tensors)")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the explanation; return 1 if a named backend can't serve or the topology can't be read, else 0."""
    _check_message(args)
    if args.list:
        return print_machines(SCHEMA, as_json=args.json)
    if args.topology is not None:
        return _offline(args)
    if not under_torchrun():
        if args.nproc is None:
            args.fail("give --nproc N, or start it under torchrun as you would your job, or give --topology NAME")
        if args.nproc < 1:
            args.fail(f"--nproc {args.nproc}: expected at least one process")
        return launch(args.nproc, args.arguments)
    import comm_core as comm

    with joined() as rank:
        backend = comm.get_backend()
        route = _route(args, backend.decision)
        if rank == 0:
            _print(args, backend.explain(), backend.topology, backend.decision, route)
    return _status(backend.decision)


def _nbytes(text: str) -> int:
    """Parse a size: bytes, or a number with K, M or G for powers of 1024."""
    try:
        nbytes = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if nbytes == 0:
        raise argparse.ArgumentTypeError("expected bytes, at least one")
    return nbytes


def _check_message(args: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("op", "mode", "dtype", "device") if getattr(args, name) is not None]
    if given and args.size is None:
        args.fail(f"{', '.join(given)}: give --size, too")
    if args.size is not None and args.size % DTYPES[args.dtype or "bfloat16"]:
        args.fail(f"--size {args.size}: no whole number of {args.dtype or 'bfloat16'} elements")


def _route(args: argparse.Namespace, decision: Decision) -> Route | None:
    """Return the route of the message that the arguments describe; None if they describe none."""
    if args.size is None:
        return None
    kind = (
        _OPS[args.op or "all_reduce"],
        args.mode or "eager",
        args.device or decision.routes[0].device_type,
        args.dtype or "bfloat16",
    )
    routes = {(route.op, route.mode, route.device_type, route.dtype): route for route in decision.routes}
    if kind not in routes:
        devices = ", ".join(dict.fromkeys(route.device_type for route in decision.routes))
        args.fail(
            f"the group has no messages of {', '.join(kind)}: its tensors are on {devices}, graphs are CUDA graphs, "
            "and the fused operations take floating-point tensors"
        )
    return routes[kind]


def _status(decision: Decision) -> int:
    """Return 1 if a backend that COMM_CORE_BACKENDS names can't serve, else 0."""
    found = {candidate.name: candidate.verdict for candidate in decision.candidates}
    return int(any(found.get(name) != "serves" for name in Settings.read().backends or ()))


def _offline(args: argparse.Namespace) -> int:
    from comm_core._group.offline import decide_offline
    from comm_core._plan import explain

    try:
        topology = load_machine(args.topology)
    except (OSError, ValueError) as error:
        print(f"comm-core: {printable(str(error))}", file=sys.stderr)
        return 1
    what_if = decide_offline(topology)
    route = _route(args, what_if.decision)
    name = printable(pathlib.Path(args.topology).name)
    text = explain.explain(f"{name}, with the backends installed here", topology, what_if.decision)
    assumptions = "\n".join(map(printable, _assumptions(what_if)))
    if args.size is None:
        text += f"\n\n{assumptions}" if assumptions else ""
    elif assumptions and not args.json:
        print(encodable(assumptions, sys.stderr), file=sys.stderr)
    _print(args, text, topology, what_if.decision, route, what_if)
    return _status(what_if.decision)


def _assumptions(what_if: WhatIf) -> list[str]:
    """Return the lines that say what was assumed; none if nothing was."""
    if not what_if.assumed:
        return []
    lines = [
        f"The topology has no facts of {', '.join(what_if.assumed)}: those of this host are assumed on every rank."
    ]
    if what_if.missing:
        lines.append("These can't be used on this host, and are assumed to be usable there:")
        lines += table([(f"  {name}", reason) for name, reason in what_if.missing.items()]).splitlines()
    return lines


def _print(
    args: argparse.Namespace,
    text: str,
    topology: comm.Topology,
    decision: Decision,
    route: Route | None,
    what_if: WhatIf | None = None,
) -> None:
    """Print the text, the JSON, or the line about one message."""
    from comm_core._plan import explain

    if args.json:
        data: dict[str, Any] = {"schema": SCHEMA, "topology": topology.to_json(), "decision": decision.to_json()}
        if what_if is not None:
            data |= {"assumed": dict(what_if.assumed), "missing_here": dict(what_if.missing)}
        if route is not None:
            rules = [dataclasses.asdict(rule) for rule in explain.rules_by_size(route, args.size)]
            data["message"] = {**dataclasses.asdict(route), "nbytes": args.size, "rules": rules}
        print(json.dumps(data, indent=1))
    else:
        show(text if route is None else explain.explain_message(decision, route, args.size))
