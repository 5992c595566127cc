"""The search among the backends' variants: which one serves which size the fastest, on this very group.

For each message all variants are timed a few times, and then the best of them beside those in use, with as many
repetitions as backends have, and with their results compared. A message may have several shapes, since a choice holds
for all messages of its sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from comm_core.tuning import VariantChoice

from comm_bench.cases import OPS, BenchCase
from comm_bench.contenders import Absent, Contender, Job, State
from comm_bench.measure import Procedure, measure
from comm_bench.winners import Comparison, choose_variants

if TYPE_CHECKING:
    import torch

__all__ = ["Search", "Tried", "search"]

# Variants that are timed properly, beside those in use.
_BEST = 5
# Calls before the first timing of each variant, and its repetitions.
_FIRST_WARMUP, _FIRST_REPETITIONS = 1, 3


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings of a search.

    Attributes:
        messages: the messages, in the order in which they are measured. Each is a list of cases of one operation, with
            different shapes and similar sizes, in which the same variants are timed.
        procedure: the settings of the proper measurement.
        most: the most variants of a message to try; None: all of them.
        limit_s: the time in seconds in which the search has to end, estimated as for a run's cases.
    """

    messages: Sequence[Sequence[BenchCase]]
    procedure: Procedure
    most: int | None
    limit_s: float


@dataclasses.dataclass
class Tried:
    """What a search found; equal on every rank.

    Attributes:
        compared: by backend, the measured cases, each with the variants that were timed properly.
        choices: by backend, the variants that pay off.
        wrong: the number of wrong elements.
        unmeasured: the number of messages for which there was no time.
    """

    compared: dict[str, list[Comparison]] = dataclasses.field(default_factory=dict)
    choices: dict[str, tuple[VariantChoice, ...]] = dataclasses.field(default_factory=dict)
    wrong: int = 0
    unmeasured: int = 0


class _Variant(Contender):
    """A backend in one of its variants, for messages of any size."""

    kind = "backend"

    def __init__(self, backend: Contender, text: str, op: str) -> None:
        super().__init__(text)
        self._backend = backend
        self._choice = VariantChoice(op, text)

    def supports(self, case: BenchCase) -> bool:
        return self._backend.supports(case)

    def select(self) -> None:
        self._backend.use_variants((self._choice,))

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        return self._backend.call(state, weight, in_place=in_place)

    def capture(self) -> AbstractContextManager[None]:
        return self._backend.capture()

    def needs_spacer(self, case: BenchCase) -> bool:
        return self._backend.needs_spacer(case)

    def note_failure(self, job: Job) -> None:
        self._backend.note_failure(job)


def search(
    job: Job,
    contenders: Sequence[Contender],
    settings: Search,
    on_case: Callable[[int, int, BenchCase], None],
    drop: Callable[[BenchCase, str, str], None],
) -> Tried:
    """Time the contenders' variants, and let each contender use those that pay off. Collective.

    Args:
        job: the ranks.
        contenders: the same on every rank, in the same order.
        settings: the settings.
        on_case: called before a message, with its number, the number of all, and its first case.
        drop: called with a case, the name of a variant that fails in it, and the reason.
    """
    tried = Tried()
    todo = list(_offered(job, contenders, settings, drop))
    failed: set[Contender] = set()
    begun, longest_s = time.monotonic(), 0.0
    for number, (contender, in_use, texts) in enumerate(todo, 1):
        started_s = time.monotonic()
        # The first rank decides: the ranks' clocks differ.
        if job.all_gather(started_s - begun + longest_s)[0] > settings.limit_s:
            tried.unmeasured = len(todo) - number + 1
            break
        case = next(iter(in_use))
        on_case(number, len(todo), case)
        variants = [_Variant(contender, text, case.op) for text in texts]
        comparisons, wrong = _measure_best(job, in_use, variants, settings.procedure, drop)
        tried.wrong += wrong
        if comparisons:
            tried.compared.setdefault(contender.name, []).extend(comparisons)
        if contender.supports(case):
            contender.use_variants(())
        else:  # it failed
            failed.add(contender)
        job.barrier()  # no rank replays these graphs any more
        for variant in variants:
            variant.release()
        longest_s = max(longest_s, time.monotonic() - started_s)
    for contender in contenders:
        measured = tried.compared.get(contender.name, [])
        measured.sort(key=lambda comparison: (OPS.index(comparison.op), comparison.nbytes))
        if contender in failed:
            continue
        of_ops = (list(of_op) for _, of_op in itertools.groupby(measured, key=lambda comparison: comparison.op))
        if chosen := tuple(itertools.chain.from_iterable(map(choose_variants, of_ops))):
            tried.choices[contender.name] = chosen
            contender.use_variants(chosen)
    return tried


