"""From scored spans to answers: the latent-variable sum over passages, as a pure function.

p(a | x) = Σ_z p(z | x) Σ_{spans s of z whose text is a} p(s | x, z), with the passages z that were read and

    p(z, s | x) ∝ exp(prior_weight · retrieval_score(z) + span_score(s)),

normalised over every span of every passage and over "no answer" (Clark & Gardner 2018, section 3.2; Lewis et al. 2020).
The reader's graph returns the normaliser over all spans but only its best few spans, so probabilities of unlisted
spans are accounted for without being listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of one of the passages read."""

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
    totals = []
    for prior, reading, null in zip(priors, readings, nulls, strict=True):
        spans_only = _log_difference(reading.log_normaliser, reading.null_score)
        totals.append(_log_sum([prior + spans_only, null]))
    total = _log_sum(totals)
    places: dict[str, list[tuple[float, Span]]] = {}
    for prior, reading in zip(priors, readings, strict=True):
        for span in reading.spans:
            text = passages[span.passage][span.start : span.end]
            places.setdefault(_normalise(text), []).append((prior + span.score - total, span))
    candidates = []
    for found in places.values():
        best = max(found, key=lambda place: place[0])[1]
        candidates.append(RankedAnswer(passages[best.passage][best.start : best.end], math.exp(_log_sum([p for p, _ in found])), best))
    candidates.sort(key=lambda answer: (-answer.probability, answer.best.passage, answer.best.start))
    chosen: list[RankedAnswer] = []
    for candidate in candidates:
        if len(chosen) == max_answers:
            break
        if not any(_overlap(candidate.best, other.best) for other in chosen):
            chosen.append(candidate)
    return chosen, min(1.0, math.exp(_log_sum(nulls) - total))


def _normalise(text: str) -> str:
    """Texts that differ in case, spacing or bordering punctuation are one answer."""
    return " ".join(text.casefold().split()).strip(".,;:!?\"'()[]{} ") or text


def _overlap(one: Span, other: Span) -> bool:
    return one.passage == other.passage and one.start < other.end and other.start < one.end


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top


def _log_difference(larger: float, smaller: float) -> float:
    """log(exp(larger) - exp(smaller)); rounding may leave nothing, which is log 0."""
    gap = -math.expm1(smaller - larger)
    return larger + math.log(gap) if gap > 0 else -math.inf
