"""Hard negatives: ranked, without an answer in any form, and drawn without repetition."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.negatives import draw, embed, mine
from openbook_training.squad import Question, normalise


def test_mined_negatives_are_ranked_and_hold_no_answer(tiny_checkpoint: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    passages = ["red city", "blue river", "red king", "one book"]
    question = Question(id="q", text="what is red ?", context="red king", answers=("king",))
    vectors, asked = embed(checkpoint, passages), embed(checkpoint, [question.text])
    [mined] = mine([question.answers], [{question.context}], asked, passages, vectors, 4)
    assert set(mined) == {0, 1, 3}
    scores = (asked @ vectors.T)[0]
    assert mined == sorted(mined, key=lambda z: -scores[z])


def test_a_passage_that_holds_an_answer_in_another_form_is_no_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    passages = ["It was THE RED KING.", "the red-king's", "so it was the redking", "a king, red", "Of Red King", "red kings"]
    vectors = np.eye(6, dtype=np.float32)
    asked = np.array([[0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], np.float32)
    normalised: list[str] = []

    def counted(text: str) -> str:
        normalised.append(text)
        return normalise(text)

    monkeypatch.setattr("openbook_training.negatives.normalise", counted)
    # "red kings" holds the answer inside a longer word; "the" is empty in normal form, and stands in two passages as it is written.
    assert mine([("a red king",), ("red king", "the")], [set(), set()], asked, passages, vectors, 6) == [[1, 2, 3, 5], [3]]
    assert all(normalised.count(passage) <= 1 for passage in passages)
    normalised.clear()
    assert mine([(), ()], [set(), {passages[5]}], asked, passages, vectors, 4) == [[0, 1, 2, 3], [4, 3, 2]]
    assert not normalised  # without accepted answers there is nothing to compare
    mine([("city",)], [set()], asked[:1], passages, vectors, 2)
    assert set(normalised) == {"city", *passages[:2]}  # the best two alone are looked at


def test_drawing_negatives_never_repeats_and_never_exceeds_what_there_is() -> None:
    for seed in range(50):
        drawn = draw([4, 7, 9], seed % 5, random.Random(seed))
        assert len(drawn) == len(set(drawn)) == min(seed % 5, 3)
        assert set(drawn) <= {4, 7, 9}
