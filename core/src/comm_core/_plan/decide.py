"""From the evidence of all ranks to one decision: the same function of the same data on every rank. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from comm_core._plan.routes import Cell, Offer, narrow, owners, plan_routes
from comm_core.errors import NegotiationError
from comm_core.topology import RankInfo
from comm_core.types import OPS, TERMINAL, Available, Candidate, Decision, Range, Unavailable

__all__ = [
    "Evidence",
    "Slate",
    "check_policies",
    "describe_differences",
    "encode_answer",
    "initial_slate",
    "merge",
    "nominate",
    "once_prepared",
    "with_explicit_ranges",
]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one rank brings to the negotiation.

    Attributes:
        info: what it reported of itself and its host.
        policy: its arguments and settings, by the name under which a user knows each.
        failures: why a backend can't be used on this rank (it doesn't load, its `probe` raised), by backend.
        error: why this rank can't negotiate at all, such as a setting that can't be read.
    """

    info: RankInfo
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The evidence as JSON; about 1 KB on a host with 8 GPUs."""
        return {
            "info": self.info.to_json(),
            "policy": dict(self.policy),
            "failures": dict(self.failures),
            "error": self.error,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """The inverse of `to_json`."""
        return cls(RankInfo.from_json(data["info"]), data["policy"], data["failures"], data["error"])


@dataclasses.dataclass(frozen=True)
class Slate:
    """The backends of a group while they are tried: who still may serve, and who was dropped and why.

    Attributes:
        offers: in the order in which they are preferred.
        dropped: the others.
    """

    offers: tuple[Offer, ...]
    dropped: tuple[Candidate, ...] = ()

    def offer(self, name: str) -> Offer:
        """The offer of the backend `name`, which still stands."""
        return next(offer for offer in self.offers if offer.name == name)

    def without(self, name: str, reason: str, rank: int | None = None) -> Slate:
        """The slate after the backend `name` failed."""
        offer = self.offer(name)
        failed = Candidate(name, "failed", reason, rank, offer.priority, offer.version)
        return Slate(tuple(o for o in self.offers if o is not offer), (*self.dropped, failed))

    def without_cells(
        self, name: str, wrong: Mapping[Cell, tuple[str, int | None]], device_types: Sequence[str]
    ) -> Slate:
        """The slate without the kinds of message that a backend failed; without the backend, if none is left.

        Args:
            name: the backend.
            wrong: why each kind failed, and the group rank that said so, None for all; at least one.
            device_types: of the group's tensors.
        """
        ranges = narrow(self.offer(name).ranges, set(wrong), device_types)
        if any(not item.prepared for item in ranges):
            return self.narrowed(name, ranges)
        reason, rank = next(iter(wrong.values()))
        return self.without(name, f"admission: {reason}", rank)

    def narrowed(self, name: str, ranges: Sequence[Range]) -> Slate:
        """The slate with other ranges for the backend `name`."""
        replaced = (dataclasses.replace(o, ranges=tuple(ranges)) if o.name == name else o for o in self.offers)
        return Slate(tuple(replaced), self.dropped)

    def owners_once_prepared(self, asked: Collection[str], device_types: Sequence[str]) -> set[str]:
        """The backends that would own a route if all that weren't asked to prepare yet served all that they offer."""
        hopeful = (
            offer if offer.name in asked else dataclasses.replace(offer, ranges=once_prepared(offer.ranges))
            for offer in self.offers
        )
        return owners(plan_routes(tuple(hopeful), device_types))

    def decision(self, device_types: Sequence[str], notes: Mapping[str, str] | None = None) -> Decision:
        """What this slate means for every kind of message.

        Args:
            device_types: of the group's tensors.
            notes: by backend, what else there is to say of one that serves.
        """
        routes = plan_routes(self.offers, device_types)
        serving = {rule.backend for route in routes for rule in route.rules}
        standing = [
            Candidate(
                offer.name,
                "serves" if offer.name in serving else "standby",
                (notes or {}).get(offer.name) or _standing(offer, offer.name in serving),
                priority=offer.priority,
                version=offer.version,
            )
            for offer in self.offers
        ]
        dropped = sorted(self.dropped, key=lambda c: (-(c.priority or 0), c.name))
        terminal = Candidate(TERMINAL, "serves", "always there", priority=0)
        return Decision((*standing, *dropped, terminal), routes)


