"""Format a decision as text. Pure, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from comm_core.topology import Topology
from comm_core.types import DTYPES, TERMINAL, Candidate, Decision, Route, RouteStats, Rule, WaitStats, rank_label

__all__ = ["explain", "explain_calls", "explain_message", "explain_waits", "rules_by_size", "size", "table"]

# The most peers that the table of waits shows.
_SHOWN_WAITS = 8
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# A cell of a column of numbers: a number, with a mark or without, or none.
_NUMBER = re.compile(r"[\d.]+\*?|-|")


def size(nbytes: int) -> str:
    """Return an exact, readable size: "4 KiB", "4100 B"."""
    unit = 0
    while nbytes and nbytes % 1024 == 0 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes // 1024, unit + 1
    return f"{nbytes} {_UNITS[unit]}"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Return the rows as text in aligned columns, two spaces apart; columns of numbers are aligned right.

    Args:
        rows: the cells, the header's first.
    """
    rows = list(rows)
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        align = str.rjust if all(map(_NUMBER.fullmatch, column[1:])) else str.ljust
        columns.append([align(cell, width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def explain(
    title: str,
    topology: Topology,
    decision: Decision,
    stats: Sequence[RouteStats] = (),
    waits: Sequence[WaitStats] = (),
) -> str:
    """Return a report of a group's candidates, with their verdicts and reasons, of its routes, and of calls so far.

    Args:
        title: the group's name, such as "group '0' (ranks 0-1)".
        topology: the group's topology.
        decision: the group's decision.
        stats: the calls so far; none: the report doesn't mention them.
        waits: the waits for peers so far; likewise.
    """
    rows = [("backend", "priority", "verdict", "reason")]
    rows += [
        (
            f"{candidate.name} {candidate.version}" if candidate.version else candidate.name,
            "-" if candidate.priority is None else str(candidate.priority),
            candidate.verdict,
            _reason(candidate, topology),
        )
        for candidate in decision.candidates
    ]
    kind = ", deterministic" if decision.deterministic else _wire(decision)
    lines = [f"{title}: {_describe_group(topology)}{kind}", "", table(rows), "", *_routes(decision), *_tuning(decision)]
    lines += ["", *explain_calls(stats)] if stats else []
    return "\n".join(lines + (["", *explain_waits(waits, topology)] if waits else []))


def _wire(decision: Decision) -> str:
    """Return the quantised wire that the group asks for, and whether a backend has it; "" for none."""
    if not decision.wire:
        return ""
    has = any(rule.wire for route in decision.routes for rule in route.rules)
    return f", {decision.wire} wire" if has else f", {decision.wire} wire, which no backend here has"


def rules_by_size(route: Route, nbytes: int) -> tuple[Rule, ...]:
    """Return the rules of which one takes a message of `nbytes` bytes, by its shape; the last one takes any shape."""
    numel = nbytes // DTYPES[route.dtype]
    taking = []
    for rule in route.rules:
        # One row of all elements: the shape with the fewest tokens.
        if rule.takes(nbytes, 1, 0) and numel % rule.hidden_multiple == 0:
            taking.append(rule)
            if rule.max_tokens is None and rule.hidden_multiple == 1:
                break
    return tuple(taking)


def explain_message(decision: Decision, route: Route, nbytes: int) -> str:
    """Say in one line who serves a message of `nbytes` bytes on a route of the decision."""
    what = f"{route.op} of {size(nbytes)}, {route.mode}, {route.device_type}, {route.dtype}"
    *conditional, last = rules_by_size(route, nbytes)
    parts = [f"{rule.backend} with {_shape_condition(rule)}{_decided(rule)}" for rule in conditional]
    if last.backend != TERMINAL or route.op == "all_reduce":
        parts.append(f"{_server(last)}{_decided(last)}")
    elif route.op == "all_reduce_add_rms_norm_quant":
        norm = decision.route("all_reduce_add_rms_norm", route.mode, route.device_type, route.dtype)
        served = explain_message(decision, norm, nbytes).rpartition(": ")[2]
        parts.append(f"core's quantisation after {served}{_decided(last)}")
    else:
        plain = decision.route("all_reduce", route.mode, route.device_type, route.dtype)
        rule = next(rule for rule in plain.rules if rule.takes(nbytes))
        parts.append(f"core's norm after an all_reduce by {_server(rule)}{_decided(last) or _decided(rule)}")
    return f"{what}: {', else '.join(parts)}"


def _server(item: Rule | RouteStats) -> str:
    return f"{item.backend} over an {item.wire} wire" if item.wire else item.backend


def _reason(candidate: Candidate, topology: Topology) -> str:
    if candidate.rank is None:
        return candidate.reason
    return f"rank {rank_label(candidate.rank, topology.ranks[candidate.rank].global_rank)}: {candidate.reason}"


def _describe_group(topology: Topology) -> str:
    hosts = list(dict.fromkeys(info.host.id for info in topology.ranks))
    devices = {info.device.name or info.device.type for info in topology.ranks if info.device}
    where = "one host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    ranks = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks"
    return f"{ranks} on {where}, {' and '.join(sorted(devices)) if devices else 'CPU tensors'}"


def _routes(decision: Decision) -> list[str]:
    """Return the table of routes, with dtypes of equal rules on one line."""
    merged: dict[tuple[str, str, str, tuple[Rule, ...]], list[str]] = {}
    for route in decision.routes:
        merged.setdefault((route.op, route.mode, route.device_type, route.rules), []).append(route.dtype)
    rows = [("operation", "mode", "device", "dtypes", "backends by size")]
    rows += [
        (op, mode, device_type, _dtypes(op, dtypes), "; ".join(_rule(rule, decision.tuning) for rule in rules))
        for (op, mode, device_type, rules), dtypes in merged.items()
    ]
    return table(rows).splitlines()


def _tuning(decision: Decision) -> list[str]:
    """Return the lines about rules, with the numbers that the routes show, and about the backends' variants."""
    if not decision.tuned_by:
        return []
    verdicts = {candidate.name: candidate.verdict for candidate in decision.candidates}

    def note(name: str) -> str:
        verdict = verdicts.get(name, "not installed")
        return "" if verdict in {"serves", "standby"} else f"  (no effect: the backend is {verdict})"

    lines = ["", f"Rules of {decision.tuned_by} that override priorities:" if decision.tuning else decision.tuned_by]
    lines += [f"  [{n}] {text}{note(text.partition(':')[0])}" for n, text in enumerate(decision.tuning, 1)]
    for name, choices in decision.variants.items():
        lines += ["", f"Variants of {name} that this table chooses:{note(name)}", *(f"  {text}" for text in choices)]
    return lines


def _decided(rule: Rule) -> str:
    """Return a text that names the rule of tuning that decided; "" if none did."""
    return f" (by the rule {rule.tuned})" if rule.tuned else ""


def explain_calls(stats: Sequence[RouteStats]) -> list[str]:
    """Return the lines of the table of calls so far."""
    rows = [("calls so far", "mode", "device", "dtype", "backend", "calls", "size of all")]
    rows += [
        (item.op, item.mode, item.device_type, item.dtype, _server(item), str(item.calls), size(item.nbytes))
        for item in stats
    ]
    return table(rows).splitlines()


def explain_waits(waits: Sequence[WaitStats], topology: Topology) -> list[str]:
    """Return the lines of the table of this rank's waits, the peer that it waited for the longest first."""
    rows = [("waited for", "in", "waits", "us of all", "longest us")]
    rows += [
        (
            f"rank {rank_label(item.rank, topology.ranks[item.rank].global_rank)}",
            item.backend,
            str(item.waits),
            f"{item.total_us:.0f}",
            f"{item.longest_us:.0f}",
        )
        for item in sorted(waits, key=lambda item: -item.total_us)[:_SHOWN_WAITS]
    ]
    return table(rows).splitlines()


def _dtypes(op: str, dtypes: list[str]) -> str:
    possible = [dtype for dtype in DTYPES if op == "all_reduce" or "float" in dtype]
    return "all" if dtypes == possible else ",".join(dtypes)


def _rule(rule: Rule, tuning: Sequence[str]) -> str:
    if rule.piece_nbytes is not None:
        bounds = f"in pieces of up to {size(rule.piece_nbytes)}"
    elif rule.max_nbytes is None and rule.min_nbytes <= 1:
        bounds = "any size"
    elif rule.max_nbytes is None:
        bounds = f"from {size(rule.min_nbytes)}"
    elif rule.min_nbytes <= 1:
        bounds = f"up to {size(rule.max_nbytes)}"
    else:
        bounds = f"{size(rule.min_nbytes)} to {size(rule.max_nbytes)}"
    multiples = f"multiples of {size(rule.multiple_nbytes)}" if rule.multiple_nbytes > 1 else ""
    wire = f"{rule.wire} wire" if rule.wire else ""
    text = ", ".join(filter(None, (f"{rule.backend} {bounds}", multiples, _shape_condition(rule), wire)))
    return f"{text} [{tuning.index(rule.tuned) + 1}]" if rule.tuned else text


def _shape_condition(rule: Rule) -> str:
    """Return the rule's condition on a message's shape; "" if it takes every shape."""
    tokens = "" if rule.max_tokens is None else f"up to {rule.max_tokens} tokens"
    hidden = f"hidden size a multiple of {rule.hidden_multiple}" if rule.hidden_multiple > 1 else ""
    return ", ".join(filter(None, (tokens, hidden)))
