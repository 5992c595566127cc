"""Reports how a group's negotiation ended: raises where the caller named a backend that can't serve, and logs."""

from __future__ import annotations

import logging

from comm_core._control.store import Control
from comm_core._group.local_inputs import LocalInputs
from comm_core._group.negotiated import NegotiatedGroup
from comm_core.env import PREFIX
from comm_core.errors import BackendUnavailableError
from comm_core.types import TERMINAL, Candidate

__all__ = ["report_outcome"]

_log = logging.getLogger("comm_core")

# What this process has said of plugins that are broken or missed: once, in however many groups.
_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)


def report_outcome(agreed: NegotiatedGroup, title: str, control: Control, local: LocalInputs, broken: set[str]) -> None:
    """Raise where a backend that the caller named can't serve; log the outcome, once a group."""
    wanted, source = local.wanted
    lost = [
        candidate
        for candidate in agreed.decision.candidates
        if candidate.name in (wanted or ()) and candidate.verdict not in ("serves", "standby")
    ]
    if lost and local.request.backends is not None:
        for session in agreed.sessions.values():
            session.close(orderly=False)
        others = "".join(f"; neither can {other.name!r}: {_reason(other, control)}" for other in lost[1:])
        raise BackendUnavailableError(
            f"backend {lost[0].name!r} was named for {title} but can't serve it: {_reason(lost[0], control)}{others}. "
            f"No other is tried, because {source} names it. Leave it out to negotiate, or see: comm-core explain"
        )
    if control.rank != 0:
        return
    for candidate in lost:
        _log.warning(
            "%s names %r, which can't serve %s: %s. Falling back",
            source,
            candidate.name,
            title,
            _reason(candidate, control),
        )
    for name in local.settings.disable:
        if name != TERMINAL and name not in {*local.evidence.info.plugins, *local.evidence.failures}:
            # A switch that does nothing is most likely a name that is misspelt.
            _warn_once(f"{PREFIX}DISABLE names {name!r}, which isn't installed here")
    for candidate in agreed.decision.candidates:
        if candidate.name in broken and candidate.verdict == "unavailable":
            _warn_once(f"backend {candidate.name!r} can't be used: {_reason(candidate, control)}")
        # It said that it could serve: the group is slower than it should be, and nothing else shows that.
        if candidate.verdict == "failed" and candidate not in lost:
            why = _reason(candidate, control)
            _log.warning("backend %r failed for %s: %s. Falling back", candidate.name, title, why)
    rules = agreed.decision.route("all_reduce", "eager", agreed.topology.device_types[0], "float32").rules
    _log.info("%s: all-reduce by %s", title, ", then ".join(dict.fromkeys(rule.backend for rule in rules)))


def _reason(candidate: Candidate, control: Control) -> str:
    if candidate.rank is None:
        return candidate.reason
    return f"{control.label(candidate.rank)}: {candidate.reason}"