def once_prepared(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The ranges, with none of them waiting to be prepared."""
    return tuple(dataclasses.replace(item, prepared=False) for item in ranges)


def _standing(offer: Offer, serves: bool) -> str:
    """What there is to say of a backend that may serve."""
    if any(item.prepared for item in offer.ranges):
        return (
            "available on every rank; more once comm.pre_capture_init has prepared it"
            if serves
            else ("serves once comm.pre_capture_init has prepared it")
        )
    return "available on every rank" if serves else "others come first everywhere"


def describe_differences(values: Sequence[Any]) -> str:
    """Where ranks differ, and how: "{3: '550.54', others: '580.65'}"; the value that most ranks have comes last.

    Args:
        values: one a group rank.
    """
    texts = [repr(value) for value in values]
    usual = Counter(texts).most_common(1)[0][0]
    odd = [f"{rank}: {text}" for rank, text in enumerate(texts) if text != usual]
    return "{" + ", ".join([*odd[:8], *(["…"] if len(odd) > 8 else []), f"others: {usual}"]) + "}"


def check_policies(evidence: Sequence[Evidence], label: Callable[[int], str]) -> None:
    """Raise what no rank may decide alone: an error of one of them, or settings that differ.

    Args:
        evidence: by group rank.
        label: names a group rank.

    Raises:
        NegotiationError: naming the ranks and what differs.
    """
    errors: dict[str, list[int]] = {}
    for rank, item in enumerate(evidence):
        if item.error:
            errors.setdefault(item.error, []).append(rank)
    if errors:
        # A misspelt setting is the same on thousands of ranks: each text once.
        told = (
            f"{label(ranks[0])}{f' and {len(ranks) - 1} more' if len(ranks) > 1 else ''}: {text}"
            for text, ranks in errors.items()
        )
        raise NegotiationError("this group can't negotiate: " + "; ".join(told))
    for key in dict.fromkeys(key for item in evidence for key in item.policy):
        values = [item.policy.get(key) for item in evidence]
        if any(value != values[0] for value in values):
            raise NegotiationError(
                f"{key} differs between the ranks of this group: {describe_differences(values)}. No backend is chosen, "
                "since each rank would choose another. Give every rank the same value"
            )


def nominate(
    evidence: Sequence[Evidence], wanted: Sequence[str] | None, disabled: Sequence[str], wanted_by: str
) -> tuple[dict[str, str | None], tuple[Candidate, ...]]:
    """Whom to ask: the backends that are there on every rank at one version, and that nobody blocks.

    Args:
        evidence: by group rank; policies agree.
        wanted: no others are tried; None means any.
        disabled: never tried.
        wanted_by: what `wanted` comes from, for the reason.

    Returns:
        The versions of those to be asked, by name; and the others with their reasons.
    """
    known: dict[str, None] = {}
    for item in evidence:
        known.update(dict.fromkeys([*item.info.plugins, *item.failures]))
    known.update(dict.fromkeys(name for name in wanted or () if name != TERMINAL))
    asked: dict[str, str | None] = {}
    dropped = []
    for name in sorted(known):
        if name in disabled:
            dropped.append(Candidate(name, "blocked", "COMM_CORE_DISABLE names it"))
        elif wanted is not None and name not in wanted:
            dropped.append(Candidate(name, "blocked", f"{wanted_by} names others"))
        else:
            versions = [item.info.plugins.get(name) for item in evidence]
            candidate = _absence(name, evidence, versions)
            if candidate is None:
                asked[name] = versions[0]
            else:
                dropped.append(candidate)
    return asked, tuple(dropped)


def _absence(name: str, evidence: Sequence[Evidence], versions: Sequence[str | None]) -> Candidate | None:
    """Why a backend can't be asked on every rank; None where it can."""
    for rank, item in enumerate(evidence):
        if name in item.failures:
            return Candidate(name, "unavailable", item.failures[name], rank, version=versions[rank])
    if not any(version is not None for version in versions):
        return Candidate(name, "unavailable", "not installed on any rank")
    if None in versions:
        return Candidate(name, "unavailable", "not installed here, though on other ranks", versions.index(None))
    if any(version != versions[0] for version in versions):
        return Candidate(name, "unavailable", f"its version differs between ranks: {describe_differences(versions)}")
    return None


def encode_answer(answer: Available | Unavailable | str) -> dict[str, Any]:
    """An answer of `is_available` as JSON; a string is why there is none."""
    if isinstance(answer, Available):
        ranges = [item.to_json() for item in answer.ranges]
        return {"priority": answer.priority, "ranges": ranges, "checks_operands": answer.checks_operands}
    return {"reason": answer.reason if isinstance(answer, Unavailable) else answer}


def _decode(data: Mapping[str, Any]) -> Available:
    """The inverse of `encode_answer`, for a backend that is available."""
    return Available(data["priority"], tuple(map(Range.from_json, data["ranges"])), data["checks_operands"])


def initial_slate(
    asked: Mapping[str, str | None],
    answers: Sequence[Mapping[str, Mapping[str, Any]]],
    dropped: Sequence[Candidate] = (),
) -> Slate:
    """The slate that every rank starts from.

    A backend must say yes on every rank. Answers that differ merge to the lowest priority and the intersection of the
    ranges. Order: priority, then name.

    Args:
        asked: the versions of the backends that were asked, by name.
        answers: what `encode_answer` made of each backend's answer, by name; one mapping a group rank.
        dropped: those that weren't asked.
    """
    offers, refused = [], list(dropped)
    for name, version in asked.items():
        merged = merge([answer[name] for answer in answers])
        if isinstance(merged, Available):
            offers.append(Offer(name, merged.priority, merged.ranges, version, merged.checks_operands))
        else:
            reason, rank = merged
            refused.append(Candidate(name, "unavailable", reason, rank, version=version))
    offers.sort(key=lambda offer: (-offer.priority, offer.name))
    return Slate(tuple(offers), tuple(refused))


def merge(answers: Sequence[Mapping[str, Any]]) -> Available | tuple[str, int | None]:
    """What all ranks' answers of one backend amount to, or the reason against it and who gave it.

    Args:
        answers: what `encode_answer` made of them, by group rank.
    """
    for rank, answer in enumerate(answers):
        if "reason" in answer:
            everywhere = all(other == answer for other in answers)
            return answer["reason"], None if everywhere else rank
    first = _decode(answers[0])
    if all(answer == answers[0] for answer in answers):
        return first
    priority, ranges, checks_operands = first.priority, first.ranges, first.checks_operands
    # Each answer once: thousands of ranks give a handful of different ones.
    for answer in {json.dumps(answer, sort_keys=True): answer for answer in answers}.values():
        other = _decode(answer)
        priority = min(priority, other.priority)
        checks_operands = checks_operands and other.checks_operands
        pairs = (one.intersect(two) for one in ranges for two in other.ranges)
        ranges = tuple(dict.fromkeys(both for both in pairs if both is not None))
    if not ranges:
        return "the ranks' answers have no range in common", None
    return Available(priority, ranges, checks_operands)


def with_explicit_ranges(
    answer: Available, hooks: Sequence[str], asked: str = "is_available"
) -> Available | Unavailable:
    """An answer with its ranges made explicit, and checked against the hooks that the plugin implements.

    Args:
        answer: what a hook returned; no ranges means all that the hooks serve.
        hooks: the plugin's hooks.
        asked: the hook that returned it.
    """
    ops = [op for op in OPS if op in hooks]
    missing = sorted({item.op for item in answer.ranges} - set(ops))
    if missing:
        return Unavailable(f"{asked} names ranges of {', '.join(missing)}, which the plugin doesn't implement")
    return dataclasses.replace(answer, ranges=answer.ranges or tuple(Range(op) for op in ops))
