"""From measured times to rules and variants: few, and none that the measurement doesn't support. Pure, without torch.

A rule puts one backend first for a range of sizes. It is worth its place if the gains over the plan without rules add
up to more than `RULE_COST`, and if it is nowhere slower by more than `MAX_LOSS`. Sizes where the confidence interval
has both a gain and a loss count nothing. The same holds for a choice of a variant, against the one that the backend
uses by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from comm_core.tuning import TuningRule, VariantChoice
from comm_core.types import TERMINAL, Decision

from comm_bench import stats
from comm_bench.cases import OPS
from comm_bench.results import Row

__all__ = ["MAX_LOSS", "RULE_COST", "Comparison", "choose", "choose_variants", "comparisons_of", "rules_of"]

RULE_COST = math.log(1.05)
"""The least gain of a rule: the sum over its sizes of the logarithm of how many times as fast they become."""

MAX_LOSS = math.log(1.01)
"""The greatest loss of a rule at any measured size, as the logarithm of how many times as long it takes."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One message, and the backends among which a rule may choose, or the variants of a backend.

    Attributes:
        op: one of `comm_bench.cases.OPS`.
        mode: one of `comm_core.types.MODES`.
        nbytes: the message's size in bytes.
        planned: the backend that serves it without rules, or the variant in use without choices.
        times_us: by backend or variant, the slowest rank's time of one call, by repetition.
    """

    op: str
    mode: str
    nbytes: int
    planned: str
    times_us: Mapping[str, tuple[float, ...]]

    def gain(self, name: str) -> float:
        """Return the logarithm of how many times as fast as planned a way is; 0 if undecided.

        A gain counts with the lower end of its confidence interval, a loss with its median. The result is -inf for an
        unknown way, and for a loss of more than `MAX_LOSS`.
        """
        if name == self.planned:
            return 0.0
        ratio = self._ratio(name)
        if ratio is None:
            return -math.inf
        gain = math.log(ratio.low if ratio.low > 1 else ratio.median if ratio.high < 1 else 1.0)
        return gain if gain >= -MAX_LOSS else -math.inf

    def slowdown(self, name: str) -> float:
        """Return the median ratio of a way's time to the planned one's; inf if unknown."""
        ratio = self._ratio(name)
        return math.inf if ratio is None else 1 / ratio.median

    def _ratio(self, name: str) -> stats.Ratio | None:
        if name not in self.times_us or self.planned not in self.times_us:
            return None
        return stats.ratio(self.times_us[name], self.times_us[self.planned])


def rules_of(
    rows: Sequence[Row], decision: Decision, device_type: str
) -> tuple[tuple[TuningRule, ...], list[Comparison]]:
    """Return the rules that measured rows support, and the comparisons on which they rest.

    Args:
        rows: the rows of backends and of `torch_distributed`, of one dtype, out of place.
        decision: the group's plan without rules.
        device_type: the device type of the rows.
    """
    rules: list[TuningRule] = []
    comparisons: list[Comparison] = []
    # The sum first: a composed fused call takes the backend that then serves the sum.
    for op in OPS:
        found = comparisons_of([row for row in rows if row.case.op == op], decision, tuple(rules))
        for mode in dict.fromkeys(comparison.mode for comparison in found):
            rules += choose([comparison for comparison in found if comparison.mode == mode], device_type)
        comparisons += found
    return tuple(rules), comparisons


def comparisons_of(rows: Sequence[Row], decision: Decision, rules: Sequence[TuningRule]) -> list[Comparison]:
    """Return a comparison for each measured message of one operation, by mode and size.

    Args:
        rows: the rows of one operation.
        decision: the group's plan without rules.
        rules: the rules for the plain sum.
    """
    by_case: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case.mode, row.case.nbytes), []).append(row)
    comparisons = []
    for (mode, nbytes), of_case in sorted(by_case.items()):
        case = of_case[0].case
        sizes = (nbytes, *case.shape) if case.fused else (nbytes,)
        planned = decision.route(case.op, mode, case.device_type, case.dtype).backend_for(*sizes)
        times = {row.name: row.times_us for row in of_case if not row.composed}
        if case.fused:
            plain = decision.route(OPS[0], mode, case.device_type, case.dtype).backend_for(nbytes)
            for rule in rules:
                if rule.matches(rule.backend, OPS[0], mode, case.device_type) and _holds(rule, nbytes):
                    plain = rule.backend
            # A rule for `torch_distributed` means the composition of that sum and a norm.
            times.update((TERMINAL, row.times_us) for row in of_case if row.composed and row.name == plain)
        comparisons.append(Comparison(case.op, mode, nbytes, planned, times))
    return comparisons


def _holds(rule: TuningRule, nbytes: int) -> bool:
    return rule.min_nbytes <= nbytes and (rule.max_nbytes is None or nbytes <= rule.max_nbytes)


def choose(comparisons: Sequence[Comparison], device_type: str) -> list[TuningRule]:
    """Return the rules with the greatest gain for one operation and mode.

    Args:
        comparisons: the comparisons, by ascending size.
        device_type: the device type of the rules.
    """
    return [
        TuningRule(backend, math.inf, comparisons[0].op, comparisons[0].mode, device_type, *bounds)
        for backend, bounds in _best_ranges(comparisons)
    ]


def choose_variants(comparisons: Sequence[Comparison]) -> list[VariantChoice]:
    """Return the variants with the greatest gain for one operation of a backend.

    Args:
        comparisons: the comparisons, by ascending size.
    """
    return [VariantChoice(comparisons[0].op, variant, *bounds) for variant, bounds in _best_ranges(comparisons)]


def _best_ranges(comparisons: Sequence[Comparison]) -> list[tuple[str, tuple[int, int | None]]]:
    """Return the ways to take in place of the planned ones, each with the smallest and the largest message."""
    names = list(dict.fromkeys(name for comparison in comparisons for name in comparison.times_us))
    # The greatest gain of the first `end` sizes, and the ranges (name, first, end).
    best: list[tuple[float, tuple[tuple[str, int, int], ...]]] = [(0.0, ())]
    for end in range(1, len(comparisons) + 1):
        found = best[end - 1]
        for name in names:
            total = -RULE_COST
            for first in reversed(range(end)):
                total += comparisons[first].gain(name)
                before, parts = best[first]
                # What is planned needs no range: one begins and ends where it changes something.
                useful = name not in {comparisons[first].planned, comparisons[end - 1].planned}
                if useful and before + total > found[0] + 1e-12:
                    found = before + total, (*parts, (name, first, end))
        best.append(found)
    sizes = [comparison.nbytes for comparison in comparisons]

    def middle(index: int) -> int:
        return (sizes[index - 1] + sizes[index]) // 2

    return [
        (name, (middle(first) + 1 if first else 0, middle(end) if end < len(sizes) else None))
        for name, first, end in best[-1][1]
    ]
