"""How sure a mean over questions is, and whether one system is better than another on the same questions.

Questions are drawn again with replacement, as many as there are, a thousand times, from a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 1000, 0, 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its percentile interval (Efron & Tibshirani 1993, chapter 13), which holds `LEVEL` of the resampled means."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """The mean difference of two systems, first minus second."""

    better: float  # share of the resamples in which the first one's mean is higher (Koehn 2004, section 3); equal ones count half


def interval(values: NDArray[np.float64]) -> Interval:
    """Of the mean of (questions,) values, on their scale."""
    means = _resampled_means(values)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Of two systems' (questions,) values, question by question: a resample draws the same questions for both.

    Raises:
        ValueError: they are not of the same questions.
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.shape[0]} values cannot be paired with {second.shape[0]}")
    differences = first - second
    spread, means = interval(differences), _resampled_means(differences)
    return Difference(spread.mean, spread.low, spread.high, float((means > 0).mean() + (means == 0).mean() / 2))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rng = np.random.default_rng(SEED)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])