def _offered(
    job: Job,
    contenders: Sequence[Contender],
    settings: Search,
    drop: Callable[[BenchCase, str, str], None],
) -> Iterator[tuple[Contender, dict[BenchCase, str], tuple[str, ...]]]:
    """Yield the messages for which contenders have variants: the variant in use by case, and those to try. Collective.

    The variants in use come first; then those that are offered for every case.
    """
    for cases, contender in itertools.product(settings.messages, contenders):
        offers = {case: _variants(job, contender, case, drop) for case in cases}
        offers = {case: texts for case, texts in offers.items() if len(texts) > 1}
        if offers:
            in_use = {case: texts[0] for case, texts in offers.items()}
            common = (text for text in next(iter(offers.values())) if all(text in texts for texts in offers.values()))
            variants = tuple(dict.fromkeys([*in_use.values(), *common]))[: settings.most]
            if len(variants) > 1:
                yield contender, in_use, variants


def _variants(
    job: Job, contender: Contender, case: BenchCase, drop: Callable[[BenchCase, str, str], None]
) -> tuple[str, ...]:
    """Return a contender's variants for a case; () if a rank fails, or has others. Collective."""
    try:
        texts: tuple[str, ...] = job.run_collectively(lambda: contender.variants(case))
    except Absent as reason:
        drop(case, contender.name, str(reason))
        return ()
    if any(other != texts for other in job.all_gather(texts)):
        drop(case, contender.name, "its variants differ between the ranks")
        return ()
    return texts


def _measure_best(
    job: Job,
    in_use: Mapping[BenchCase, str],
    variants: Sequence[_Variant],
    procedure: Procedure,
    drop: Callable[[BenchCase, str, str], None],
) -> tuple[list[Comparison], int]:
    """Time all variants a few times, then those in use and the best of the others properly.

    Returns:
        A comparison of the latter for each case, and the number of wrong elements.
    """
    quick = dataclasses.replace(procedure, warmup=_FIRST_WARMUP, repetitions=_FIRST_REPETITIONS, checks=False)
    first, _ = _measure(job, in_use, variants, quick, drop)

    def worst(variant: _Variant) -> float:
        """Return the ratio of the variant's time to that of the one in use, in the case in which it is greatest."""
        return max((comparison.slowdown(variant.name) for comparison in first), default=math.inf)

    current = [variant for variant in variants if variant.name in in_use.values()]
    ratios = {variant: worst(variant) for variant in variants if variant not in current}
    best = [variant for variant in sorted(ratios, key=ratios.__getitem__) if ratios[variant] < math.inf][:_BEST]
    return _measure(job, in_use, [*current, *best], procedure, drop)


def _measure(
    job: Job,
    in_use: Mapping[BenchCase, str],
    variants: Sequence[_Variant],
    procedure: Procedure,
    drop: Callable[[BenchCase, str, str], None],
) -> tuple[list[Comparison], int]:
    """Time variants in all cases; return a comparison for each that has one, and the number of wrong elements."""
    comparisons, wrong = [], 0
    for case, text in in_use.items():
        found = measure(job, case, variants, procedure, functools.partial(drop, case))
        times_us = {measured.contender.name: measured.times_us for measured in found}
        if text in times_us:
            comparisons.append(Comparison(case.op, case.mode, case.nbytes, text, times_us))
        wrong += sum(measured.wrong or 0 for measured in found)
    return comparisons, wrong
