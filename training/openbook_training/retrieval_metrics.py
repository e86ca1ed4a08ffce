"""How well passages are ranked: recall, reciprocal rank, nDCG and answer hits of every question, each between 0 and 1.

The metrics take ranked grades, (questions, passages): row q holds the grades of the whole corpus in the order in
which question q's ranking puts it, 0 for a passage that is not relevant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook_training.squad import holds_answer

DEPTHS = (1, 5, 20)
NDCG_DEPTH = 10
_ROWS = 512  # questions ranked at a time: bounds memory

Floats = NDArray[np.float64]


def rank(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """(questions, passages) scores to passage rows, best first; equals keep the order of the corpus."""
    return np.argsort(-scores, axis=1, kind="stable")


def recall(ranked: Floats, depth: int) -> Floats:
    """(questions,) share of a question's relevant passages among the first `depth`."""
    relevant = ranked > 0
    shares: Floats = relevant[:, :depth].sum(axis=1) / relevant.sum(axis=1)
    return shares


def reciprocal_rank(ranked: Floats) -> Floats:
    """(questions,) 1 / rank of the first relevant passage."""
    ranks: Floats = 1.0 + np.argmax(ranked > 0, axis=1)
    return 1 / ranks


def ndcg(ranked: Floats, depth: int) -> Floats:
    """(questions,) discounted cumulative gain of the first `depth`, over that of the best ranking (Jarvelin & Kekalainen 2002).

    A passage at rank r gains grade / log2(r + 1), as trec_eval and BEIR compute it.
    """
    discounts = 1 / np.log2(np.arange(2, min(depth, ranked.shape[1]) + 2))
    ideal = -np.sort(-ranked, axis=1)
    gains: Floats = (ranked[:, :depth] @ discounts) / (ideal[:, :depth] @ discounts)
    return gains


def score_retrieval(
    questions: NDArray[np.float32], passages: NDArray[np.float32], grades: Sequence[Mapping[int, float]], dim: int = 0
) -> dict[str, Floats]:
    """Every metric of every question, by exact search over all passages.

    Args:
        questions: (questions, d) unit vectors.
        passages: (passages, d) unit vectors.
        grades: of each question, grade above 0 by row of the passage; at least one.
        dim: use the first so many dimensions, scaled to unit length again; 0 = all.

    Returns:
        "recall@1", "recall@5", "recall@20", "mrr" and "ndcg@10", each (questions,).
    """
    questions, passages = (truncated(vectors, dim) if dim else vectors for vectors in (questions, passages))
    parts: list[dict[str, Floats]] = []
    for at in range(0, len(questions), _ROWS):
        scores = questions[at : at + _ROWS] @ passages.T
        judged = np.zeros(scores.shape)
        for row, graded in enumerate(grades[at : at + _ROWS]):
            judged[row, list(graded)] = list(graded.values())
        ranked = np.take_along_axis(judged, rank(scores), axis=1)
        metrics = {f"recall@{depth}": recall(ranked, depth) for depth in DEPTHS}
        parts.append(metrics | {"mrr": reciprocal_rank(ranked), f"ndcg@{NDCG_DEPTH}": ndcg(ranked, NDCG_DEPTH)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def answer_hits(
    questions: NDArray[np.float32], passages: NDArray[np.float32], texts: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, Floats]:
    """ "answer-hit@k": whether an accepted answer, in normal form, stands in the text of the first k passages.

    Args:
        questions: (questions, d) unit vectors.
        passages: (passages, d) unit vectors of `texts`.
        answers: of each question, at least one.

    Returns:
        For every depth (questions,) of 0 and 1.
    """
    hits = {depth: np.zeros(len(questions)) for depth in DEPTHS}
    for at in range(0, len(questions), _ROWS):
        ranking = rank(questions[at : at + _ROWS] @ passages.T)[:, : max(DEPTHS)]
        for row, best in enumerate(ranking, at):
            place = next((place for place, z in enumerate(best) if holds_answer(texts[z], answers[row])), max(DEPTHS))
            for depth, found in hits.items():
                found[row] = float(place < depth)
    return {f"answer-hit@{depth}": found for depth, found in hits.items()}


def truncated(vectors: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """(rows, dim): the first `dim` dimensions, scaled to unit length (Kusupati et al. 2022)."""
    cut = vectors[:, :dim]
    unit: NDArray[np.float32] = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return unit
