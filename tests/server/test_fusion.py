"""Ranking of candidates against slow formulas written out here, with a backend made of dictionaries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from openbook_server.knowledge import Hit, Passage, SearchOptions
from openbook_server.knowledge.fusion import (
    LEXICAL_WEIGHT,
    SHORTLIST,
    SHORTLIST_WEIGHT,
    TOKEN_WEIGHT,
    Candidates,
    depth,
    fuse,
    rank,
    relevance,
)
from openbook_server.knowledge.windows import Nearness

DIM = 8


def backend(count: int, seed: int = 0) -> tuple[Candidates[str], dict[str, np.ndarray]]:
    """Passages "p0".. with random cosines, and numbers that drew them; every third has a BM25."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = {f"p{n}": row.astype(np.float32) for n, row in enumerate(rows)}
    dense = {key: float(row[0]) for key, row in vectors.items()}
    lexical = {f"p{n}": float(n % 7) for n in range(0, count, 3)}
    passages = {key: Passage(id=key, document_id=key, text="nothing of it", start=0) for key in vectors}
    return (
        Candidates(
            dense,
            lexical,
            lambda keys: {key: passages[key] for key in keys},
            lambda keys: {key: vectors[key] for key in keys},
            drawn=dict(zip(vectors, rng.random(count).tolist(), strict=True)),
        ),
        vectors,
    )


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


def test_the_weighted_sum_counts_no_word_in_common_as_nothing() -> None:
    scores = fuse({"a": 0.5, "b": 0.25}, {"b": 10.0}, "weighted")
    assert scores == {"a": 0.5, "b": pytest.approx(0.25 + SHORTLIST_WEIGHT * 10.0)}


def test_reciprocal_ranks_add_up_over_the_rankings_that_hold_a_candidate() -> None:
    scores = fuse({"a": 0.9, "b": 0.8, "c": 0.8}, {"c": 4.0, "a": 3.0}, "reciprocal_rank")
    assert scores == {"a": pytest.approx(1 / 61 + 1 / 62), "b": pytest.approx(1 / 62), "c": pytest.approx(1 / 63 + 1 / 61)}


def test_relevance_is_on_the_weighted_scale_whatever_found_the_passage() -> None:
    passage = Passage(id="p", document_id="p", text="", start=0)
    assert relevance(Hit(passage=passage, score=12.0, lexical_score=12.0)) == pytest.approx(12 * SHORTLIST_WEIGHT)
    assert relevance(Hit(passage=passage, score=0.4, dense_score=0.4)) == pytest.approx(0.4)
    assert relevance(Hit(passage=passage, score=0.03, dense_score=0.4, lexical_score=10.0)) == pytest.approx(0.4 + 10 * SHORTLIST_WEIGHT)
    looked_at = Hit(passage=passage, score=0.0, dense_score=0.4, lexical_score=10.0, overlap_score=0.2)
    assert relevance(looked_at) == pytest.approx(0.4 + 10 * LEXICAL_WEIGHT + 0.2)
    assert relevance(looked_at._replace(window_score=0.7)) == pytest.approx(0.7 + 10 * LEXICAL_WEIGHT + 0.2)
    near = looked_at._replace(window_score=0.7, token_score=0.5)
    assert relevance(near) == pytest.approx(0.7 + 0.5 * TOKEN_WEIGHT + 10 * LEXICAL_WEIGHT + 0.2)
    candidates, _ = backend(40)
    for hit in rank("nothing of it", candidates, SearchOptions(top_k=40)):
        assert relevance(hit) == pytest.approx(hit.score)


def test_passages_stand_in_the_order_in_which_they_were_drawn_and_weigh_the_same_when_they_are_read() -> None:
    candidates, _ = backend(40)
    drawn = candidates.drawn
    hits = rank("question", replace(candidates, dense={}, lexical={}), SearchOptions(top_k=5, mode="random"))
    assert ids(hits) == sorted(drawn, key=lambda key: -drawn[key])[:5]
    assert [hit.score for hit in hits] == [drawn[hit.passage.id] for hit in hits]
    assert [relevance(hit) for hit in hits] == [0.0] * 5


def test_ties_are_broken_by_the_order_of_the_keys() -> None:
    candidates, _ = backend(10)
    tied = Candidates(dict.fromkeys(["p9", "p2", "p4"], 0.5), {}, candidates.passages, candidates.vectors)
    for mode in ("dense", "late_interaction", "hybrid"):
        assert ids(rank("question", tied, SearchOptions(top_k=2, mode=mode))) == ["p2", "p4"]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["dense", "late_interaction", "lexical", "hybrid", "random"])
