"""Windows of passages: pooled from the states that their vectors were pooled from, kept in half a byte a dimension, and ranked by."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from openbook_server.bundle import load_bundle
from openbook_server.ingest.embed import PassageEmbedder, PassageEncoder
from openbook_server.ingest.windows import WINDOW_TOKENS, PassageGraph, pooled, spans_of
from openbook_server.knowledge import Document, KnowledgeBase, Passage, SearchOptions, pack
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.store import FILE
from openbook_server.knowledge.windows import nearness
from openbook_server.rows import Row, collate
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
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
        near = nearness(question, ["a", "b", "c"], dict(zip("abc", packed, strict=True)))
        expected = [max(float(question @ row) for row in rows) for rows in windows]
        assert [near[key] for key in "abc"] == pytest.approx(expected, abs=0.02)
    exact = np.array([[7, -7, 0, 3], [1, 2, -7, 4]], np.float32) / 10  # what four bits hold
    near = nearness(exact[1] / np.linalg.norm(exact[1]), ["x"], {"x": pack(exact)})
    assert near == {"x": pytest.approx(1.0, abs=1e-6)}


def test_passages_with_and_without_windows_do_not_compare() -> None:
    question, packed = unit(1)[0], pack(unit(2))
    assert nearness(question, ["a"], {"a": packed}) != {}
    assert nearness(question, ["a", "b"], {"a": packed}) == {}
    assert nearness(question, ["a", "b"], {"a": packed, "b": b""}) == {}
    assert nearness(question, [], {}) == {}
    assert nearness(None, ["a"], {"a": packed}) == {}


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
    embed = PassageEmbedder(tokenizer, graph, dim=bundle.embedder.dim, max_tokens=bundle.embedder.max_tokens)
    together = embed(passages)
    for at, (passage, row) in enumerate(zip(passages, PassageEncoder(tokenizer, bundle.embedder.max_tokens)(passages), strict=True)):
        [alone], [windows] = embed([passage])
        assert (alone.tobytes(), windows) == (together.whole[at].tobytes(), together.windows[at])
        states = np.asarray(graph.run(collate([row], 128), states=True)[HIDDEN_STATES][0], np.float32)
        assert row.text_from == 1 + len(tokenizer.encode(passage.title, add_special_tokens=False).ids)
        expected = pooled(states, spans_of(row))
        assert len(expected) == len(windows) // (bundle.embedder.dim // 2)
        near = nearness(expected[0] / np.linalg.norm(expected[0]), ["p"], {"p": windows})
        assert near["p"] == pytest.approx(1.0, abs=0.02)


def test_a_graph_of_an_earlier_export_gives_vectors_alone(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row([5, 6, 7])
    whole = PassageGraph(graph).run_rows([row], 16)
    monkeypatch.setattr(graph, "gives_states", False)
    plain = PassageGraph(graph).run_rows([row], 16)
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
