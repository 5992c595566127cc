"""Medians and their confidence intervals. Pure.

The intervals come from order statistics. The distribution's median lies between the k-th smallest and the k-th largest
of n samples, unless fewer than k samples lie on one side of it. The binomial distribution of a fair coin gives the
probability of that, for any distribution of the samples (Conover, Practical Nonparametric Statistics, section 3.2).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

__all__ = ["CONFIDENCE", "MIN_SAMPLES", "Ratio", "Spread", "geometric_mean", "interval", "ratio", "spread"]

#: The least number of samples: one more than an interval of `CONFIDENCE` needs.
MIN_SAMPLES = 7
#: The least probability that an interval contains the median.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median and two percentiles of samples, in the samples' unit."""

    median: float
    p10: float
    p90: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A speed-up: the reference's time over the measured time.

    Attributes:
        median: the median of the repetitions' ratios.
        low: the lower end of the median's confidence interval.
        high: the upper end.
        confidence: the probability that the interval contains the median.
    """

    median: float
    low: float
    high: float
    confidence: float


def spread(samples: Sequence[float]) -> Spread:
    """Return the median and the tenth and ninetieth percentiles, interpolated."""
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[-1])


def interval(count: int) -> tuple[int, float]:
    """Return the index of the sample at the interval's lower end, among `count` sorted samples, and the confidence.

    The interval is the narrowest with at least `CONFIDENCE`; with too few samples, it spans all of them.
    """
    outside, best = 0.0, (0, 1 - 2 * 0.5**count)
    for below in range(count // 2):
        outside += math.comb(count, below) * 0.5**count
        if 1 - 2 * outside < CONFIDENCE:
            break
        best = (below, 1 - 2 * outside)
    return best


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare times with the reference's times of the same repetitions, pair by pair."""
    pairs = sorted(other / own for own, other in zip(times, reference, strict=True))
    low, confidence = interval(len(pairs))
    return Ratio(statistics.median(pairs), pairs[low], pairs[-1 - low], confidence)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))
