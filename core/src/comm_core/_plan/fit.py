"""Fit a rank's evidence and answers into one message, whatever is installed. Pure.

A plugin may cost the others room, but never the group its negotiation: reasons are shortened, and what still doesn't
fit is refused by the plugin's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from comm_core._plan.decide import Evidence
from comm_core._schema import json_nbytes, shorten

__all__ = ["fit_answers", "fit_evidence", "fit_reasons"]

# The longest reason of one plugin as JSON, and the room kept for each before facts are refused for others, in bytes.
_REASON_NBYTES = 1500
_RESERVED_NBYTES = 200
# What JSON adds to a name and its text: quotes, colon and comma; and to the message: the names of two fields. In bytes.
_FRAME_NBYTES = 4
_FIELDS_NBYTES = 64


def fit_evidence(evidence: Evidence, nbytes: int) -> Evidence:
    """Return the evidence, with shorter reasons and without some plugins' facts if it takes more than `nbytes`.

    Args:
        evidence: this rank's evidence.
        nbytes: the longest message, in bytes as JSON.
    """
    facts, failures = dict(evidence.info.facts), dict(evidence.failures)
    bare = _with(evidence, {}, {})
    room = nbytes - json_nbytes(bare.to_json()) - _FIELDS_NBYTES
    if room < sum(map(_name_nbytes, {*facts, *failures})):
        # Names, versions and settings are limited where they are read: this takes thousands of backends.
        info = dataclasses.replace(bare.info, plugins={}, unknown={})
        return Evidence(info, {}, {}, "the names of the installed backends don't fit into a message. Uninstall some")
    sizes = {name: _name_nbytes(name) + json_nbytes(fact) for name, fact in facts.items()}
    names = sum(map(_name_nbytes, failures))
    # The largest facts go first, so that few backends are refused.
    for name in sorted(facts, key=lambda name: (-sizes[name], name)):
        # Hundreds of failures get shorter reasons before they cost another backend its facts.
        if sum(sizes.values()) + names + min(len(failures) * _RESERVED_NBYTES, nbytes // 4) <= room:
            break
        del facts[name], sizes[name]
        failures[name] = "its probe() has facts that don't fit into this rank's message beside those of other backends"
        names += _name_nbytes(name)
    return _with(evidence, facts, fit_reasons(failures, room - sum(sizes.values())))


def _with(evidence: Evidence, facts: Mapping[str, Any], failures: Mapping[str, str]) -> Evidence:
    return dataclasses.replace(evidence, info=dataclasses.replace(evidence.info, facts=facts), failures=failures)


def _name_nbytes(name: str) -> int:
    return json_nbytes(name) + _FRAME_NBYTES


def fit_reasons(reasons: Mapping[str, str], nbytes: int) -> dict[str, str]:
    """Return the reasons by name, the longest ones shortened until all take at most `nbytes` bytes as JSON.

    Short reasons stay whole. `nbytes` is at least what the names take.
    """
    left = max(nbytes - sum(map(_name_nbytes, reasons)), 0)
    fitted = {}
    # From the shortest: what it leaves of its equal share goes to the longer ones.
    for count, name in enumerate(sorted(reasons, key=lambda name: (json_nbytes(reasons[name]), name))):
        share = min(left // (len(reasons) - count), _REASON_NBYTES)
        fitted[name] = shorten(reasons[name], share) if share >= 3 else ""
        left -= json_nbytes(fitted[name]) - 2
    return {name: fitted[name] for name in sorted(fitted)}


def fit_answers(answers: Mapping[str, dict[str, Any]], nbytes: int) -> dict[str, dict[str, Any]]:
    """Return the encoded answers; if they take more than `nbytes` together, the largest become refusals.

    Args:
        answers: the encoded answers by backend.
        nbytes: the longest message, in bytes as JSON.
    """
    fitted = dict(answers)
    by_size = sorted(fitted, key=lambda name: json_nbytes(fitted[name]))
    offers = [name for name in by_size if "reason" not in fitted[name]]
    while json_nbytes(fitted) > nbytes and offers:
        name = offers.pop()
        size = json_nbytes(fitted[name])
        fitted[name] = {"reason": f"its ranges take {size} bytes, too many beside the answers of the other backends"}
    if json_nbytes(fitted) > nbytes:
        reasons = {name: answer["reason"] for name, answer in fitted.items()}
        room = nbytes - len('{"reason":}') * len(fitted) - _FIELDS_NBYTES
        fitted = {name: {"reason": reason} for name, reason in fit_reasons(reasons, room).items()}
    return fitted
