"""How good predictions are: of labels accuracy, macro-F1 and expected calibration error, all in percent; of tokens their perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal width, as in Guo et al. 2017
LOWER_IS_BETTER = frozenset({"calibration_error"})  # of what `label_statistics` names


def perplexity(surprise: float) -> float:
    """The exponential of a mean -log p; infinite where no float holds it, as a diverged model's may be."""
    try:
        return math.exp(surprise)
    except OverflowError:
        return math.inf


def accuracy(predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> float:
    """Share of the rows whose label is right."""
    return 100 * float((predicted == gold).mean())


def macro_f1(predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> float:
    """Mean of the labels' F1 over the labels that occur, predicted or gold; rare labels weigh as much as common ones."""
    labels = int(max(predicted.max(), gold.max())) + 1
    right = np.bincount(gold[predicted == gold], minlength=labels)
    counted = np.bincount(predicted, minlength=labels) + np.bincount(gold, minlength=labels)
    occurring = counted > 0
    return 100 * float((2 * right[occurring] / counted[occurring]).mean())


def expected_calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """How far confidence is from accuracy, over bins of confidence weighted by their rows (Guo et al. 2017, equation 3).

    Args:
        confidence: (rows,) the largest probability of each row.
        right: (rows,) whether the label that has it is the gold one.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)  # rows x (confidence - accuracy) of each bin
    return 100 * float(np.abs(gaps).sum() / len(right))


def label_statistics(probabilities: NDArray[np.float64], gold: NDArray[np.int64]) -> dict[str, Callable[[NDArray[np.int64]], float]]:
    """accuracy, macro_f1 and calibration_error, each a function of the numbers of the rows that it is to be computed of.

    Args:
        probabilities: (rows, labels).
        gold: (rows,) label numbers.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = predicted == gold
    return {
        "accuracy": lambda rows: accuracy(predicted[rows], gold[rows]),
        "macro_f1": lambda rows: macro_f1(predicted[rows], gold[rows]),
        "calibration_error": lambda rows: expected_calibration_error(confidence[rows], right[rows]),
    }


def label_metrics(probabilities: NDArray[np.float64], gold: NDArray[np.int64]) -> dict[str, float]:
    """What `label_statistics` are of all rows."""
    everything = np.arange(len(gold))
    return {name: statistic(everything) for name, statistic in label_statistics(probabilities, gold).items()}
