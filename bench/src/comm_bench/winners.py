"""From measured times to rules and variants: few, and none that the measurement doesn't support. Pure, without torch.

A rule puts one backend first for a range of sizes. It is worth its place if the gains over the plan without rules add
up to more than `RULE_COST`. Sizes where the confidence interval has both a gain and a loss count nothing. The same
holds for a choice of a variant, against the one that the backend uses by itself.
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

__all__ = ["RULE_COST", "Choice", "choices_of", "choose", "choose_variants", "rules_of"]

RULE_COST = math.log(1.05)
"""The least gain of a rule: the sum over its sizes of the logarithm of how many times as fast they become."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One message, and the backends among which a rule may choose, or the variants of a backend.

    Attributes:
        op: one of `comm_bench.cases.OPS`.
        mode: one of `comm_core.types.MODES`.
        nbytes: the message's size in bytes.
        planned: the backend that serves it without rules, or the variant without choices.
        times_us: by backend or variant, the slowest rank's time of one call, by repetition.
    """

    op: str
    mode: str
    nbytes: int
    planned: str
    times_us: Mapping[str, tuple[float, ...]]

    def gain(self, name: str) -> float:
        """Return the logarithm of how many times as fast as planned a way is; 0 if undecided, -inf if unknown.

        A gain counts with the lower end of its confidence interval, a loss with its median.
        """
        if name == self.planned:
            return 0.0
        if name not in self.times_us or self.planned not in self.times_us:
            return -math.inf
        ratio = stats.ratio(self.times_us[name], self.times_us[self.planned])
        return math.log(ratio.low if ratio.low > 1 else ratio.median if ratio.high < 1 else 1.0)


def rules_of(rows: Sequence[Row], decision: Decision, device_type: str) -> tuple[tuple[TuningRule, ...], list[Choice]]:
    """Return the rules that measured rows support, and the choices on which they rest.

    Args:
        rows: the rows of backends and of `torch_distributed`, of one dtype, out of place.
        decision: the group's plan without rules.
        device_type: the device type of the rows.
    """
    rules: list[TuningRule] = []
    choices: list[Choice] = []
    # The sum first: a composed fused call takes the backend that then serves the sum.
    for op in OPS:
        found = choices_of([row for row in rows if row.case.op == op], decision, tuple(rules))
        for mode in dict.fromkeys(choice.mode for choice in found):
            rules += choose([choice for choice in found if choice.mode == mode], device_type)
        choices += found
    return tuple(rules), choices


def choices_of(rows: Sequence[Row], decision: Decision, rules: Sequence[TuningRule]) -> list[Choice]:
    """Return a choice for each measured message of one operation, by mode and size.

    Args:
        rows: the rows of one operation.
        decision: the group's plan without rules.
        rules: the rules for the plain sum.
    """
    by_case: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case.mode, row.case.nbytes), []).append(row)
    choices = []
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
        choices.append(Choice(case.op, mode, nbytes, planned, times))
    return choices


def _holds(rule: TuningRule, nbytes: int) -> bool:
    return rule.min_nbytes <= nbytes and (rule.max_nbytes is None or nbytes <= rule.max_nbytes)


def choose(choices: Sequence[Choice], device_type: str) -> list[TuningRule]:
    """Return the rules with the greatest gain for one operation and mode.

    Args:
        choices: the choices, by ascending size.
        device_type: the device type of the rules.
    """
    return [
        TuningRule(backend, math.inf, choices[0].op, choices[0].mode, device_type, *bounds)
        for backend, bounds in _best_ranges(choices)
    ]


def choose_variants(choices: Sequence[Choice]) -> list[VariantChoice]:
    """Return the variants with the greatest gain for one operation of a backend.

    Args:
        choices: the choices, by ascending size.
    """
    return [VariantChoice(choices[0].op, variant, *bounds) for variant, bounds in _best_ranges(choices)]


def _best_ranges(choices: Sequence[Choice]) -> list[tuple[str, tuple[int, int | None]]]:
    """Return the ways to take in place of the planned ones, each with the smallest and the largest message."""
    names = list(dict.fromkeys(name for choice in choices for name in choice.times_us))
    # The greatest gain of the first `end` sizes, and the ranges (name, first, end).
    best: list[tuple[float, tuple[tuple[str, int, int], ...]]] = [(0.0, ())]
    for end in range(1, len(choices) + 1):
        found = best[end - 1]
        for name in names:
            total = -RULE_COST
            for first in reversed(range(end)):
                total += choices[first].gain(name)
                before, parts = best[first]
                # What is planned needs no range: one begins and ends where it changes something.
                useful = name not in {choices[first].planned, choices[end - 1].planned}
                if useful and before + total > found[0] + 1e-12:
                    found = before + total, (*parts, (name, first, end))
        best.append(found)
    sizes = [choice.nbytes for choice in choices]

    def middle(index: int) -> int:
        return (sizes[index - 1] + sizes[index]) // 2

    return [
        (name, (middle(first) + 1 if first else 0, middle(end) if end < len(sizes) else None))
        for name, first, end in best[-1][1]
    ]
