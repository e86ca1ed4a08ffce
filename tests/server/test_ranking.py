"""Ranking against the formula written out over explicit tables of spans."""

from __future__ import annotations

import math
import random
import unicodedata

import numpy as np
import pytest
from openbook_server.pipeline import reading_of
from openbook_server.ranking import (
    RankedAnswer,
    Reading,
    Settling,
    Span,
    end_of_letter,
    is_settled,
    log_weight,
    passage_probabilities,
    rank_answers,
)


def log_sum(values: list[float]) -> float:
    return math.log(sum(math.exp(value) for value in values))


def reading(passage: int, scores: dict[tuple[int, int], float], null: float) -> Reading:
    spans = sorted((Span(passage, start, end, score) for (start, end), score in scores.items()), key=lambda span: -span.score)
    return Reading(spans, null, log_sum([*scores.values(), null]))


def test_probabilities_are_the_sum_over_passages_and_places_of_the_same_text() -> None:
    passages = ["Paris is Paris.", "in paris", "Rome"]
    scores = [{(0, 5): 2.0, (9, 14): 1.0}, {(3, 8): 0.5, (0, 8): -1.0}, {(0, 4): 1.5}]
    nulls, priors, bias = [0.3, -0.2, 0.9], [0.0, 1.0, -0.5], 0.25
    answers, nothing = rank_answers(passages, [reading(z, scores[z], nulls[z]) for z in range(3)], priors, null_bias=bias, max_answers=10)
    weights = [priors[z] + score for z in range(3) for score in scores[z].values()]
    null_weights = [priors[z] + nulls[z] + bias for z in range(3)]
    total = sum(math.exp(weight) for weight in weights + null_weights)
    paris = (math.exp(2.0) + math.exp(1.0) + math.exp(1.5)) / total
    assert answers[0].text == "Paris"
    assert answers[0].probability == pytest.approx(paris, rel=1e-9)
    assert nothing == pytest.approx(sum(math.exp(weight) for weight in null_weights) / total, rel=1e-9)
    assert (answers[0].best.passage, answers[0].best.start) == (0, 0)


def test_answers_and_no_answer_share_one_distribution() -> None:
    rng = random.Random(1)
    text = "a b c d e f g h"
    readings = [reading(z, {(2 * i, 2 * i + 1): rng.gauss(0, 3) for i in range(8)}, rng.gauss(0, 3)) for z in range(4)]
    answers, nothing = rank_answers([text] * 4, readings, [rng.gauss(0, 1) for _ in range(4)], null_bias=0.0, max_answers=100)
    assert sum(answer.probability for answer in answers) + nothing == pytest.approx(1.0, rel=1e-9)


def test_passages_share_one_distribution_with_no_answer() -> None:
    scores = [{(0, 5): 2.0, (9, 14): 1.0}, {(3, 8): 0.5}, {(0, 4): 1.5}]
    nulls, priors, bias = [0.3, -0.2, 0.9], [0.0, 1.0, -0.5], 0.25
    readings = [reading(z, scores[z], nulls[z]) for z in range(3)]
    weights = [sum(math.exp(priors[z] + score) for score in scores[z].values()) for z in range(3)]
    total = sum(weights) + sum(math.exp(priors[z] + nulls[z] + bias) for z in range(3))
    found = passage_probabilities(readings, priors, null_bias=bias)
    assert found == pytest.approx([weight / total for weight in weights], rel=1e-9)
    _, nothing = rank_answers(["Paris is Paris.", "in paris", "Rome"], readings, priors, null_bias=bias, max_answers=1)
    assert sum(found) + nothing == pytest.approx(1.0, rel=1e-9)
    assert passage_probabilities([], [], null_bias=bias) == []


def test_an_answer_that_overlaps_a_better_one_is_left_out() -> None:
    scores = {(0, 12): 3.0, (0, 7): 2.9, (8, 12): 1.0, (16, 20): 0.0}
    answers, _ = rank_answers(["October 1973 or 1974"], [reading(0, scores, -5.0)], [0.0], null_bias=0.0, max_answers=5)
    assert [answer.text for answer in answers] == ["October 1973", "1974"]


def test_a_larger_prior_moves_the_answer_to_its_passage() -> None:
    readings = [reading(0, {(0, 4): 1.0}, 0.0), reading(1, {(0, 5): 1.0}, 0.0)]
    for priors, expected in (([1.0, 0.0], "Rome"), ([0.0, 1.0], "Milan")):
        answers, _ = rank_answers(["Rome", "Milan"], readings, priors, null_bias=0.0, max_answers=1)
        assert [answer.text for answer in answers] == [expected]


def test_nothing_read_is_no_answer_for_certain() -> None:
    assert rank_answers([], [], [], null_bias=0.0, max_answers=3) == ([], 1.0)


def test_extreme_scores_neither_overflow_nor_lose_the_answer() -> None:
    answers, nothing = rank_answers(["yes"], [Reading([Span(0, 0, 3, 900.0)], -900.0, 900.0)], [0.0], null_bias=0.0, max_answers=1)
    assert (answers[0].probability, nothing) == (1.0, 0.0)


@pytest.mark.parametrize(("null", "gap", "bias"), [(25.0, 16.0, -16.0), (25.0, 16.0, -18.0), (12.0, 15.0, -15.0), (12.0, 10.0, -8.0)])
def test_spans_that_the_null_outweighs_count_as_much_as_they_are_listed_with(null: float, gap: float, bias: float) -> None:
    """In float32, as the graph computes, the normaliser is the null's score, or nearly."""
    scores = {(0, 4): null - gap, (5, 9): null - gap - 1.0}
    spans = [Span(0, *place, score) for place, score in scores.items()]
    read = Reading(spans, null, float(np.float32(log_sum([*scores.values(), null]))))
    answers, nothing = rank_answers(["Rome Pisa"], [read], [0.0], null_bias=bias, max_answers=2)
    true = math.exp(null - gap - log_sum([*scores.values(), null + bias]))
    assert answers[0].probability == pytest.approx(true, rel=0.1)
    assert sum(answer.probability for answer in answers) + nothing <= 1.0 + 1e-9
    assert passage_probabilities([read], [0.0], null_bias=bias)[0] + nothing == pytest.approx(1.0)