def test_a_minimum_score_leaves_out_exactly_the_hits_below_it(mode: str) -> None:
    candidates, _ = backend(60)
    options = SearchOptions(top_k=20, mode=mode)  # type: ignore[arg-type]
    everything = rank("question", candidates, options)
    least = everything[7].score
    strict = rank("question", candidates, SearchOptions(top_k=20, mode=mode, min_score=least))  # type: ignore[arg-type]
    assert ids(strict) == [hit.passage.id for hit in everything if hit.score >= least]
    assert rank("question", candidates, SearchOptions(top_k=20, mode=mode, min_score=1e9)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("diversity", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("mode", ["dense", "late_interaction", "lexical", "hybrid", "random"])
def test_diverse_hits_are_those_of_maximal_marginal_relevance(diversity: float, mode: str) -> None:
    candidates, vectors = backend(60, seed=3)
    top_k = 8
    pool = rank("question", candidates, SearchOptions(top_k=30, mode=mode))[:30]  # type: ignore[arg-type]
    low, high = min(hit.score for hit in pool), max(hit.score for hit in pool)
    relevance = {hit.passage.id: (hit.score - low) / (high - low) for hit in pool}
    chosen: list[str] = []
    while len(chosen) < min(top_k, len(pool)):

        def gain(key: str) -> float:
            likeness = max((float(vectors[key] @ vectors[other]) for other in chosen), default=0.0)
            return (1 - diversity) * relevance[key] - diversity * likeness

        chosen.append(max((key for key in relevance if key not in chosen), key=gain))
    options = SearchOptions(top_k=top_k, mode=mode, diversity=diversity)  # type: ignore[arg-type]
    assert depth(options) >= 30
    assert ids(rank("question", candidates, options)) == chosen


def test_of_two_passages_that_say_the_same_diversity_keeps_one_first() -> None:
    twin, other = np.eye(DIM, dtype=np.float32)[0], np.eye(DIM, dtype=np.float32)[1]
    vectors = {1: twin, 2: twin, 3: other}
    passages = {key: Passage(id=str(key), document_id=str(key), text="x", start=0) for key in vectors}
    candidates = Candidates(
        {1: 0.9, 2: 0.89, 3: 0.7}, {}, lambda keys: {k: passages[k] for k in keys}, lambda keys: {k: vectors[k] for k in keys}
    )
    plain = SearchOptions(top_k=2, mode="dense")
    assert ids(rank("q", candidates, plain)) == ["1", "2"]
    assert ids(rank("q", candidates, SearchOptions(top_k=2, mode="dense", diversity=0.6))) == ["1", "3"]


@pytest.mark.parametrize("seed", range(5))
def test_diversity_chooses_of_passages_that_say_the_same_the_first_stored(seed: int) -> None:
    rows = np.tile(np.random.default_rng(seed).normal(size=(3, 384)).astype(np.float32) / 384**0.5, (13, 1))
    vectors = dict(enumerate(rows))
    passages = {key: Passage(id=str(key), document_id=str(key), text="x", start=0) for key in vectors}
    candidates = Candidates(
        {key: 0.5 + 0.1 * (key % 3) for key in vectors},
        {},
        lambda keys: {k: passages[k] for k in keys},
        lambda keys: {k: vectors[k] for k in keys},
    )
    chosen = [int(id_) for id_ in ids(rank("q", candidates, SearchOptions(top_k=39, mode="dense", diversity=0.5)))]
    for twin in range(3):
        assert [key for key in chosen if key % 3 == twin] == list(range(twin, 39, 3))


def test_words_choose_whom_to_compare_with_more_weight_than_they_have_in_the_end() -> None:
    keys = range(SHORTLIST + 10)
    dense = dict.fromkeys(keys, 0.5) | {0: 0.3}
    lexical = dict.fromkeys(keys, 1.0) | {0: 12.0}
    passages = {key: Passage(id=str(key), document_id=str(key), text="x", start=0) for key in keys}
    candidates = Candidates(dense, lexical, lambda keys: {key: passages[key] for key in keys}, lambda keys: {})
    assert 0.3 + 12 * LEXICAL_WEIGHT < 0.5 + LEXICAL_WEIGHT
    assert 0.3 + 12 * SHORTLIST_WEIGHT > 0.5 + SHORTLIST_WEIGHT
    hits = rank("of nothing", candidates, SearchOptions(top_k=SHORTLIST))
    assert ids(hits) == [str(key) for key in range(1, SHORTLIST)] + ["0"]
    assert hits[-1].score == pytest.approx(0.3 + 12 * LEXICAL_WEIGHT)


def test_a_passage_deleted_since_it_was_found_is_no_hit() -> None:
    candidates, _ = backend(10)
    gone = Candidates(candidates.dense, candidates.lexical, lambda keys: {}, lambda keys: {})
    for diversity in (0.0, 0.5):
        assert rank("question", gone, SearchOptions(top_k=3, diversity=diversity)) == []


def test_every_hit_carries_the_scores_that_were_computed() -> None:
    candidates, _ = backend(40)
    for hit in rank("nothing of it", candidates, SearchOptions(top_k=random.Random(0).randint(5, 9))):
        assert hit.dense_score == candidates.dense[hit.passage.id]
        assert hit.lexical_score == candidates.lexical.get(hit.passage.id)
        assert hit.overlap_score is not None


def test_late_interaction_ranks_the_nearest_by_windows_and_tokens_and_by_no_word() -> None:
    candidates, _ = backend(SHORTLIST + 20)
    rng = np.random.default_rng(1)
    asked: list[str] = []

    def near(keys: Sequence[str]) -> dict[str, Nearness]:
        asked.extend(keys)
        return {key: Nearness(*rng.random(2)) for key in keys}

    # words are in the passages, and yet nobody may have looked for them: `lexical` is what a backend leaves empty in this mode
    hits = rank("nothing of it", replace(candidates, lexical={}, nearness=near), SearchOptions(top_k=SHORTLIST, mode="late_interaction"))
    assert asked == sorted(candidates.dense, key=lambda key: -candidates.dense[key])[:SHORTLIST]
    assert sorted(ids(hits)) == sorted(asked)
    for hit in hits:
        assert hit.score == hit.window_score + TOKEN_WEIGHT * hit.token_score == relevance(hit)  # type: ignore[operator]
        assert (hit.lexical_score, hit.overlap_score) == (None, None)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_without_windows_late_interaction_ranks_as_dense_does() -> None:
    candidates = replace(backend(60)[0], lexical={})
    plain, late = (rank("nothing of it", candidates, SearchOptions(top_k=9, mode=mode)) for mode in ("dense", "late_interaction"))
    assert [(hit.passage.id, hit.score) for hit in late] == [(hit.passage.id, hit.score) for hit in plain]
