"""Decide from the evidence of all ranks: the same function of the same data on every rank. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from comm_core import _schema
from comm_core._plan.answers import (
    encode_answer,
    encode_prepared,
    merge_answers,
    merge_prepared,
    once_prepared,
    with_explicit_ranges,
)
from comm_core._plan.checks import describe_differences
from comm_core._plan.pieces import in_pieces
from comm_core._plan.routes import Cell, Offer, exclude_cells, owners, plan_routes
from comm_core.topology import RankInfo
from comm_core.tuning import NO_TUNING, Tuning
from comm_core.types import RANK_ORDER_FP32, TERMINAL, Available, Candidate, Decision, Range, Route

__all__ = [
    "Evidence",
    "Slate",
    "describe_differences",
    "encode_answer",
    "encode_prepared",
    "initial_slate",
    "merge_answers",
    "merge_prepared",
    "once_prepared",
    "screen_candidates",
    "with_explicit_ranges",
]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The input of one rank to the negotiation.

    Attributes:
        info: the facts about the rank and its host.
        policy: the rank's arguments and settings, by their names in the documentation.
        failures: by backend, the reason why this rank can't use it, such as a plugin that doesn't load.
        error: the reason why this rank can't negotiate at all, such as an unreadable setting; None if it can.
        excerpt: lines that show the place of the error in a setting.
    """

    info: RankInfo
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None
    excerpt: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as JSON; about 1 KB on a host with 8 GPUs."""
        return {
            # Alone in having this place in all releases: every release can say that another one has sent this.
            "comm_core": self.info.versions.get("comm_core", "unknown"),
            "info": self.info.to_json(),
            "policy": dict(self.policy),
            "failures": dict(self.failures),
            "error": self.error,
            "excerpt": list(self.excerpt),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Return the evidence that `to_json` encoded.

        Raises:
            ValueError: a field is missing or has the wrong type; the text names it.
        """
        evidence: Evidence = _EVIDENCE(data, "evidence")
        return evidence


_EVIDENCE = _schema.record(
    Evidence,
    info=lambda value, _where: RankInfo.from_json(value),
    policy=_schema.mapping_of(_schema.anything),
    failures=_schema.mapping_of(_schema.text),
    error=_schema.optional(_schema.text),
    excerpt=_schema.tuple_of(_schema.text, 0, 2),
)


