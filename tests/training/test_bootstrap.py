"""Bootstrap intervals against slow loops and against what the normal distribution says."""

from __future__ import annotations

import numpy as np
import pytest
from openbook_training.bootstrap import RESAMPLES, SEED, interval, paired_difference, resampled


def test_the_interval_is_the_middle_of_the_means_of_resampled_questions() -> None:
    values = np.random.default_rng(1).random(12)
    rng, means = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(12, size=12)
        means.append(sum(values[number] for number in drawn) / 12)
    means.sort()
    found = interval(values)
    assert found.mean == pytest.approx(sum(values) / 12)
    assert means[24] <= found.low <= means[25]  # 2.5 % of 1,000 lie below
    assert means[974] <= found.high <= means[975]


def test_the_interval_is_as_wide_as_the_normal_distribution_says() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, size=2000)
    found, half = interval(values), 1.96 * 2.0 / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert interval(values) == found  # seeded


def test_a_pair_is_drawn_together_so_that_shared_difficulty_cancels() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0.0, 10.0, size=500)
    first, second = difficulty + rng.normal(0.2, 1.0, size=500), difficulty + rng.normal(0.0, 1.0, size=500)
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(float(first.mean() - second.mean()))
    assert found.high - found.low < 0.2 * (interval(first).high - interval(first).low)
    assert found.better > 0.95
    assert paired_difference(second, first).better == pytest.approx(1 - found.better)


def test_equal_systems_are_each_better_half_of_the_time() -> None:
    values = np.random.default_rng(4).random(20)
    found = paired_difference(values, values)
    assert (found.mean, found.low, found.high, found.better) == (0.0, 0.0, 0.0, 0.5)


def test_values_of_other_questions_are_not_paired() -> None:
    with pytest.raises(ValueError, match="3 values cannot be paired with 4"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_what_is_no_mean_is_computed_anew_of_the_questions_of_every_resample() -> None:
    values = np.random.default_rng(5).random(15)
    rng, medians, shifted = np.random.default_rng(SEED), [], []
    for _ in range(RESAMPLES):
        drawn = sorted(values[number] for number in rng.integers(15, size=15))
        medians.append(drawn[7])
        shifted.append(drawn[7] - drawn[14])
    median, highest = (resampled(lambda drawn, of=of: float(of(values[drawn])), 15) for of in (np.median, np.max))
    assert median.resamples.tolist() == medians
    found = median.interval()
    assert (found.mean, found.low <= sorted(medians)[25], found.high >= sorted(medians)[974]) == (np.median(values), True, True)
    difference = median.minus(highest).difference()
    assert difference.mean == np.median(values) - values.max()
    assert sorted(shifted)[24] <= difference.low <= sorted(shifted)[25]
    assert difference.better == pytest.approx(sum(0.5 for value in shifted if value == 0) / RESAMPLES)
