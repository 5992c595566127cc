"""Checks of the evidence of all ranks before anything is decided: alike settings, a device for each rank. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from comm_core import _schema
from comm_core.errors import NegotiationError

if TYPE_CHECKING:
    from comm_core._plan.decide import Evidence

__all__ = ["check_devices", "check_policies", "describe_differences"]

# The longest text of one rank's value where ranks differ, as JSON in bytes.
_VALUE_NBYTES = 200


def describe_differences(values: Sequence[Any]) -> str:
    """Return the ranks' differing values as text, the most common value last: "{3: '550.54', others: '580.65'}".

    Args:
        values: the values by group rank.
    """
    texts = [_schema.shorten(repr(value), _VALUE_NBYTES) for value in values]
    most_common = Counter(texts).most_common(1)[0][0]
    outliers = [f"{rank}: {text}" for rank, text in enumerate(texts) if text != most_common]
    return "{" + ", ".join([*outliers[:8], *(["…"] if len(outliers) > 8 else []), f"others: {most_common}"]) + "}"


def check_policies(evidence: Sequence[Evidence], label: Callable[[int], str]) -> None:
    """Check that every rank can negotiate, and that the ranks' settings are equal.

    Args:
        evidence: the evidence by group rank.
        label: returns the name of a group rank for texts.

    Raises:
        NegotiationError: a rank reported an error, or settings differ; the text names the ranks and their values.
    """
    errors: dict[tuple[str, ...], list[int]] = {}
    for rank, item in enumerate(evidence):
        if item.error:
            errors.setdefault((item.error, *item.excerpt), []).append(rank)
    if errors:
        # A misspelt setting fails alike on thousands of ranks, so each text is reported once.
        texts = (
            f"{label(ranks[0])}{f' and {len(ranks) - 1} more' if len(ranks) > 1 else ''}: " + "\n".join(lines)
            for lines, ranks in errors.items()
        )
        raise NegotiationError("this group can't negotiate: " + "; ".join(texts))
    for key in dict.fromkeys(key for item in evidence for key in item.policy):
        values = [item.policy.get(key) for item in evidence]
        if any(value != values[0] for value in values):
            raise NegotiationError(
                f"{key} differs between the ranks of this group: {describe_differences(values)}. The negotiation "
                "fails, because the ranks would choose different backends. Give every rank the same value"
            )


def check_devices(evidence: Sequence[Evidence], label: Callable[..., str]) -> None:
    """Check that no two ranks of one host use the same GPU; ranks without a GPU aren't concerned.

    Args:
        evidence: the evidence by group rank.
        label: returns the name of some group ranks for texts.

    Raises:
        NegotiationError: ranks use the same GPU; the text names the first such ranks.
    """
    users: dict[tuple[str, str], list[int]] = {}
    for rank, item in enumerate(evidence):
        if item.info.device is not None:
            users.setdefault((item.info.host.id, item.info.device.uuid), []).append(rank)
    for (_, uuid), ranks in users.items():
        if len(ranks) > 1:
            shown = label(*ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
            raise NegotiationError(
                f"{shown} use the same GPU, {uuid}, on host {evidence[ranks[0]].info.host.name}. The negotiation "
                "fails, because NCCL and others need a GPU for each rank. Call torch.cuda.set_device(local_rank) "
                "before comm.get_backend, or pass device_id to init_process_group. Ranks that have to share a GPU need "
                "a group with backend='gloo'"
            )
