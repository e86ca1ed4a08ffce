"""From what each index proposes to ranked hits: pure, shared by every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.overlap import overlaps
from openbook_server.knowledge.records import Fusion, Hit, Passage, SearchOptions
from openbook_server.knowledge.windows import Nearness

# One BM25 point is worth this much cosine. Chosen on SQuAD training questions, not on the benchmark: docs/search.md.
LEXICAL_WEIGHT = 0.007  # beside the comparison word by word, which tells the same better
TOKEN_WEIGHT = 1.6  # of the cosine of tokens; fitted with the others
SHORTLIST_WEIGHT = 0.03  # in the choice of whom to look at so
RANK_OFFSET = 60  # of reciprocal ranks, after Cormack, Clarke & Buettcher 2009, section 2
CANDIDATES = 100  # of each ranking that are fused, at least
SHORTLIST = 30  # of the fused ones that are looked at window by window and word by word, at least
_SHORTLISTED = ("hybrid", "late_interaction")  # modes that rank by more than what proposed a candidate
_NOTHING_NEAR = (None, None)
_DIVERSE_POOL = 3  # times top_k: what diverse hits are chosen from, at least


class Ordered(Protocol):
    """What can name a passage in a backend: of equal scores the smaller key comes first."""

    def __lt__(self, other: Any, /) -> bool: ...
    def __hash__(self) -> int: ...


Key = TypeVar("Key", bound=Ordered)


@dataclass(frozen=True, slots=True)
class Candidates(Generic[Key]):
    """What the indexes propose for one question."""

    dense: Mapping[Key, float]  # cosine; in hybrid mode of every candidate, also of those that only the words found
    lexical: Mapping[Key, float]  # BM25 of those that share a word with the question
    passages: Callable[[Sequence[Key]], Mapping[Key, Passage]]  # loads those that are still stored, and maybe others
    vectors: Callable[[Sequence[Key]], Mapping[Key, NDArray[np.float32]]]  # loads unit vectors of those
    nearness: Callable[[Sequence[Key]], Mapping[Key, Nearness]] = lambda keys: {}  # see `windows.nearness`
    drawn: Mapping[Key, float] = field(default_factory=dict)  # in random mode, by the numbers that drew them


def depth(options: SearchOptions) -> int:
    """How many candidates each index must propose."""
    return max(CANDIDATES, _pool(options)) if options.mode in _SHORTLISTED else _pool(options)


def looks_closely(options: SearchOptions) -> bool:
    """Whether the best candidates are compared window by window, token by token and, where words propose some, word by word."""
    return options.mode == "late_interaction" or (options.mode == "hybrid" and options.fusion == "weighted")


def rank(question: str, candidates: Candidates[Key], options: SearchOptions) -> list[Hit]:
    """The best `options.top_k` hits, best first, ties by key; with diversity, in the order in which they were chosen."""
    scores, dense, lexical = _scores(candidates, options), candidates.dense, candidates.lexical
    pool = _best(scores, _pool(options))
    passages = candidates.passages(pool)
    order = [key for key in pool if key in passages]  # the others were deleted since they were found
    hits: dict[Key, Hit] = {}
    if looks_closely(options):
        near, bonuses = candidates.nearness(order), dict[Key, float]()
        if options.by_words:
            bonuses = dict(zip(order, overlaps(question, [passages[key].stem_lines for key in order]), strict=True))
        for key in order:
            (window, tokens), cosine, bm25, bonus = near.get(key, _NOTHING_NEAR), dense[key], lexical.get(key), bonuses.get(key)
            hits[key] = Hit(passages[key], _sum(cosine, window, tokens, bm25, bonus), cosine, window, bm25, bonus, tokens)
    else:
        hits = {key: Hit(passages[key], scores[key], dense_score=dense.get(key), lexical_score=lexical.get(key)) for key in order}
    order.sort(key=lambda key: (-hits[key].score, key))
    if options.min_score is not None:
        order = [key for key in order if hits[key].score >= options.min_score]
    if options.diversity:
        order = _diverse(order, hits, candidates.vectors(order), options)
    return [hits[key] for key in order[: options.top_k]]


def _best(scores: Mapping[Key, float], count: int) -> list[Key]:
    return [key for _, key in sorted([(-score, key) for key, score in scores.items()])[:count]]


def _pool(options: SearchOptions) -> int:
    """How many candidates are looked at one by one."""
    wanted = _DIVERSE_POOL * options.top_k if options.diversity else options.top_k
    return max(SHORTLIST, wanted) if options.mode in _SHORTLISTED or options.diversity else wanted


def _scores(candidates: Candidates[Key], options: SearchOptions) -> dict[Key, float]:
    """Those by which candidates are chosen."""
    dense, lexical = candidates.dense, candidates.lexical
    if options.mode in ("dense", "late_interaction"):
        return dict(dense)
    if options.mode == "lexical":
        return dict(lexical)
    if options.mode == "random":
        return dict(candidates.drawn)
    return fuse(dense, lexical, options.fusion)


def fuse(dense: Mapping[Key, float], lexical: Mapping[Key, float], fusion: Fusion) -> dict[Key, float]:
    """Candidates' scores from both rankings.

    "weighted": cosine + SHORTLIST_WEIGHT · BM25. It keeps how much better a passage is, and it ranks better (docs/search.md).
    "reciprocal_rank": Σ 1 / (RANK_OFFSET + rank) over the rankings that hold it, ranks from 1; that by cosine holds all candidates,
    also those that only the words found. It needs no weight between scores of different scales.

    Args:
        dense: cosine of every candidate.
        lexical: BM25 of some of them; the others count as 0, or as not ranked.
    """
    if fusion == "weighted":
        return {key: cosine + SHORTLIST_WEIGHT * lexical.get(key, 0.0) for key, cosine in dense.items()}
    scores = dict.fromkeys(dense, 0.0)
    for ranking in (dense, lexical):
        for place, key in enumerate(sorted(ranking, key=lambda key: (-ranking[key], key)), 1):
            scores[key] = scores.get(key, 0.0) + 1 / (RANK_OFFSET + place)
    return scores


def relevance(hit: Hit) -> float:
    """A hit's score on the scale of the weighted fusion, whatever mode found it: what the reader's prior was calibrated on.

    Of a hit that was looked at (hybrid, late interaction) its score; of others cosine + SHORTLIST_WEIGHT · BM25, as `fuse` adds them; what
    was not computed is 0.
    """
    if hit.window_score is None and hit.overlap_score is None:
        return (hit.dense_score or 0.0) + SHORTLIST_WEIGHT * (hit.lexical_score or 0.0)
    return _sum(hit.dense_score or 0.0, hit.window_score, hit.token_score, hit.lexical_score, hit.overlap_score)


def _sum(cosine: float, window: float | None, tokens: float | None, bm25: float | None, overlap: float | None) -> float:
    """The nearest window's cosine, or the passage's own where it has no windows, + TOKEN_WEIGHT · the tokens' + LEXICAL_WEIGHT · BM25 +
    overlap."""
    return (cosine if window is None else window) + TOKEN_WEIGHT * (tokens or 0.0) + LEXICAL_WEIGHT * (bm25 or 0.0) + (overlap or 0.0)


def _diverse(
    order: Sequence[Key], hits: Mapping[Key, Hit], vectors: Mapping[Key, NDArray[np.float32]], options: SearchOptions
) -> list[Key]:
    """Maximal marginal relevance (Carbonell & Goldstein 1998): next comes the hit with the largest
    (1 - diversity) · relevance - diversity · (its largest cosine with one chosen before), relevance being the score scaled
    to 0..1 over all of them."""
    left = [key for key in order if key in vectors]
    if not left:
        return []
    scores = np.array([hits[key].score for key in left])
    relevance = (scores - scores.min()) / max(float(np.ptp(scores)), 1e-12)
    matrix = np.stack([vectors[key] for key in left])
    likeness = np.zeros(len(left))  # to the chosen one that is most alike
    chosen: list[int] = []
    while len(chosen) < min(options.top_k, len(left)):
        gain = (1 - options.diversity) * relevance - options.diversity * likeness
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        products = np.einsum("nd,d->n", matrix, matrix[best])  # not `@`: equal vectors must be equally near, so that ties go by order
        likeness = np.maximum(likeness, products) if chosen else products
        chosen.append(best)
    return [left[at] for at in chosen]
