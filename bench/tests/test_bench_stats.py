"""The medians' confidence intervals, compared with a count of all outcomes."""

from __future__ import annotations

import itertools
import statistics
from fractions import Fraction

import pytest
from comm_bench import stats
from hypothesis import given
from hypothesis import strategies as st

times = st.floats(0.1, 1e6)


def coverage(count: int, below: int) -> Fraction:
    """Return the probability that the median lies between the order statistics `below` and `count - 1 - below`.

    Each sample is above or below the median like a fair coin; the function counts all outcomes.
    """
    held = sum(below < sum(sides) < count - below for sides in itertools.product((0, 1), repeat=count))
    return Fraction(held, 2**count)


@pytest.mark.parametrize("count", range(1, 16))
def test_an_interval_is_the_narrowest_with_enough_confidence(count: int) -> None:
    below, confidence = stats.interval(count)
    assert 0 <= below <= (count - 1) // 2
    assert confidence == pytest.approx(float(coverage(count, below)), abs=1e-12)
    if below or count >= 6:
        assert confidence >= stats.CONFIDENCE
    else:
        assert confidence < stats.CONFIDENCE  # it spans all samples
    if below < (count - 1) // 2:
        assert coverage(count, below + 1) < stats.CONFIDENCE


def test_intervals_are_as_in_published_tables() -> None:
    # Conover's ranks for the median, from 1: of 15 samples the 4th and the 12th.
    found = {count: stats.interval(count) for count in (7, 9, 15, 20)}
    assert {count: below for count, (below, _) in found.items()} == {7: 0, 9: 1, 15: 3, 20: 5}
    assert found[15][1] == pytest.approx(0.9648, abs=5e-5)
    assert found[20][1] == pytest.approx(0.9586, abs=5e-5)


@given(st.integers(6, 200))
def test_more_samples_keep_enough_confidence(count: int) -> None:
    below, confidence = stats.interval(count)
    assert stats.CONFIDENCE <= confidence < 1
    assert stats.interval(count + 1)[0] in (below, below + 1)


def test_the_fewest_repetitions_give_an_interval() -> None:
    assert stats.interval(stats.MIN_SAMPLES)[1] >= stats.CONFIDENCE


def test_percentiles_are_interpolated() -> None:
    assert stats.spread([float(value) for value in range(11)][::-1]) == stats.Spread(5.0, 1.0, 9.0)
    assert stats.spread([10.0, 20.0]) == stats.Spread(15.0, 11.0, 19.0)
    assert stats.spread([3.0]) == stats.Spread(3.0, 3.0, 3.0)


@given(st.lists(times, min_size=2, max_size=40))
def test_a_spread_is_ordered_and_within(samples: list[float]) -> None:
    found = stats.spread(samples)
    rounding = 1 + 1e-12
    assert min(samples) <= found.p10 * rounding
    assert found.p10 <= found.p90 * rounding <= max(samples) * rounding**2
    assert found.median == statistics.median(samples)
    # As numpy's default: at 0.1 and 0.9 of the way from the first sample to the last.
    ordered = sorted(samples)
    for quantile, value in ((0.1, found.p10), (0.9, found.p90)):
        whole, part = divmod(quantile * (len(ordered) - 1), 1)
        low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
        assert value == pytest.approx(low + part * (high - low), rel=1e-9, abs=1e-9)


def test_a_ratio_is_the_median_of_pairs_ratios() -> None:
    ours, theirs = [1.0, 10.0, 100.0] * 5, [2.0, 20.0, 200.0] * 5
    assert stats.ratio(ours, theirs) == stats.Ratio(2.0, 2.0, 2.0, stats.interval(15)[1])
    # The ratio of the medians would be 1.
    assert stats.ratio([1.0, 2.0, 4.0], [4.0, 2.0, 2.0]).median == 1.0
    assert stats.ratio([1.0, 2.0, 3.0], [4.0, 2.0, 9.0]).median == 3.0


def test_faster_is_above_one() -> None:
    found = stats.ratio([1.0] * 7, [float(value) for value in range(2, 9)])
    assert (found.median, found.low, found.high) == (5.0, 2.0, 8.0)


def test_a_few_outliers_dont_move_the_interval() -> None:
    wild = [1e-9, 1e-9, 1e-9, *[1.0] * 9, 1e9, 1e9, 1e9]
    found = stats.ratio([1.0] * 15, wild)
    assert (found.median, found.low, found.high) == (1.0, 1.0, 1.0)
    wilder = [1e-9, *wild[:-1]]
    assert stats.ratio([1.0] * 15, wilder).low == 1e-9


@given(st.lists(st.tuples(times, times), min_size=1, max_size=30))
def test_swapping_times_and_reference_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    one, other = stats.ratio(ours, theirs), stats.ratio(theirs, ours)
    assert one.low <= one.median <= one.high
    assert one.low == pytest.approx(1 / other.high)
    assert one.high == pytest.approx(1 / other.low)
    assert one.confidence == other.confidence


def test_repetitions_that_dont_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats.ratio([1.0], [1.0, 2.0])


def test_a_geometric_mean() -> None:
    assert stats.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert stats.geometric_mean(iter([2.0, 4.0, 8.0])) == pytest.approx(4.0)
