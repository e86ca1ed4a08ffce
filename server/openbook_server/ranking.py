"""From scored spans to answers: the latent-variable sum over passages, as a pure function.

p(a | x) = Σ_z p(z | x) Σ_{spans s of z whose text is a} p(s | x, z), with the passages z that were read and

    p(z, s | x) ∝ exp(prior_weight · retrieval_score(z) + span_score(s)),

normalised over every span of every passage and over "no answer" (Clark & Gardner 2018, section 3.2; Lewis et al. 2020).
The reader's graph returns the normaliser over all spans and the null, but only its best few spans, so probabilities of unlisted
spans are accounted for without being listed. Where the null outweighs all spans, what they add to it is lost in float32's rounding:
together they weigh at least what those listed do.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_JOINER = "\u200d"  # within letters and emoji that are written as several characters


class Span(NamedTuple):
    """Characters [start, end) of one of the passages read. A tuple, for there are sixteen a passage."""

    passage: int  # row of the passage
    start: int
    end: int
    score: float  # unnormalised log score of the reader


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader made of one passage."""

    spans: Sequence[Span]  # best first
    null_score: float  # of "this passage holds no answer"
    log_normaliser: float  # logsumexp over all spans and the null


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    text: str
    probability: float
    best: Span  # where it stands most probably


@dataclass(frozen=True, slots=True)
class Settling:
    """When a question's answer counts as settled although passages are unread; calibrated together with the reader."""

    unread_weight: float  # nats: what an unread passage is taken to weigh at most beside its prior, see `log_weight`


def is_settled(
    answers: Sequence[RankedAnswer], readings: Sequence[Reading], priors: Sequence[float], *, null_bias: float, settling: Settling
) -> bool:
    """Whether reading on could hardly make another answer the best; true where nothing is left to read.

    In the worst case every unread passage weighs as much as its prior and `settling.unread_weight` allow, and all of that is for the
    answer that comes second so far, of those that do not overlap the best: whether it becomes a word longer is not asked.

    Args:
        answers: after what was read, the best two first.
        readings: of the first passages, at least one.
        priors: of all passages.
    """
    read = len(readings)
    if read == len(priors):
        return True
    if not answers:
        return False
    lead = answers[0].probability - (answers[1].probability if len(answers) > 1 else 0.0)
    total = _log_sum(_log_totals(readings, priors[:read], null_bias))
    return lead > 0 and math.log(lead) >= _log_sum(priors[read:]) + settling.unread_weight - total


def log_weight(reading: Reading, null_bias: float) -> float:
    """What a passage weighs beside its prior: the logarithm of the sum over its spans and its "no answer", in nats."""
    return _log_totals([reading], [0.0], null_bias)[0]


def rank_answers(
    passages: Sequence[str],
    readings: Sequence[Reading],
    priors: Sequence[float],
    *,
    null_bias: float,
    max_answers: int,
) -> tuple[list[RankedAnswer], float]:
    """Merge what was read in each passage into answers.

    Args:
        passages: the texts that were read.
        readings: one a passage.
        priors: one a passage, log weights of retrieval (any constant may be added to all).
        null_bias: added to every null score; calibrated at export.
        max_answers: at most this many are returned.

    Returns:
        Answers, most probable first, none overlapping a better one of the same passage; and the probability that no
        passage holds an answer.
    """
    if not readings:
        return [], 1.0
    nulls = [prior + reading.null_score + null_bias for prior, reading in zip(priors, readings, strict=True)]
    total = _log_sum(_log_totals(readings, priors, null_bias))
    places: dict[str, list[tuple[float, Span]]] = {}
    for prior, reading in zip(priors, readings, strict=True):
        for span in reading.spans:
            if span.start == span.end:
                continue  # to some tokenizers a space is a token, of no character once it is trimmed
            text = passages[span.passage][span.start : span.end]
            places.setdefault(normalise(text), []).append((prior + span.score - total, span))
    candidates = []
    for found in places.values():
        best = max(found, key=lambda place: place[0])[1]
        probability = min(1.0, math.exp(_log_sum([p for p, _ in found])))
        candidates.append(RankedAnswer(passages[best.passage][best.start : best.end], probability, best))
    candidates.sort(key=lambda answer: (-answer.probability, answer.best.passage, answer.best.start))
    chosen: list[RankedAnswer] = []
    for candidate in candidates:
        if len(chosen) == max_answers:
            break
        if not any(_overlap(candidate.best, other.best) for other in chosen):
            chosen.append(candidate)
    return chosen, min(1.0, math.exp(_log_sum(nulls) - total))


def passage_probabilities(readings: Sequence[Reading], priors: Sequence[float], *, null_bias: float) -> list[float]:
    """p(z | x, what was read): that the answer stands in each passage, under the same distribution as `rank_answers`.

    With the probability of "no answer" they sum to 1. Retrieval's prior made posterior by reading, they rank passages better.
    """
    if not readings:
        return []
    total = _log_sum(_log_totals(readings, priors, null_bias))
    return [min(1.0, math.exp(prior + _log_spans(reading) - total)) for prior, reading in zip(priors, readings, strict=True)]


def _log_totals(readings: Sequence[Reading], priors: Sequence[float], null_bias: float) -> list[float]:
    """Per passage the logarithm of its whole weight."""
    totals = []
    for prior, reading in zip(priors, readings, strict=True):
        totals.append(_log_sum([prior + _log_spans(reading), prior + reading.null_score + null_bias]))
    return totals


def _log_spans(reading: Reading) -> float:
    """The logarithm of the sum over all spans, without "no answer"."""
    listed = _log_sum([span.score for span in reading.spans])
    return max(listed, _log_difference(reading.log_normaliser, reading.null_score))


def end_of_letter(text: str, end: int) -> int:
    """Where a span ends that should end at `end`: behind the accents and vowel signs that belong to its last letter, which tokenizers
    leave out."""
    while end < len(text) and (text[end] == _JOINER or unicodedata.category(text[end]).startswith("M")):
        end += 1
    return end


def normalise(text: str) -> str:
    """Texts that differ in case, spacing, bordering punctuation or the way to write a letter are one answer."""
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split()).strip(".,;:!?\"'()[]{} ") or text


def _overlap(one: Span, other: Span) -> bool:
    return one.passage == other.passage and one.start < other.end and other.start < one.end


def _log_sum(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top


def _log_difference(larger: float, smaller: float) -> float:
    """log(exp(larger) - exp(smaller)); rounding may leave nothing, which is log 0."""
    gap = -math.expm1(smaller - larger)
    return larger + math.log(gap) if gap > 0 else -math.inf
