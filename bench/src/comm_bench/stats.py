"""Medians and their uncertainty. Pure.

Intervals come from order statistics: the median of the distribution lies between the k-th smallest and the k-th largest
of n samples unless fewer than k of them fell on one side, which the binomial distribution of a fair coin gives the
probability of, whatever the samples' own distribution (Conover, Practical Nonparametric Statistics, section 3.2).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

__all__ = ["CONFIDENCE", "FEWEST", "Ratio", "Spread", "geometric_mean", "interval", "ratio", "spread"]

#: Samples below which no interval of `CONFIDENCE` exists with one sample to spare.
FEWEST = 7
#: The least probability with which an interval holds the median.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """Samples in three numbers, in their unit."""

    median: float
    p10: float
    p90: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another.

    Attributes:
        median: of the ratios of the repetitions.
        low: the lower end of the median's confidence interval.
        high: the upper end.
        confidence: the probability with which the interval holds the median.
    """

    median: float
    low: float
    high: float
    confidence: float


def spread(samples: Sequence[float]) -> Spread:
    """Median, tenth and ninetieth percentile, interpolated."""
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[-1])


def interval(count: int) -> tuple[int, float]:
    """Of `count` ordered samples, which lies at an interval's lower end, from 0, and the interval's confidence.

    The narrowest one of at least `CONFIDENCE`; of too few samples all that there is.
    """
    outside, best = 0.0, (0, 1 - 2 * 0.5**count)
    for below in range(count // 2):
        outside += math.comb(count, below) * 0.5**count
        if 1 - 2 * outside < CONFIDENCE:
            break
        best = (below, 1 - 2 * outside)
    return best


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """How many times as fast as the reference, from times of the same repetitions, pair by pair."""
    pairs = sorted(theirs / ours for ours, theirs in zip(times, reference, strict=True))
    low, confidence = interval(len(pairs))
    return Ratio(statistics.median(pairs), pairs[low], pairs[-1 - low], confidence)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))