def random_readings(rng: random.Random) -> tuple[list[str], list[Reading], list[float]]:
    """Six passages with a few of the same words in them, the best retrieved first."""
    words = [rng.choices("one two three four five six".split(), k=8) for _ in range(6)]
    readings = []
    for z, passage in enumerate(words):
        starts = [sum(len(word) + 1 for word in passage[:at]) for at in range(8)]
        spans = {(start, start + len(word)): rng.gauss(0, 3) for start, word in zip(starts, passage, strict=True)}
        readings.append(reading(z, spans, rng.gauss(0, 3)))
    return [" ".join(passage) for passage in words], readings, sorted((rng.gauss(0, 4) for _ in range(6)), reverse=True)


def test_the_weight_of_a_passage_is_that_of_its_spans_and_its_no_answer() -> None:
    scores = {(0, 4): 1.5, (5, 9): -0.5}
    assert log_weight(reading(0, scores, 0.7), 0.25) == pytest.approx(log_sum([1.5, -0.5, 0.7 + 0.25]), rel=1e-12)


def test_a_settled_answer_stays_the_best() -> None:
    rng, stopped = random.Random(4), 0
    for _ in range(300):
        passages, readings, priors = random_readings(rng)
        settling = Settling(max(log_weight(one, 0.5) for one in readings))
        [final, *_], _ = rank_answers(passages, readings, priors, null_bias=0.5, max_answers=1)
        for read in range(1, 6):
            early, _ = rank_answers(passages[:read], readings[:read], priors[:read], null_bias=0.5, max_answers=2)
            if is_settled(early, readings[:read], priors, null_bias=0.5, settling=settling):
                assert early[0].text == final.text
                stopped += 1
    assert stopped > 50


def answers_of(*probabilities: float) -> list[RankedAnswer]:
    return [RankedAnswer("x", probability, Span(0, 0, 1, 0.0)) for probability in probabilities]


def test_an_answer_is_not_settled_while_what_is_unread_could_put_the_second_before_it() -> None:
    readings, priors = [reading(0, {(0, 4): 3.0}, 0.0)], [0.0, 0.0, -1.0]
    total = log_weight(readings[0], 0.0)
    unread = log_sum(priors[1:])
    for lead in (0.1, 0.3, 0.8):
        weight = math.log(lead) + total - unread  # then all that is unread weighs just as much as the lead
        for second in (0.0, 0.1):
            for more, settled in ((-0.01, True), (0.01, False)):
                answers = answers_of(lead + second, second)
                assert is_settled(answers, readings, priors, null_bias=0.0, settling=Settling(weight + more)) is settled
    assert is_settled(answers_of(0.5), readings, priors, null_bias=0.0, settling=Settling(math.log(0.49) + total - unread))
    assert is_settled(answers_of(0.2, 0.2), readings, priors[:1], null_bias=0.0, settling=Settling(9.0))  # nothing is unread
    assert not is_settled([], readings, priors, null_bias=0.0, settling=Settling(-50.0))


def test_what_has_no_character_is_no_answer() -> None:
    answers, nothing = rank_answers(["red,  blue"], [reading(0, {(5, 5): 3.0, (0, 3): 1.0}, 0.0)], [0.0], null_bias=0.0, max_answers=5)
    total = math.exp(3.0) + math.exp(1.0) + 1.0
    assert [answer.text for answer in answers] == ["red"]
    assert answers[0].probability == pytest.approx(math.exp(1.0) / total, rel=1e-9)
    assert nothing == pytest.approx(1.0 / total, rel=1e-9)


@pytest.mark.parametrize(
    ("answer", "behind"),
    [
        (unicodedata.normalize("NFD", "René"), ". It"),
        (unicodedata.normalize("NFD", "Açaí"), ""),
        ("สมชาย ใจดี", " in Bangkok"),
        ("हिन्दी", ", too"),
        ("Ada", " Byron"),
    ],
)
def test_an_answer_ends_behind_its_last_letter(answer: str, behind: str) -> None:
    text = f"by {answer}{behind}"
    base = max(at for at, letter in enumerate(text[: 3 + len(answer)]) if not unicodedata.category(letter).startswith("M"))
    assert end_of_letter(text, base + 1) == 3 + len(answer)

    class Read:
        """What is read ends, as tokenizers have it, without what is written behind the last letter."""

        def characters(self, first: np.ndarray, last: np.ndarray) -> tuple[list[int], list[int]]:
            return [3], [base + 1]

    outputs = {
        "span_score": np.array([1.0]),
        "span_start": np.array([0]),
        "span_end": np.array([0]),
        "null_score": 0.0,
        "log_normaliser": 2.0,
    }
    [span] = reading_of(Read(), outputs, 0, text).spans  # type: ignore[arg-type]
    assert text[span.start : span.end] == answer


def test_two_ways_to_write_a_letter_are_one_answer() -> None:
    passages = [f"by {unicodedata.normalize(form, 'René')}." for form in ("NFC", "NFD")]
    readings = [reading(at, {(3, len(text) - 1): 1.0}, 0.0) for at, text in enumerate(passages)]
    [answer], nothing = rank_answers(passages, readings, [0.0, 0.0], null_bias=0.0, max_answers=3)
    assert answer.probability == pytest.approx(1 - nothing)
