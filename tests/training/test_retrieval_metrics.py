"""Ranking metrics against slow formulas written out here, and against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from openbook_training.retrieval_metrics import answer_hits, ndcg, rank, recall, reciprocal_rank, score_retrieval, truncated
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall, retrieval_reciprocal_rank


@pytest.fixture(scope="module")
def judged() -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties, and grades of which every row has at least one above 0; both (40, 30)."""
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(30.0, dtype=np.float32), (40, 1)), axis=1)
    grades = rng.choice([0.0, 1.0, 2.0], p=[0.85, 0.1, 0.05], size=scores.shape)
    grades[np.arange(40), rng.integers(0, 30, 40)] = 1.0
    return scores, grades


@pytest.mark.parametrize("depth", [1, 5, 10, 99])
def test_metrics_are_what_their_definitions_say(judged: tuple[np.ndarray, np.ndarray], depth: int) -> None:
    scores, grades = judged
    ranked = np.take_along_axis(grades, rank(scores), axis=1)
    found = recall(ranked, depth), reciprocal_rank(ranked), ndcg(ranked, depth)
    for row in range(len(scores)):
        order = sorted(range(30), key=lambda z: -scores[row, z])
        gains = [grades[row, z] for z in order]
        total = sum(gain > 0 for gain in gains)
        assert found[0][row] == pytest.approx(sum(gain > 0 for gain in gains[:depth]) / total)
        assert found[1][row] == pytest.approx(1 / next(place for place, gain in enumerate(gains, 1) if gain > 0))
        gained = sum(gain / math.log2(place + 1) for place, gain in enumerate(gains[:depth], 1))
        best = sum(gain / math.log2(place + 1) for place, gain in enumerate(sorted(gains, reverse=True)[:depth], 1))
        assert found[2][row] == pytest.approx(gained / best)
        predicted, target = torch.from_numpy(scores[row] + 1), torch.from_numpy(grades[row])
        top = min(depth, 30)
        assert found[0][row] == pytest.approx(float(retrieval_recall(predicted, target > 0, top_k=top)))
        assert found[1][row] == pytest.approx(float(retrieval_reciprocal_rank(predicted, target > 0)))
        assert found[2][row] == pytest.approx(float(retrieval_normalized_dcg(predicted, target.long(), top_k=top)), abs=1e-6)


def test_equal_scores_keep_the_order_of_the_corpus() -> None:
    assert rank(np.array([[1.0, 2.0, 1.0, 2.0]], np.float32)).tolist() == [[1, 3, 0, 2]]


def test_search_is_exact_over_the_whole_corpus_whatever_the_number_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    questions, passages = (truncated(rng.normal(size=(count, 8)).astype(np.float32), 8) for count in (7, 50))
    grades = [{int(rng.integers(50)): 1.0} for _ in range(7)]
    monkeypatch.setattr("openbook_training.retrieval_metrics._ROWS", 3)
    for dim, used in ((0, 8), (8, 8), (3, 3)):
        scores = score_retrieval(questions, passages, grades, dim)
        for row, graded in enumerate(grades):
            [gold] = graded
            cosines = [
                float(questions[row, :used] @ z[:used] / np.linalg.norm(questions[row, :used]) / np.linalg.norm(z[:used])) for z in passages
            ]
            place = 1 + sum(cosine > cosines[gold] for cosine in cosines)
            assert scores["mrr"][row] == pytest.approx(1 / place)
            assert scores["recall@5"][row] == float(place <= 5)
            assert scores["ndcg@10"][row] == pytest.approx(1 / math.log2(place + 1) if place <= 10 else 0.0)


def test_an_answer_hit_is_an_accepted_answer_word_by_word_in_the_first_passages() -> None:
    texts = ["The red-king, indeed.", "redness of kings", "a blue river", *(f"filler {n}" for n in range(30))]
    passages = np.eye(33, dtype=np.float32)
    questions = np.zeros((3, 33), np.float32)
    questions[0, [1, 0]] = 0.9, 0.4  # ranks passage 1, then 0
    questions[1, 2] = 1.0
    questions[2, 3:33] = np.arange(30, 0, -1)  # passage 2 comes last
    hits = answer_hits(questions, passages, texts, [["Redking"], ["river", "king"], ["river"]])
    assert hits["answer-hit@1"].tolist() == [0.0, 1.0, 0.0]
    assert hits["answer-hit@5"].tolist() == [1.0, 1.0, 0.0]
    assert hits["answer-hit@20"].tolist() == [1.0, 1.0, 0.0]
