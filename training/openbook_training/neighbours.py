"""The nearest labelled texts of a knowledge base, and what their labels alone say of a text.

Search is exact: the training sets that labels are voted from are small. At serving time the knowledge base's index
takes its place; the scores are the same inner products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook_training.objectives import NEGATIVE

NEIGHBOURS = 16  # labelled texts that each text is read beside, unless a recipe says otherwise
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
WEIGHTS = tuple(step / 20 for step in range(21))

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest texts of each of some texts, best first."""

    scores: NDArray[np.float32]  # (texts, k) cosines, NEGATIVE where there is no further neighbour
    labels: Ints  # (texts, k) their label numbers, 0 where there is none

    def rows(self, numbers: list[int]) -> Neighbours:
        return Neighbours(self.scores[numbers], self.labels[numbers])


def nearest(
    vectors: NDArray[np.float32],
    memory: NDArray[np.float32],
    labels: Ints,
    k: int,
    groups: tuple[Ints, Ints] | None = None,
) -> Neighbours:
    """The k best texts of the memory for every text.

    Args:
        vectors: (texts, dim) unit vectors.
        memory: (memory, dim) unit vectors.
        labels: (memory,) label numbers.
        k: how many; at most the size of the memory are returned.
        groups: (texts,) and (memory,) numbers; a text may not see entries of its own group: itself, in training
            ("leave one out").
    """
    k = min(k, len(memory))
    scores, found = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
    for at in range(0, len(vectors), 1024):
        rows = slice(at, at + 1024)
        cosines = vectors[rows] @ memory.T
        if groups is not None:
            cosines[groups[0][rows, None] == groups[1][None, :]] = NEGATIVE
        best = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(cosines, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        scores[rows] = np.take_along_axis(cosines, best, axis=1)
        found[rows] = labels[best]
    return Neighbours(scores, np.where(scores > NEGATIVE, found, 0))


def knn_probabilities(neighbours: Neighbours, labels: int, temperature: float) -> Floats:
    """p_kNN(y|x): the share of label y among the neighbours, weighted by exp(s(x, z) / temperature).

    As Khandelwal et al. 2020 (equation 2) do over words, with cosines for negative distances.

    Returns:
        (texts, labels); every row sums to 1.
    """
    scores = neighbours.scores.astype(np.float64) / temperature
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    probabilities = np.zeros((len(scores), labels))
    np.add.at(probabilities, (np.arange(len(scores))[:, None], neighbours.labels), weights)
    return probabilities


@dataclass(frozen=True, slots=True)
class Mixture:
    """p = weight p_model + (1 - weight) p_kNN (Khandelwal et al. 2020, equation 3, with lambda on the model's side)."""

    weight: float  # of the model, 0 to 1
    temperature: float  # of the neighbours' vote

    def probabilities(self, model: Floats, knn: Floats) -> Floats:
        """(texts, labels) of the two, combined."""
        return self.weight * model + (1 - self.weight) * knn


def choose_mixture(model: Floats, neighbours: Neighbours, gold: Ints) -> Mixture:
    """The mixture under which the gold labels of texts that were not trained on are most probable.

    Args:
        model: (texts, labels) probabilities.
        gold: (texts,) label numbers.
    """
    rows = np.arange(len(gold))
    best, chosen = -np.inf, Mixture(1.0, TEMPERATURES[0])
    for temperature in TEMPERATURES:
        knn = knn_probabilities(neighbours, model.shape[1], temperature)
        for weight in WEIGHTS:
            mixture = Mixture(weight, temperature)
            right = mixture.probabilities(model, knn)[rows, gold]
            likelihood = float(np.log(np.maximum(right, 1e-12)).mean())  # a vote may give a label nothing at all
            if likelihood > best:
                best, chosen = likelihood, mixture
    return chosen
