"""The objectives over sequences against slow numpy formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from openbook_training.objectives import NEGATIVE
from openbook_training.sequence_objectives import (
    interpolated,
    neighbour_log_probabilities,
    pointer_log_probabilities,
    sequence_loss,
    target_log_probabilities,
)


def test_the_loss_of_sequences_is_the_mean_of_their_summed_surprises() -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(7, 5)), rng.integers(5, size=7)
    owner = [0, 0, 0, 1, 2, 2, 2]
    expected = 0.0
    for sequence in range(3):
        for t in range(7):
            if owner[t] == sequence:
                p = np.exp(logits[t, tokens[t]]) / sum(np.exp(logits[t, v]) for v in range(5))
                expected -= np.log(p) / 3
    found = sequence_loss(target_log_probabilities(torch.tensor(logits), torch.tensor(tokens)), torch.tensor(owner), 3)
    assert float(found) == pytest.approx(expected)


def test_a_pointer_adds_what_it_copies_to_what_the_vocabulary_gives() -> None:
    rng = np.random.default_rng(3)
    logits, scores, gate = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 1))
    tokens = np.array([[5, 1, 5, 0], [2, 3, 3, 4]])
    scores[1, :, 3] = NEGATIVE  # nothing was read there
    expected = np.zeros((2, 3, 6))
    for row in range(2):
        for t in range(3):
            g = 1 / (1 + np.exp(-gate[row, t, 0]))
            weights = [np.exp(score) for score in scores[row, t]]
            for v in range(6):
                vocabulary = np.exp(logits[row, t, v]) / sum(np.exp(logits[row, t]))
                copied = sum(weight for weight, token in zip(weights, tokens[row], strict=True) if token == v) / sum(weights)
                expected[row, t, v] = (1 - g) * vocabulary + g * copied
    found = pointer_log_probabilities(*(torch.tensor(part) for part in (logits, scores, gate, tokens)))
    assert found.exp().numpy() == pytest.approx(expected)
    sure = pointer_log_probabilities(torch.tensor(logits), torch.tensor(scores), torch.full((2, 3, 1), 999.0), torch.tensor(tokens))
    assert torch.isfinite(sure).all()  # though what was not read has probability 0


def test_neighbours_vote_for_the_token_that_followed_them_by_their_distance() -> None:
    rng = np.random.default_rng(1)
    distances, followed, targets = rng.random((4, 6)) * 9, rng.integers(3, size=(4, 6)), np.array([0, 1, 2, 7])
    distances[0, 4:] = np.inf  # it has four neighbours only
    expected = []
    for row in range(4):
        weights = [np.exp(-d / 2.5) for d in distances[row]]
        right = sum(w for w, token in zip(weights, followed[row], strict=True) if token == targets[row])
        expected.append(right / sum(weights))
    found = neighbour_log_probabilities(torch.tensor(distances), torch.tensor(followed), torch.tensor(targets), 2.5)
    assert found.exp().numpy() == pytest.approx(np.array(expected))
    assert torch.isfinite(found).all()  # nobody was followed by token 7
    assert found.exp()[3] == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_interpolation_mixes_probabilities_not_logarithms(share: float) -> None:
    rng = np.random.default_rng(2)
    model, neighbours = rng.random(5), np.array([0.5, 0.1, 0.0, 1.0, 0.2])
    with np.errstate(divide="ignore"):
        logs = torch.tensor(np.log(model)), torch.tensor(np.maximum(np.log(neighbours), -1e9))
    assert interpolated(*logs, share).exp().numpy() == pytest.approx(share * neighbours + (1 - share) * model)
