"""Metrics of label probabilities against slow formulas written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from openbook_training.metrics import accuracy, expected_calibration_error, label_metrics, label_statistics, macro_f1, perplexity


def test_macro_f1_is_the_mean_of_the_f1_of_every_label_that_occurs() -> None:
    rng = np.random.default_rng(0)
    predicted, gold = rng.integers(0, 5, 60), rng.integers(1, 7, 60)  # some labels only predicted, some only gold, 9 in neither
    scores = []
    for label in set(predicted.tolist()) | set(gold.tolist()):
        pairs = list(zip(predicted, gold, strict=True))
        right = sum(p == label and g == label for p, g in pairs)
        precision = right / max(1, sum(p == label for p, _ in pairs))
        recall = right / max(1, sum(g == label for _, g in pairs))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert macro_f1(predicted, gold) == pytest.approx(100 * sum(scores) / len(scores))
    assert accuracy(predicted, gold) == pytest.approx(100 * sum(p == g for p, g in zip(predicted, gold, strict=True)) / 60)


def test_calibration_error_is_the_mean_gap_of_confidence_and_accuracy_over_bins() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.4] * 4, 200)
    probabilities[0] = [1.0, 0.0, 0.0, 0.0]
    gold = rng.integers(0, 4, 200)
    expected = 0.0
    for at in range(15):
        low, high = at / 15, (at + 1) / 15
        inside = [row for row in range(200) if low <= max(probabilities[row]) < high or (at == 14 and max(probabilities[row]) == 1.0)]
        if inside:
            confidence = sum(max(probabilities[row]) for row in inside) / len(inside)
            right = sum(int(np.argmax(probabilities[row])) == gold[row] for row in inside) / len(inside)
            expected += len(inside) / 200 * abs(confidence - right)
    right = probabilities.argmax(1) == gold
    assert expected_calibration_error(probabilities.max(1), right) == pytest.approx(100 * expected)
    assert label_metrics(probabilities, gold)["calibration_error"] == pytest.approx(100 * expected)


def test_a_perfect_and_certain_prediction_has_no_error() -> None:
    assert label_metrics(np.eye(3), np.arange(3)) == {"accuracy": 100.0, "macro_f1": 100.0, "calibration_error": 0.0}


def test_a_statistic_of_some_rows_is_the_metric_of_those_rows_alone() -> None:
    rng = np.random.default_rng(2)
    probabilities, gold, rows = rng.dirichlet([0.4] * 4, 50), rng.integers(0, 4, 50), rng.integers(50, size=30)
    statistics = label_statistics(probabilities, gold)
    assert {name: statistic(rows) for name, statistic in statistics.items()} == label_metrics(probabilities[rows], gold[rows])


def test_the_perplexity_of_a_diverged_model_is_infinite() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))
