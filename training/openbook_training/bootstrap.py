"""How sure a number over questions is, and whether one system is better than another on the same questions.

Questions are drawn again with replacement, as many as there are, a thousand times, from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 1000, 0, 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its percentile interval (Efron & Tibshirani 1993, chapter 13), which holds `LEVEL` of the resampled means."""

    mean: float  # or what else was computed of the questions, as macro-F1 is
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """The mean difference of two systems, first minus second."""

    better: float  # share of the resamples in which the first one's mean is higher (Koehn 2004, section 3); equal ones count half


@dataclass(frozen=True, slots=True)
class Resampled:
    """What a statistic is of the questions, and of every resample of them."""

    value: float
    resamples: Floats  # (RESAMPLES,); entry i of two statistics of as many questions is of the same questions

    def interval(self) -> Interval:
        """The middle of the resamples. A statistic that grows with noise, as calibration error does, may itself lie below it."""
        low, high = np.quantile(self.resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(self.value, float(low), float(high))

    def minus(self, other: Resampled) -> Resampled:
        """Of one system minus another: paired, for a resample is of the same questions for both."""
        return Resampled(self.value - other.value, self.resamples - other.resamples)

    def difference(self) -> Difference:
        """The interval of what `minus` gave, and how often it is above 0."""
        spread, means = self.interval(), self.resamples
        return Difference(spread.mean, spread.low, spread.high, float((means > 0).mean() + (means == 0).mean() / 2))


def resampled(statistic: Callable[[NDArray[np.int64]], float], count: int) -> Resampled:
    """Of `count` questions; `statistic` is given the numbers of those that were drawn, repeated ones included."""
    rng = np.random.default_rng(SEED)
    resamples = np.array([statistic(rng.integers(count, size=count)) for _ in range(RESAMPLES)])
    return Resampled(statistic(np.arange(count)), resamples)


def interval(values: Floats) -> Interval:
    """Of the mean of (questions,) values, on their scale."""
    return _mean(values).interval()


def paired_difference(first: Floats, second: Floats) -> Difference:
    """Of two systems' (questions,) values, question by question: a resample draws the same questions for both.

    Raises:
        ValueError: they are not of the same questions.
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.shape[0]} values cannot be paired with {second.shape[0]}")
    return _mean(first - second).difference()


def _mean(values: Floats) -> Resampled:
    return resampled(lambda drawn: float(values[drawn].mean()), len(values))
