"""Exchange a rank's evidence and its plugins' answers with the group: fitted into a message, and checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comm_core._control.stage import MESSAGE_NBYTES, Stage
from comm_core._control.store import Control
from comm_core._plan.checks import check_devices, check_policies
from comm_core._plan.decide import Evidence
from comm_core._plan.fit import fit_answers, fit_evidence
from comm_core._plan.parse import parse_answers, parse_each, parse_evidence, read_pair, read_table_vote
from comm_core._schema import json_nbytes

__all__ = ["exchange_answers", "exchange_evidence"]

# What JSON adds to the two parts of an answering message, in bytes.
_FRAME_NBYTES = 16


def exchange_evidence(control: Control, evidence: Evidence) -> list[Evidence]:
    """Return the evidence of every rank, by group rank, with equal policies. Collective.

    Raises:
        NegotiationError: the ranks have different releases of comm-core or different settings, two of them use one
            device, a rank can't negotiate, or its evidence can't be read.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    with Stage(control, "probe") as stage:
        gathered = stage.all_gather(fit_evidence(evidence, MESSAGE_NBYTES).to_json())
    found = parse_evidence(gathered, control.label)
    check_policies(found, control.label)
    check_devices(found, control.label)
    return found


def exchange_answers(
    control: Control, answers: Mapping[str, dict[str, Any]], table_vote: tuple[str, str]
) -> tuple[list[dict[str, dict[str, Any]]], list[tuple[str, str]]]:
    """Return the encoded answers of every rank's backends, and its vote on a tuned table, by group rank. Collective.

    Args:
        control: the group's control channel.
        answers: this rank's answers, by backend.
        table_vote: the digest of this rank's tuned table, "" for none, and why it can't use the one that it found.

    Raises:
        NegotiationError: a rank's answers can't be read.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    with Stage(control, "ask") as stage:
        room = MESSAGE_NBYTES - json_nbytes(table_vote) - _FRAME_NBYTES
        gathered = stage.all_gather([fit_answers(answers, room), table_vote])
    pairs = parse_each(gathered, read_pair, control.label)
    votes = parse_each([vote for _, vote in pairs], read_table_vote, control.label)
    return parse_answers([encoded for encoded, _ in pairs], answers.keys(), control.label), votes
