"""How good predicted label probabilities are: accuracy, macro-F1 and expected calibration error, all in percent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal width, as in Guo et al. 2017


def accuracy(predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> float:
    """Share of the rows whose label is right."""
    return 100 * float((predicted == gold).mean())


def macro_f1(predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> float:
    """Mean of the labels' F1 over the labels that occur, predicted or gold; rare labels weigh as much as common ones."""
    occurring = np.union1d(predicted, gold)
    right = np.array([((predicted == label) & (gold == label)).sum() for label in occurring])
    counted = np.array([(predicted == label).sum() + (gold == label).sum() for label in occurring])
    return 100 * float((2 * right / counted).mean())


def expected_calibration_error(probabilities: NDArray[np.float64], gold: NDArray[np.int64]) -> float:
    """How far confidence is from accuracy, over bins of confidence weighted by their rows (Guo et al. 2017, equation 3).

    Args:
        probabilities: (rows, labels); the largest of a row is its confidence.
        gold: (rows,) label numbers.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)  # rows x (confidence - accuracy) of each bin
    return 100 * float(np.abs(gaps).sum() / len(gold))


def label_metrics(probabilities: NDArray[np.float64], gold: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 and calibration_error of (rows, labels) probabilities against (rows,) label numbers."""
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": accuracy(predicted, gold),
        "macro_f1": macro_f1(predicted, gold),
        "calibration_error": expected_calibration_error(probabilities, gold),
    }
