"""The word-by-word bonus of the hybrid ranking, against its formula written out, and what it is for."""

from __future__ import annotations

import math

import pytest
from openbook_server.knowledge.lexical import stem_lines
from openbook_server.knowledge.overlap import COVERAGE_WEIGHT, PAIR_WEIGHT, overlaps

PASSAGES = [
    stem_lines(text)
    for text in (
        "The oil crisis began in 1973.",
        "In 1973 there was a crisis of trust. Others speak of oil, and beginnings.",
        "Nothing of it.",
        "",
    )
]


def test_the_bonus_is_the_best_sentences_coverage_plus_neighbouring_pairs() -> None:
    def idf(holding: int) -> float:
        return math.log((4 + 1) / (holding + 0.5))

    found = overlaps("When did the oil crisis of 1973 begin, or when it began?", PASSAGES)
    # "oil", "crisis" and "1973" stand in two passages, "began" in one, and so does "begin", with "beginnings"; the others are stop words
    total = 3 * idf(2) + 2 * idf(1)
    assert found[0] == pytest.approx(COVERAGE_WEIGHT * (3 * idf(2) + idf(1)) / total + 2 * PAIR_WEIGHT)  # the oil, oil crisis
    assert found[1] == pytest.approx(COVERAGE_WEIGHT * max(2 * idf(2), idf(2) + idf(1)) / total + PAIR_WEIGHT)  # crisis of
    assert found[2:] == [0.0, 0.0]


def test_words_in_one_sentence_beat_the_same_words_in_two() -> None:
    together, apart = overlaps(
        "Who designed the bridge?", [stem_lines("Ann designed a bridge. It rained."), stem_lines("Ann designed. A bridge fell.")]
    )
    assert together > apart > 0


def test_words_in_the_order_of_the_question_beat_the_same_words_scattered() -> None:
    scattered, ordered = overlaps(
        "who built the red stone bridge", [stem_lines("bridge of stone, red, who built?"), stem_lines("They built the red stone bridge.")]
    )
    assert ordered > scattered


def test_a_pair_of_words_does_not_reach_from_one_sentence_into_the_next() -> None:
    across, within = overlaps(
        "red bridge", [stem_lines("It was red. Bridge after bridge fell."), stem_lines("It was a red bridge. It fell.")]
    )
    assert within == pytest.approx(COVERAGE_WEIGHT + PAIR_WEIGHT)
    assert across == pytest.approx(COVERAGE_WEIGHT / 2)


def test_pairs_of_words_count_in_the_sentence_that_has_most_of_them() -> None:
    question = "red bridge of a wide river"
    spread, together = overlaps(
        question, [stem_lines("It was a red bridge. They saw a wide river."), stem_lines("A wide river. A red bridge of a wide river.")]
    )
    assert spread == pytest.approx(COVERAGE_WEIGHT / 2 + 2 * PAIR_WEIGHT)  # a wide, wide river
    assert together == pytest.approx(COVERAGE_WEIGHT + 5 * PAIR_WEIGHT)


def test_words_are_compared_by_their_stems_and_parts_of_words_are_none() -> None:
    assert overlaps("oil in art", [stem_lines("Soil, part: spoiled carts"), stem_lines("Oils in arts, écrits")]) == [
        0.0,
        pytest.approx(COVERAGE_WEIGHT + 2 * PAIR_WEIGHT),
    ]


@pytest.mark.parametrize("question", ["", "?!", "the of and", "\0", "ß…—"])
def test_no_question_breaks_it(question: str) -> None:
    assert all(bonus >= 0 and math.isfinite(bonus) for bonus in overlaps(question, PASSAGES))
    assert overlaps(question, []) == []
