"""Labelled neighbours: the search, their vote, and the mixture with a model, against slow formulas."""

from __future__ import annotations

import numpy as np
import pytest
from openbook_training.neighbours import TEMPERATURES, WEIGHTS, Neighbours, choose_mixture, knn_probabilities, nearest
from openbook_training.objectives import NEGATIVE


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_text_never_finds_what_it_may_not_see() -> None:
    rng = np.random.default_rng(0)
    vectors, labels = unit(rng, 12), rng.integers(0, 3, 12)
    groups = np.array([0, 0, *range(2, 12)])
    found = nearest(vectors, vectors, labels, 4, (groups, groups))
    for row in range(12):
        others = sorted((float(vectors[row] @ vectors[z]), z) for z in range(12) if groups[z] != groups[row])[::-1][:4]
        assert found.scores[row] == pytest.approx([score for score, _ in others], abs=1e-6)
        assert found.labels[row].tolist() == [labels[z] for _, z in others]


def test_a_memory_smaller_than_k_gives_all_it_may_and_marks_the_rest() -> None:
    vectors = unit(np.random.default_rng(1), 3)
    found = nearest(vectors, vectors, np.array([1, 1, 1]), 9, (np.arange(3), np.arange(3)))
    assert found.scores.shape == (3, 3)
    assert (found.scores[:, 2] == NEGATIVE).all()
    assert (found.labels[:, 2] == 0).all()
    assert knn_probabilities(found, 2, 0.1).tolist() == [[0.0, 1.0]] * 3


def test_the_vote_is_a_softmax_of_the_scores_summed_by_label() -> None:
    rng = np.random.default_rng(2)
    neighbours = Neighbours(rng.uniform(-1, 1, (5, 6)).astype(np.float32), rng.integers(0, 4, (5, 6)))
    probabilities = knn_probabilities(neighbours, 4, 0.07)
    for row in range(5):
        weights = [np.exp(float(score) / 0.07) for score in neighbours.scores[row]]
        for label in range(4):
            share = sum(weight for weight, its in zip(weights, neighbours.labels[row], strict=True) if its == label) / sum(weights)
            assert probabilities[row, label] == pytest.approx(share)


def test_the_mixture_makes_the_gold_labels_most_probable() -> None:
    rng = np.random.default_rng(3)
    neighbours = Neighbours(rng.uniform(0, 1, (40, 5)).astype(np.float32), rng.integers(0, 3, (40, 5)))
    model, gold = rng.dirichlet([1, 1, 1], 40), rng.integers(0, 3, 40)
    chosen = choose_mixture(model, neighbours, gold)

    def likelihood(weight: float, temperature: float) -> float:
        knn = knn_probabilities(neighbours, 3, temperature)
        return sum(float(np.log(max(weight * model[row, gold[row]] + (1 - weight) * knn[row, gold[row]], 1e-12))) for row in range(40))

    best = max(likelihood(weight, temperature) for weight in WEIGHTS for temperature in TEMPERATURES)
    assert likelihood(chosen.weight, chosen.temperature) == pytest.approx(best)


def test_a_model_that_is_always_right_gets_all_the_weight_and_one_that_knows_nothing_none() -> None:
    gold = np.array([0, 1, 2] * 4)
    good = Neighbours(np.full((12, 2), 0.9, np.float32), np.stack([gold, gold], axis=1))
    bad = Neighbours(good.scores, (good.labels + 1) % 3)
    certain, ignorant = np.eye(3)[gold], np.full((12, 3), 1 / 3)
    assert choose_mixture(certain, bad, gold).weight == 1.0
    assert choose_mixture(ignorant, good, gold).weight == 0.0
