"""Exchange a rank's evidence and its plugins' answers with the group: made to fit, and read as data of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comm_core._control.stage import MESSAGE_NBYTES, Stage
from comm_core._control.store import Control
from comm_core._plan.checks import check_devices, check_policies
from comm_core._plan.decide import Evidence
from comm_core._plan.fit import fit_answers, fit_evidence
from comm_core._plan.parse import parse_answers, parse_evidence

__all__ = ["exchange_answers", "exchange_evidence"]


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


def exchange_answers(control: Control, answers: Mapping[str, dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Return the encoded answers of every rank's backends, by group rank. Collective.

    Raises:
        NegotiationError: a rank's answers can't be read.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    with Stage(control, "ask") as stage:
        gathered = stage.all_gather(fit_answers(answers, MESSAGE_NBYTES))
    return parse_answers(gathered, answers.keys(), control.label)
