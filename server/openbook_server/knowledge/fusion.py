"""Dense and lexical scores into one: pure, shared by every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# One BM25 point is worth this much cosine. Chosen on SQuAD training questions, not on the benchmark: docs/search.md.
LEXICAL_WEIGHT = 0.02
CANDIDATES = 100  # of each ranking that are fused, at least
SHORTLIST = 30  # of the fused ones that are compared word by word, at least


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate passage by its number in the knowledge base."""

    number: int
    score: float
    dense: float | None
    lexical: float | None


def fuse(dense: Mapping[int, float], lexical: Mapping[int, float], top_k: int) -> list[Scored]:
    """Rank candidates by cosine + LEXICAL_WEIGHT · BM25, best first, ties by number.

    A weighted sum, not reciprocal ranks: it keeps how much better a passage is, which the reader's prior needs, and it
    ranks better (docs/search.md).

    Args:
        dense: number -> cosine of every candidate.
        lexical: number -> BM25 of those that share a word with the question.
        top_k: at most this many are returned.
    """
    scored = [
        Scored(number, cosine + LEXICAL_WEIGHT * lexical.get(number, 0.0), cosine, lexical.get(number)) for number, cosine in dense.items()
    ]
    return sorted(scored, key=lambda item: (-item.score, item.number))[:top_k]
