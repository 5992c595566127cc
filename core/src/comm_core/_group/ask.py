"""Ask the backends that every rank has about the group, and look for its tuned table: the slate to connect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from comm_core import tuned
from comm_core._control.store import Control
from comm_core._group.exchange import exchange_answers
from comm_core._group.local_inputs import LocalInputs, answers_of
from comm_core._plan import decide
from comm_core._schema import printable, shorten
from comm_core.topology import Topology
from comm_core.tuning import NO_TUNING, Tuning

__all__ = ["agree_on_table", "ask_backends"]

# The longest reason against a rank's table, as JSON in bytes.
_REASON_NBYTES = 500


def ask_backends(
    control: Control, local: LocalInputs, evidence: Sequence[decide.Evidence], topology: Topology
) -> decide.Slate:
    """Return the slate of the group's candidates, with the rules of its tuning. Collective.

    A tuned table holds if every rank has the same one, neither `COMM_CORE_TUNE` nor the caller chooses, and the group
    isn't deterministic.

    Raises:
        NegotiationError: a rank's answers can't be read.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    named, source = local.named_backends
    settings = local.settings
    asked, dropped = decide.screen_candidates(evidence, named, settings.disable, source, settings.plugins)
    if not asked:
        slate = decide.Slate((), dropped, settings.tuning, wire=local.wire)
        return slate.as_deterministic() if local.deterministic else slate
    answers = answers_of([local.plugins[name] for name in asked], topology, local.device, control.timeout_s)
    encoded = {name: decide.encode_answer(answer) for name, answer in answers.items()}
    # A deterministic group has other backends, and another fallback, than the groups in which tables are measured.
    may_use_table = settings.tune is None and local.request.backends is None and not local.deterministic
    table, objection = _find_table(topology, settings.cache_dir) if may_use_table else (None, "")
    gathered, votes = exchange_answers(control, encoded, ("" if table is None else table.digest, objection))
    tuning = agree_on_table(table, votes, control.label) if may_use_table else settings.tuning
    slate = dataclasses.replace(decide.initial_slate(asked, gathered, dropped), tuning=tuning, wire=local.wire)
    return slate.as_deterministic() if local.deterministic else slate


def _find_table(topology: Topology, cache_dir: str | None) -> tuple[tuned.TunedTable | None, str]:
    """Return the group's tuned table, if there is one; and why the one that was found can't be used, "" if it can."""
    try:
        return tuned.find_table(topology, cache_dir), ""
    except ValueError as error:
        return None, shorten(printable(str(error)), _REASON_NBYTES)


def agree_on_table(
    table: tuned.TunedTable | None, votes: Sequence[tuple[str, str]], label: Callable[[int], str]
) -> Tuning:
    """Return the tuning by the ranks' table if all have the same one, else none and why. Pure.

    Args:
        table: this rank's table.
        votes: by group rank, the digest of its table, "" for none, and why it can't use the one that it found.
        label: returns the name of a group rank for texts.
    """
    digests = [digest for digest, _ in votes]
    if table is not None and all(digest == table.digest for digest in digests):
        what = f"the tuned table {table.digest[:8]}"
        source = what if table.rules else f"{what} keeps the backends' own order"
        return Tuning(table.rules, source, table.variants)
    for rank, (_, reason) in enumerate(votes):
        if reason:
            return Tuning((), f"A tuned table isn't used: {label(rank)}: {reason}. Run comm-core tune again")
    if not any(digests):
        return NO_TUNING
    lacking = [rank for rank, digest in enumerate(digests) if not digest]
    why = (
        f"{label(lacking[0])} has none"
        if lacking
        else f"the ranks' tables differ: {decide.describe_differences(digests)}"
    )
    return Tuning((), f"A tuned table isn't used: {why}. Run comm-core tune on all hosts of this group")