@dataclasses.dataclass(frozen=True)
class Slate:
    """The candidates of a group during its negotiation: offers that may still serve, and dropped candidates.

    Attributes:
        offers: the remaining offers, the most preferred first.
        dropped: the dropped candidates, with their reasons.
        tuning: the rules that override the offers' priorities.
        deterministic: whether the group is deterministic.
        wire: the quantised wire that the group asks for; "": none.
    """

    offers: tuple[Offer, ...]
    dropped: tuple[Candidate, ...] = ()
    tuning: Tuning = NO_TUNING
    deterministic: bool = False
    wire: str = ""

    def offer(self, name: str) -> Offer:
        """Return the remaining offer of the backend `name`."""
        return next(offer for offer in self.offers if offer.name == name)

    def without(self, name: str, reason: str, rank: int | None = None) -> Slate:
        """Return the slate with the backend `name` dropped as failed."""
        offer = self.offer(name)
        failed = Candidate(name, "failed", reason, rank, offer.priority, offer.version)
        kept = tuple(o for o in self.offers if o is not offer)
        return dataclasses.replace(self, offers=kept, dropped=(*self.dropped, failed))

    def without_cells(
        self, name: str, failed: Mapping[Cell, tuple[str, int | None]], device_types: Sequence[str]
    ) -> Slate:
        """Return the slate without the kinds of message that a backend failed; drop the backend if none is left.

        Args:
            name: the backend.
            failed: at least one kind of message, with the reason and the group rank that gave it, None for all ranks.
            device_types: the device types of the group's tensors.
        """
        ranges = exclude_cells(self.offer(name).ranges, set(failed), device_types)
        # In a deterministic group a backend quantises only what it norms: such a range alone serves nothing.
        serving = (item for item in ranges if not (self.deterministic and item.op == "all_reduce_add_rms_norm_quant"))
        if any(not item.prepared for item in serving):
            return self.with_ranges(name, ranges)
        reason, rank = next(iter(failed.values()))
        return self.without(name, f"admission: {reason}", rank)

    def with_ranges(self, name: str, ranges: Sequence[Range]) -> Slate:
        """Return the slate with the backend `name` offering these ranges."""
        replaced = (dataclasses.replace(o, ranges=tuple(ranges)) if o.name == name else o for o in self.offers)
        return dataclasses.replace(self, offers=tuple(replaced))

    def with_prepared_ranges(self, name: str, ranges: Sequence[Range]) -> Slate:
        """Return the slate after a preparation of the backend `name`, which returned these ranges.

        In a deterministic group the preparation adds no fused ranges, since it would change the bits of such calls.
        """
        if self.deterministic:
            before = self.offer(name).ranges
            ranges = [item for item in ranges if item.op == "all_reduce" or item in before]
        return self.with_ranges(name, ranges)

    def as_deterministic(self) -> Slate:
        """Return the slate of a deterministic group: without the backends that sum in another way."""
        offers, dropped = [], list(self.dropped)
        for offer in self.offers:
            ranges = tuple(item for item in offer.ranges if item.op == "all_reduce" or not item.prepared)
            if offer.numerics == RANK_ORDER_FP32 and ranges:
                offers.append(dataclasses.replace(offer, ranges=ranges))
                continue
            numerics = f"the numerics of {offer.name} are {offer.numerics or 'unspecified'}"
            if offer.numerics == RANK_ORDER_FP32:
                numerics = f"{offer.name} serves only what it has prepared"
            reason = f"the group is deterministic, which takes {RANK_ORDER_FP32}; {numerics}"
            dropped.append(Candidate(offer.name, "unavailable", reason, priority=offer.priority, version=offer.version))
        return dataclasses.replace(self, offers=tuple(offers), dropped=tuple(dropped), deterministic=True)

    def routes(self, device_types: Sequence[str]) -> tuple[Route, ...]:
        """Return the routes for the device types of the group's tensors."""
        routes = plan_routes(self.offers, device_types, self.tuning.rules, self.wire)
        if not self.deterministic:
            return routes
        # Tuning rules are about sizes, and a message's size mustn't decide who norms its rows.
        untuned = plan_routes(self.offers, device_types)
        pairs = zip(routes, untuned, strict=True)
        return in_pieces([route if route.op == "all_reduce" else other for route, other in pairs])

    def owners_once_prepared(self, asked: Collection[str], device_types: Sequence[str]) -> set[str]:
        """Return the backends that would own a route once prepared.

        Args:
            asked: the backends whose `pre_capture_init` has run: their ranges count as they are. The others' ranges
                count as prepared.
            device_types: the device types of the group's tensors.
        """
        prepared = (
            offer if offer.name in asked else dataclasses.replace(offer, ranges=once_prepared(offer.ranges))
            for offer in self.offers
        )
        return owners(plan_routes(tuple(prepared), device_types, self.tuning.rules, self.wire))

    def decision(self, device_types: Sequence[str], notes: Mapping[str, str] | None = None) -> Decision:
        """Return the decision that this slate implies.

        Args:
            device_types: the device types of the group's tensors.
            notes: by backend, a text that replaces the reason of a remaining candidate.
        """
        routes = self.routes(device_types)
        serving = {rule.backend for route in routes for rule in route.rules}
        available = [
            Candidate(
                offer.name,
                "serves" if offer.name in serving else "standby",
                (notes or {}).get(offer.name) or self._availability_reason(offer, offer.name in serving),
                priority=offer.priority,
                version=offer.version,
            )
            for offer in self.offers
        ]
        dropped = sorted(self.dropped, key=lambda c: (-(c.priority or 0), c.name))
        reason = "always available"
        if self.deterministic:
            reason += "; it gathers the ranks' tensors, and core sums them in rank order"
        terminal = Candidate(TERMINAL, "serves", reason, priority=0)
        return Decision(
            (*available, *dropped, terminal),
            routes,
            tuple(map(str, self.tuning.rules)),
            self.tuning.source,
            self.deterministic,
            {name: tuple(map(str, choices)) for name, choices in self.tuning.variants.items()},
            self.wire,
        )

    def _availability_reason(self, offer: Offer, serves: bool) -> str:
        """Return the reason for the verdict "serves" or "standby"."""
        if any(item.prepared for item in offer.ranges):
            return (
                "available on every rank; more once comm.pre_capture_init has prepared it"
                if serves
                else "serves once comm.pre_capture_init has prepared it"
            )
        if serves:
            return "available on every rank"
        if all(item.wire not in ("", self.wire) for item in offer.ranges):
            return "it has only ranges with a wire, for which the group doesn't ask"
        if any(rule.backend == offer.name and rule.score == 0 for rule in self.tuning.rules):
            return "tuning rules exclude it, or backends earlier in the order serve its ranges"
        return "backends earlier in the order serve all of its ranges"


