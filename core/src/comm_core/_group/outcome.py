"""Report the outcome of a group's negotiation: raise if a backend that the caller named can't serve, and log."""

from __future__ import annotations

import logging

from comm_core._control.store import Control
from comm_core._group.local_inputs import LocalInputs
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._handle.session import close_all
from comm_core.env import PREFIX
from comm_core.errors import BackendUnavailableError
from comm_core.types import TERMINAL, Candidate

__all__ = ["report_outcome"]

_log = logging.getLogger("comm_core")

# This process's warnings of broken or missing plugins: each is logged once, not once a group.
_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _log.warning("%s", text)


def report_outcome(
    negotiated: NegotiatedGroup, title: str, control: Control, local: LocalInputs, broken: set[str]
) -> None:
    """Raise if a backend that the caller named can't serve; log the outcome, once a group.

    Args:
        negotiated: the outcome.
        title: the group's name in messages.
        control: the group's control channel.
        local: this rank's inputs.
        broken: names of plugins that failed to load or to probe, on any rank.

    Raises:
        BackendUnavailableError: `get_backend(backends=...)` names a backend that can't serve.
    """
    named, source = local.named_backends
    unable = [
        candidate
        for candidate in negotiated.decision.candidates
        if candidate.name in (named or ()) and candidate.verdict not in ("serves", "standby")
    ]
    if unable and local.request.backends is not None:
        close_all(negotiated.sessions.values(), timeout_s=negotiated.member.close_timeout_s)
        first, *rest = unable
        others = "".join(f"; neither can {other.name!r}: {_reason(other, control)}" for other in rest)
        raise BackendUnavailableError(
            f"backend {first.name!r} was named for {title} but can't serve it: {_reason(first, control)}{others}. "
            f"No other is tried, because {source} names it. Leave it out to negotiate, or see: comm-core explain"
        )
    if control.rank != 0:
        return
    for candidate in unable:
        _log.warning(
            "%s names %r, which can't serve %s: %s. Falling back",
            source,
            candidate.name,
            title,
            _reason(candidate, control),
        )
    tuned = dict.fromkeys(rule.backend for rule in local.settings.tuning.rules)
    for variable, names in (("DISABLE", local.settings.disable), ("TUNE", tuple(tuned))):
        for name in names:
            if name != TERMINAL and name not in {*local.evidence.info.plugins, *local.evidence.failures}:
                # Probably a misspelt name.
                _warn_once(f"{PREFIX}{variable} names {name!r}, which isn't installed here")
    for candidate in negotiated.decision.candidates:
        if candidate.name in broken and candidate.verdict == "unavailable":
            _warn_once(f"backend {candidate.name!r} can't be used: {_reason(candidate, control)}")
        # It offered to serve, so the group may be slower than expected, and only this warning says so.
        if candidate.verdict == "failed" and candidate not in unable:
            why = _reason(candidate, control)
            _log.warning("backend %r failed for %s: %s. Falling back", candidate.name, title, why)
    rules = negotiated.decision.route("all_reduce", "eager", negotiated.topology.device_types[0], "float32").rules
    _log.info("%s: all-reduce by %s", title, ", then ".join(dict.fromkeys(rule.backend for rule in rules)))


def _reason(candidate: Candidate, control: Control) -> str:
    if candidate.rank is None:
        return candidate.reason
    return f"{control.label(candidate.rank)}: {candidate.reason}"
