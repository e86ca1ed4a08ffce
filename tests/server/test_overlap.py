"""The word-by-word bonus of the hybrid ranking, against its formula written out, and what it is for."""

from __future__ import annotations

import math

import pytest
from openbook_server.knowledge.lexical import word_line
from openbook_server.knowledge.overlap import COVERAGE_WEIGHT, PAIR_WEIGHT, overlaps

PASSAGES = [word_line(text) for text in ("The oil crisis began in 1973.", "A crisis of oil, a crisis of trust.", "Nothing of it.", "")]


def test_the_bonus_is_weighted_coverage_plus_neighbouring_pairs() -> None:
    def idf(holding: int) -> float:
        return math.log((4 + 1) / (holding + 0.5))

    found = overlaps("When did the oil crisis of 1973 begin, or when it began?", PASSAGES)
    # "oil" and "crisis" stand in two passages, "began" and "1973" in one, "begin" in none; the others are stop words
    total = 2 * idf(2) + 2 * idf(1) + idf(0)
    assert found[0] == pytest.approx(COVERAGE_WEIGHT * (2 * idf(2) + 2 * idf(1)) / total + 2 * PAIR_WEIGHT)  # the oil, oil crisis
    assert found[1] == pytest.approx(COVERAGE_WEIGHT * 2 * idf(2) / total + PAIR_WEIGHT)  # crisis of
    assert found[2:] == [0.0, 0.0]


def test_words_in_the_order_of_the_question_beat_the_same_words_scattered() -> None:
    scattered, ordered = overlaps(
        "who built the red stone bridge", [word_line("bridge of stone, red, who built?"), word_line("They built the red stone bridge.")]
    )
    assert ordered > scattered


def test_parts_of_words_are_no_words() -> None:
    assert overlaps("oil in art", [word_line("Soil, part, oily: spoil art"), word_line("oils in arts")]) == [
        pytest.approx(COVERAGE_WEIGHT * math.log(3 / 1.5) / (math.log(3 / 1.5) + math.log(3 / 0.5))),
        0.0,
    ]


@pytest.mark.parametrize("question", ["", "?!", "the of and", "\0", "ß…—"])
def test_no_question_breaks_it(question: str) -> None:
    assert all(bonus >= 0 and math.isfinite(bonus) for bonus in overlaps(question, PASSAGES))
    assert overlaps(question, []) == []