def screen_candidates(
    evidence: Sequence[Evidence],
    wanted: Sequence[str] | None,
    disabled: Sequence[str],
    wanted_by: str,
    imported: Sequence[str] | None = None,
) -> tuple[dict[str, str | None], tuple[Candidate, ...]]:
    """Split the known backends into those to ask, and those that are blocked or missing on a rank.

    Args:
        evidence: the evidence by group rank, after `check_policies`.
        wanted: the only backends that may be asked; None allows all.
        disabled: backends that must not be asked.
        wanted_by: the argument or variable that set `wanted`, for the reason.
        imported: the only backends that may be imported; None allows all.

    Returns:
        The backends installed on every rank at one version and not blocked, as versions by name; and the others as
        candidates with their reasons.
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
        elif imported is not None and name not in imported:
            dropped.append(Candidate(name, "blocked", "COMM_CORE_PLUGINS doesn't name it"))
        elif wanted is not None and name not in wanted:
            dropped.append(Candidate(name, "blocked", f"{wanted_by} names other backends"))
        else:
            versions = [item.info.plugins.get(name) for item in evidence]
            candidate = _absent_candidate(name, evidence, versions)
            if candidate is None:
                asked[name] = versions[0]
            else:
                dropped.append(candidate)
    return asked, tuple(dropped)


def _absent_candidate(name: str, evidence: Sequence[Evidence], versions: Sequence[str | None]) -> Candidate | None:
    """Return the dropped candidate for a backend that some rank can't use; None if every rank can."""
    for rank, item in enumerate(evidence):
        if name in item.failures:
            return Candidate(name, "unavailable", item.failures[name], rank, version=versions[rank])
    if not any(version is not None for version in versions):
        return Candidate(name, "unavailable", "not installed on any rank")
    if None in versions:
        return Candidate(name, "unavailable", "not installed here, but installed on other ranks", versions.index(None))
    if any(version != versions[0] for version in versions):
        return Candidate(name, "unavailable", f"its version differs between ranks: {describe_differences(versions)}")
    return None


def initial_slate(
    asked: Mapping[str, str | None],
    answers: Sequence[Mapping[str, Mapping[str, Any]]],
    dropped: Sequence[Candidate] = (),
) -> Slate:
    """Return the slate before any backend is connected: the available backends by priority, then name.

    A backend must be available on every rank; see `merge_answers`.

    Args:
        asked: the versions of the backends that were asked, by name.
        answers: the encoded answers by backend, one mapping a group rank.
        dropped: the candidates that weren't asked.
    """
    offers, dropped = [], list(dropped)
    for name, version in asked.items():
        merged = merge_answers([answer[name] for answer in answers])
        if isinstance(merged, Available):
            offers.append(Offer(name, merged.priority, merged.ranges, version, merged.checks_operands, merged.numerics))
        else:
            reason, rank = merged
            dropped.append(Candidate(name, "unavailable", reason, rank, version=version))
    offers.sort(key=lambda offer: (-offer.priority, offer.name))
    return Slate(tuple(offers), tuple(dropped))
