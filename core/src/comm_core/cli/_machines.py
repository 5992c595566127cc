"""The machines that `comm-core explain` knows by name, and those in files."""

from __future__ import annotations

import difflib
import json
import pathlib
from typing import TYPE_CHECKING

from comm_core._schema import load_json
from comm_core.command import table

if TYPE_CHECKING:
    from comm_core.topology import Topology

__all__ = ["load_machine", "print_machines"]


def print_machines(schema: int, *, as_json: bool) -> int:
    """List the machines with a line about each; return 0. The JSON has their topologies, too."""
    from comm_core._topologies import describe_topologies, load_topologies

    notes = describe_topologies()
    if as_json:
        listed = [
            {"name": name, "note": notes[name], "topology": topology.to_json()}
            for name, topology in load_topologies().items()
        ]
        print(json.dumps({"schema": schema, "topologies": listed}, indent=1))
    else:
        print(table(list(notes.items())))
    return 0


def load_machine(name: str) -> Topology:
    """Return the topology of that name, or in the file of that path.

    Raises:
        OSError, ValueError: there is neither, or the file can't be read; the text names it.
    """
    from comm_core._topologies import load_topologies
    from comm_core.topology import Topology

    known = load_topologies()
    if name in known:
        return known[name]
    path = pathlib.Path(name)
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see comm-core explain --list"
        raise ValueError(f"no machine is named {name!r}, and there is no such file; {remedy}")
    try:
        data = load_json(path.read_text(encoding="utf-8"))
        return Topology.from_json(data.get("topology", data) if isinstance(data, dict) else data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} isn't a recorded topology: {error}") from error
