"""Scores of a reader that may say nothing, against SQuAD 2.0's rules written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from openbook_export.abstention import abstention_scores
from openbook_training.reader import Prediction
from openbook_training.squad import Question


def question(*answers: str) -> Question:
    return Question(id="", text="?", context="red green blue", answers=answers)


QUESTIONS = [question("red"), question(), question("green", "green blue"), question(), question("blue"), question()]
PREDICTIONS = [  # (text, log-probability of it, of "no answer")
    Prediction("red", -0.5, -2.0),
    Prediction("red", -0.4, -3.0),  # should have kept silent
    Prediction("green", -1.0, -1.5),
    Prediction("blue", -2.0, -0.5),
    Prediction("blue", -2.5, -0.5),  # knows it, and is not sure enough
    Prediction("green", -1.0, -1.5),  # as sure as of the third question
]


def test_silence_is_right_where_nothing_answers_and_wrong_elsewhere() -> None:
    scores = {name: values.tolist() for name, values in abstention_scores(PREDICTIONS, QUESTIONS, 0.0).items()}
    assert scores["abstaining/em"] == [1, 0, 1, 1, 0, 0]
    assert scores["abstaining/f1"] == [1, 0, 1, 1, 0, 0]
    assert scores["abstaining/answerable_f1"] == [1, 1, 0]
    assert scores["abstaining/unanswerable"] == [0, 1, 0]


def test_null_bias_makes_silence_more_probable_and_leaves_the_order() -> None:
    before, after = (abstention_scores(PREDICTIONS, QUESTIONS, bias) for bias in (0.0, 0.6))
    assert after["abstaining/unanswerable"].tolist() == [0, 1, 1]
    assert after["abstaining/answerable_f1"].tolist() == [1, 0, 0]
    assert after["abstaining/auroc"].tolist() == before["abstaining/auroc"].tolist()


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    predictions = [Prediction("red", float(a), float(b)) for a, b in rng.integers(-4, 0, size=(40, 2))]  # few values: many are equal
    questions = [question("red") if n % 3 else question() for n in range(40)]
    margins = [one.null - one.score for one in predictions]
    pairs = list(itertools.product([m for m, q in zip(margins, questions, strict=True) if not q.answers], range(40)))
    right = [1.0 if a > margins[b] else 0.5 if a == margins[b] else 0.0 for a, b in pairs if questions[b].answers]
    area = abstention_scores(predictions, questions, 0.0)["abstaining/auroc"].mean()
    assert area == pytest.approx(sum(right) / len(right))
