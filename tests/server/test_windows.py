"""Windows of passages: pooled from the states that their vectors were pooled from, kept in half a byte a dimension,
and the signs of their tokens; and ranked by."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from openbook_server.bundle import load_bundle
from openbook_server.ingest.embed import PassageEmbedder, PassageEncoder
from openbook_server.knowledge import Document, KnowledgeBase, Passage, SearchOptions, pack, relevance, signs
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.fusion import TOKEN_WEIGHT
from openbook_server.knowledge.records import SearchMode
from openbook_server.knowledge.store import FILE
from openbook_server.knowledge.windows import QUESTION_TOKENS, WINDOW_TOKENS, Nearness, edges, nearness
from openbook_server.rows import Row, collate
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
from openbook_server.states import PassageGraph, QuestionGraph, pooled, spans_of
from openbook_server.tokenization import load_tokenizer

if TYPE_CHECKING:
    from conftest import Place

DIM = 16


def unit(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def store(knowledge_base: KnowledgeBase, ids: Sequence[str], vectors: np.ndarray, windows: Sequence[bytes] = ()) -> None:
    passages = [Passage(id=f"{id_}#0", document_id=id_, text="nothing of it", start=0) for id_ in ids]
    knowledge_base.replace_documents([(Document(id=id_, text=""), "d") for id_ in ids], passages, vectors, windows)


def scores(knowledge_base: KnowledgeBase, question: np.ndarray, **options: object) -> dict[str, tuple[float, float | None]]:
    """(score, that of the nearest window) of every document, best first."""
    [hits] = knowledge_base.search(["?"], question[None], SearchOptions(top_k=40, **options))  # type: ignore[arg-type]
    return {hit.passage.document_id: (hit.score, hit.window_score) for hit in hits}


def test_half_a_byte_a_dimension_keeps_directions() -> None:
    windows = [unit(count, 384, seed=count) for count in (1, 7, 3)]
    packed = [pack(rows * 5) for rows in windows]  # of any length
    assert [len(part) for part in packed] == [192, 7 * 192, 3 * 192]
    for question in unit(20, 384, seed=9):
        near = nearness(question, None, ["a", "b", "c"], dict(zip("abc", packed, strict=True)))
        expected = [max(float(question @ row) for row in rows) for rows in windows]
        assert [near[key].window for key in "abc"] == pytest.approx(expected, abs=0.02)
    exact = np.array([[7, -7, 0, 3], [1, 2, -7, 4]], np.float32) / 10  # what four bits hold
    near = nearness(exact[1] / np.linalg.norm(exact[1]), None, ["x"], {"x": pack(exact)})
    assert near == {"x": Nearness(pytest.approx(1.0, abs=1e-6), None)}


@pytest.mark.parametrize("seed", range(10))
def test_equal_passages_have_equal_scores_to_the_bit_wherever_they_stand(seed: int) -> None:
    question, asked = unit(1, 384, seed)[0], signs(unit(5 + seed, 384, seed + 20), 256)
    kinds = [pack(unit(len(edges(60)) - 1, 384, seed + kind), signs(unit(60, 384, seed + 30 + kind), 256)) for kind in range(3)]
    near = nearness(question, asked, range(37), {key: kinds[key % 3] for key in range(37)})
    assert [len({near[key] for key in range(kind, 37, 3)}) for kind in range(3)] == [1, 1, 1]


def test_passages_with_and_without_windows_do_not_compare() -> None:
    question, packed = unit(1)[0], pack(unit(2))
    assert nearness(question, None, ["a"], {"a": packed}) != {}
    assert nearness(question, None, ["a", "b"], {"a": packed}) == {}
    assert nearness(question, None, ["a", "b"], {"a": packed, "b": b""}) == {}
    assert nearness(question, None, [], {}) == {}
    assert nearness(None, None, ["a"], {"a": packed}) == {}


@pytest.mark.parametrize("tokens", [1, 2, 23, 24, 35, 36, 37, 200])
@pytest.mark.parametrize("title", [0, 5])
def test_windows_share_a_text_out_evenly_and_leave_out_title_and_special_tokens(tokens: int, title: int) -> None:
    spans = spans_of(Row([0] * (tokens + title + 2), text_from=1 + title))
    assert [place for start, end in spans for place in range(start, end)] == list(range(1 + title, 1 + title + tokens))
    sizes = [end - start for start, end in spans]
    assert max(sizes) - min(sizes) <= 1
    assert len(spans) == max(1, round(tokens / WINDOW_TOKENS))


def test_a_row_without_any_text_has_a_window_all_the_same() -> None:
    assert spans_of(Row([1, 2])) == [(0, 1)]
    assert spans_of(Row([1, 7, 7, 2], text_from=3)) == [(2, 3)]


@pytest.fixture
def graph(tiny_bundle: Path) -> Graph:
    return Graph(tiny_bundle / "embedder.fp32.onnx", build_device("cpu", "fp32"))


def test_the_states_of_the_graph_are_those_that_a_passages_vector_is_the_mean_of(graph: Graph) -> None:
    rows = [Row([5, 6, 7, 8, 9]), Row(list(range(5, 45)))]
    outputs = graph.run(collate(rows, 48), states=True)
    assert HIDDEN_STATES not in graph.run(collate(rows, 48))
    for row, vector, states in zip(rows, outputs["sentence_embedding"], outputs[HIDDEN_STATES], strict=True):
        [mean] = pooled(np.asarray(states, np.float32), [(0, row.tokens)])
        np.testing.assert_allclose(mean / np.linalg.norm(mean), vector, atol=1e-5)


def test_a_passages_windows_are_pooled_behind_its_title_whatever_shares_its_batch(tiny_bundle: Path, graph: Graph) -> None:
    bundle = load_bundle(tiny_bundle)
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    passages = [
        Passage(id="a", document_id="a", title="the king", text="the red king read a book " * 8, start=0),
        Passage(id="b", document_id="b", text="one book", start=0),
    ]
    embed = PassageEmbedder(tokenizer, graph, bundle.embedder)
    together = embed(passages)
    for at, (passage, row) in enumerate(zip(passages, PassageEncoder(tokenizer, bundle.embedder.max_tokens)(passages), strict=True)):
        [alone], [windows] = embed([passage])
        assert (alone.tobytes(), windows) == (together.whole[at].tobytes(), together.windows[at])
        states = np.asarray(graph.run(collate([row], 128), states=True)[HIDDEN_STATES][0], np.float32)
        assert row.text_from == 1 + len(tokenizer.encode(passage.title, add_special_tokens=False).ids)
        expected = pooled(states, spans_of(row))
        tokens = signs(states[row.text_from : len(row.ids) - 1], bundle.embedder.token_dims)
        assert windows == pack(expected, tokens)
        assert len(windows) == 3 + len(expected) * bundle.embedder.dim // 2 + tokens.nbytes
        near = nearness(expected[0] / np.linalg.norm(expected[0]), None, ["p"], {"p": windows})
        assert near["p"].window == pytest.approx(1.0, abs=0.02)


def test_a_graph_of_an_earlier_export_gives_vectors_alone(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row([5, 6, 7])
    whole = PassageGraph(graph, 16).run_rows([row], 16)
    monkeypatch.setattr(graph, "gives_states", False)
    plain = PassageGraph(graph, 16).run_rows([row], 16)
    assert (whole["windows"] != [b""], plain["windows"]) == (True, [b""])
    assert plain["sentence_embedding"].tobytes() == whole["sentence_embedding"].tobytes()


def test_hybrid_search_ranks_by_the_nearest_window(place: Place) -> None:
    question, whole = unit(1, seed=5)[0], unit(12)
    windows = [unit(1 + n % 3, seed=100 + n) for n in range(12)]
    knowledge_base = place.open()
    store(knowledge_base, [f"d{n}" for n in range(12)], whole, [pack(rows) for rows in windows])
    for _ in range(2):
        found = scores(knowledge_base, question)
        for n, rows in enumerate(windows):
            score, near = found[f"d{n}"]
            assert near == pytest.approx(float((rows @ question).max()), abs=0.06)
            assert score == near  # no word in common
        assert list(found) == sorted(found, key=lambda id_: -found[id_][0])
        dense = scores(knowledge_base, question, mode="dense")
        assert {near for _, near in dense.values()} == {None}
        assert list(dense) == [f"d{n}" for n in np.argsort(-(whole @ question))]
        assert {near for _, near in scores(knowledge_base, question, fusion="reciprocal_rank").values()} == {None}
        knowledge_base.close()
        knowledge_base = place.open()
    knowledge_base.close()


def test_one_passage_without_windows_lets_all_be_compared_by_their_vectors(place: Place) -> None:
    question, whole = unit(1, seed=5)[0], unit(4)
    knowledge_base = place.open()
    store(knowledge_base, ["a", "b", "c"], whole[:3], [pack(unit(2, seed=n)) for n in range(3)])
    store(knowledge_base, ["d"], whole[3:])
    found = scores(knowledge_base, question)
    assert {near for _, near in found.values()} == {None}
    assert [found[id_][0] for id_ in "abcd"] == pytest.approx((whole @ question).tolist(), abs=1e-5)
    knowledge_base.delete_documents(["d"])
    assert {near is None for _, near in scores(knowledge_base, question).values()} == {False}
    knowledge_base.close()


def test_windows_go_with_their_passages(tmp_path: Path) -> None:
    knowledge_base = EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True)
    packed = [pack(unit(2, seed=n)) for n in range(3)]
    store(knowledge_base, ["a", "b", "c"], unit(3), packed)
    store(knowledge_base, ["b"], unit(1), packed[:1])
    knowledge_base.delete_documents(["c"])
    [state] = knowledge_base.generation_states()
    assert (state.passages, state.vector_bytes) == (2, 2 * (4 * DIM + 2 * DIM // 2))  # of each a vector and two windows
    knowledge_base.close()
    connection = sqlite3.connect(tmp_path / FILE)
    [table] = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'windows_*'")]
    rows = connection.execute(f"SELECT p.id, w.vectors FROM {table} w LEFT JOIN passages p ON p.number = w.passage ORDER BY 1").fetchall()  # noqa: S608
    connection.close()
    assert rows == [("a#0", packed[0]), ("b#0", packed[0])]


def slow_token_scores(question: np.ndarray, passages: Sequence[np.ndarray], dims: int) -> list[float]:
    """From the states themselves, a token, a window and a passage after the other."""

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return math.cos(math.pi * sum((a > 0) != (b > 0) for a, b in zip(one[:dims], other[:dims], strict=True)) / dims)

    near = []  # of each passage, of each window, of each token of the question
    for states in passages:
        ends = edges(len(states))
        near.append([[max(cosine(token, other) for other in states[a:b]) for token in question] for a, b in pairwise(ends)])
    best = [[max(window[i] for window in windows) for i in range(len(question))] for windows in near]
    weights = [max(max(row[i] for row in best) - sum(row[i] for row in best) / len(best), 1e-3) for i in range(len(question))]
    return [
        max(sum(weight * token for weight, token in zip(weights, window, strict=True)) for window in windows) / sum(weights)
        for windows in near
    ]


def states_of(count: int, dim: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def packed_states(states: np.ndarray, dims: int) -> bytes:
    return pack(pooled(states, list(pairwise(edges(len(states))))), signs(states, dims))


def test_tokens_are_compared_window_by_window() -> None:
    question = states_of(7, seed=1)
    passages = [states_of(count, seed=10 + count) for count in (1, 90, 24, 37)]
    passages[1][60] = question[2]  # so that something stands out
    passages[3][5:8] = question[4:7]
    vector = question.mean(axis=0) / np.linalg.norm(question.mean(axis=0))
    packed = dict(enumerate(packed_states(states, 64) for states in passages))
    near = nearness(vector, signs(question, 64), list(packed), packed)
    assert [near[n].tokens for n in range(4)] == pytest.approx(slow_token_scores(question, passages, 64), abs=1e-6)
    alone = nearness(vector, None, list(packed), packed)
    assert alone == {n: Nearness(near[n].window, None) for n in range(4)}
    for n, states in enumerate(passages):
        rows = pooled(states, list(pairwise(edges(len(states)))))
        assert near[n].window == pytest.approx(float((rows @ vector / np.linalg.norm(rows, axis=1)).max()), abs=0.04)


def test_signs_of_few_dimensions_are_filled_up() -> None:
    states = np.array([[1.0, -1.0, 0.0, 2.0] * 5], np.float32)
    found = signs(states, 20)
    assert (found.shape, found.dtype) == ((1, 1), np.uint64)
    assert int(np.bitwise_count(found).sum()) == 10
    assert signs(states_of(3), 65).shape == (3, 2)


def test_where_tokens_are_lacking_windows_alone_are_compared() -> None:
    question, tokens = unit(1, 128)[0], signs(states_of(3), 64)
    kept, plain = packed_states(states_of(30), 64), pack(unit(2, 128))
    assert {near.tokens is None for near in nearness(question, tokens, "ab", {"a": kept, "b": kept}).values()} == {False}
    assert {near.tokens for near in nearness(question, tokens, "ab", {"a": kept, "b": plain}).values()} == {None}
    assert {near.tokens for near in nearness(question, tokens[:0], "a", {"a": kept}).values()} == {None}
    assert nearness(question, None, "a", {"a": kept})["a"] == nearness(question, tokens, "ab", {"a": kept, "b": plain})["a"]


def test_many_passages_are_compared_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    passages = {n: packed_states(states_of(1 + 13 * n, seed=n), 64) for n in range(12)}
    tokens, vector = signs(states_of(5, seed=99), 64), unit(1, 128)[0]
    whole = nearness(vector, tokens, list(passages), passages)
    for at_once in (1, 50, 200):
        monkeypatch.setattr("openbook_server.knowledge.windows._AT_ONCE", at_once)
        assert nearness(vector, tokens, list(passages), passages) == whole


def test_a_question_has_the_signs_of_its_own_tokens_whatever_shares_its_batch(graph: Graph) -> None:
    rows = [Row([1, 6, 7, 2]), Row([1, *range(5, 40), 2]), Row([1, 2]), Row([1, *[6] * (QUESTION_TOKENS + 20), 2])]
    together = QuestionGraph(graph, 16).run_rows(rows, 96)
    assert [len(tokens) for tokens in together["tokens"]] == [2, 35, 0, QUESTION_TOKENS]
    for at, row in enumerate(rows):
        alone = QuestionGraph(graph, 16).run_rows([row], 96)
        assert alone["tokens"][0].tobytes() == together["tokens"][at].tobytes()
        states = graph.run(collate([row], 96), states=True)[HIDDEN_STATES][0]
        assert together["tokens"][at].tolist() == signs(states[1 : len(row.ids) - 1], 16)[:QUESTION_TOKENS].tolist()
    assert QuestionGraph(graph, 0).run_rows(rows, 96)["tokens"] == [None] * 4


@pytest.mark.parametrize("mode", ["hybrid", "late_interaction"])
def test_a_close_look_adds_how_near_the_tokens_are(place: Place, mode: SearchMode) -> None:
    states = [states_of(30 + 5 * n, DIM, seed=n) for n in range(6)]
    question = states_of(4, DIM, seed=50)
    states[4][7:11] = question
    vector, tokens = unit(1)[0], signs(question, DIM)
    knowledge_base = place.open()
    store(knowledge_base, [f"d{n}" for n in range(6)], unit(6), [packed_states(each, DIM) for each in states])
    for _ in range(2):
        [hits] = knowledge_base.search(["?"], vector[None], SearchOptions(top_k=6, mode=mode), [tokens])
        assert [hit.token_score for hit in hits if hit.passage.document_id == "d4"] == [1.0]
        for hit in hits:
            assert hit.token_score is not None
            assert hit.window_score is not None
            assert hit.score == pytest.approx(hit.window_score + TOKEN_WEIGHT * hit.token_score)  # no word in common
            assert relevance(hit) == hit.score
        [without] = knowledge_base.search(["?"], vector[None], SearchOptions(top_k=6, mode=mode))
        assert {hit.token_score for hit in without} == {None}
        [dense] = knowledge_base.search(["?"], vector[None], SearchOptions(top_k=6, mode="dense"), [tokens])
        assert {hit.token_score for hit in dense} == {None}
        knowledge_base.close()
        knowledge_base = place.open()
    knowledge_base.close()
