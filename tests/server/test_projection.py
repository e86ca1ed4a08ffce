"""Graphs of fewer dimensions: chosen by the data, exact in their scores, learned again when the rows become others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from openbook_server.knowledge import Document, Passage, SearchOptions
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.graph import Graph
from openbook_server.knowledge.projection import learn
from openbook_server.knowledge.vectors import VectorIndex

DIM = 96


def flat(rows: int, rank: int, seed: int, noise: float = 0.02) -> np.ndarray:
    """Unit vectors near a subspace of `rank` dimensions that the seed chooses."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, rank)))[0]
    rng = np.random.default_rng((seed, rows))
    vectors = rng.normal(size=(rows, rank)) @ basis.T + noise * rng.normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def index_of(vectors: np.ndarray, **options: int) -> VectorIndex:
    def truth(labels: Sequence[int]) -> Mapping[int, np.ndarray]:
        return {label: vectors[label] for label in labels}

    return VectorIndex(DIM, truth, flat_limit=100, **options)


def test_the_data_decide_how_few_dimensions_are_enough() -> None:
    few = learn(flat(1_000, 12, seed=1))
    assert few is not None
    assert few.matrix.shape == (DIM, DIM // 4)
    assert np.allclose(few.matrix.T @ few.matrix, np.eye(DIM // 4), atol=1e-5)
    assert learn(flat(1_000, DIM, seed=1)) is None  # every direction matters
    fixed = learn(flat(1_000, DIM, seed=1), dims=40)
    assert fixed is not None
    assert fixed.matrix.shape == (DIM, 40)
    assert learn(flat(1_000, 12, seed=1), dims=DIM) is None
    assert learn(flat(1_000, 4, seed=1)[:, :32]) is None  # nothing to gain


def test_a_projection_knows_rows_it_was_not_made_for() -> None:
    projection = learn(flat(1_000, 12, seed=1))
    assert projection is not None
    assert projection.fits(flat(200, 12, seed=1))
    assert not projection.fits(flat(200, 12, seed=2))


def test_scores_are_those_of_the_whole_vectors_and_hardly_a_neighbour_is_missed() -> None:
    vectors, queries = flat(3_000, 12, seed=1), flat(50, 12, seed=1)
    index = index_of(vectors)
    index.add(list(range(3_000)), vectors)
    index.settle()
    assert index.graph_width == DIM // 4
    exact = queries @ vectors.T
    found = index.search(queries, 10)
    for row, scores in zip(found, exact, strict=True):
        assert list(row.values()) == pytest.approx([float(scores[label]) for label in row], abs=1e-5)
        assert list(row.values()) == sorted(row.values(), reverse=True)
    recall = np.mean([len(set(row) & set(np.argsort(-scores)[:10].tolist())) / 10 for row, scores in zip(found, exact, strict=True)])
    assert recall >= 0.99
    for label, vector in index.vectors([5, 2_999, 9_999]).items():
        assert np.array_equal(vector, vectors[label])
    allowed = frozenset(range(0, 3_000, 3))
    for row, scores in zip(index.search(queries, 5, allowed=allowed), exact, strict=True):
        assert list(row) == sorted(allowed, key=lambda label: -scores[label])[:5]


@pytest.mark.parametrize("k", [10, 300])
def test_few_allowed_rows_are_compared_by_their_vectors_however_little_of_them_the_graph_holds(k: int) -> None:
    vectors, queries = flat(1_000, DIM, seed=1), flat(20, DIM, seed=2)
    index = index_of(vectors, graph_dims=8)
    index.add(list(range(900)), vectors[:900])
    index.settle()
    index.add(list(range(900, 1_000)), vectors[900:])  # these stay in the buffer
    allowed = frozenset(range(0, 1_000, 2))
    assert (index.graph_width, index.graph_rows) == (8, 900)
    for row, scores in zip(index.search(queries, k, allowed=allowed), queries @ vectors.T, strict=True):
        assert list(row) == sorted(allowed, key=lambda label: -scores[label])[:k]
        assert list(row.values()) == pytest.approx([float(scores[label]) for label in row], abs=1e-5)


def test_rows_of_another_kind_make_the_graph_be_built_again(caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.concatenate([flat(1_000, 12, seed=1), flat(1_000, 12, seed=2)])
    index = index_of(vectors)
    index.add(list(range(1_000)), vectors[:1_000])
    index.settle()
    with caplog.at_level(logging.INFO):
        for at in range(1_000, 2_000, 50):
            index.add(list(range(at, at + 50)), vectors[at : at + 50])
            index.settle()
        index.flush()
        index.optimise()
    assert "building the graph of" in caplog.text
    queries = flat(50, 12, seed=2)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    recall = np.mean([len(set(row) & set(best.tolist())) / 10 for row, best in zip(index.search(queries, 10), exact, strict=True)])
    assert recall >= 0.99
    assert index.labels == frozenset(range(2_000))


def test_places_of_deleted_rows_are_used_again_and_a_graph_of_mostly_deleted_rows_is_built_again(caplog: pytest.LogCaptureFixture) -> None:
    vectors = flat(2_000, 12, seed=1)
    graph = Graph(DIM, None, capacity=300)
    graph.add(list(range(300)), vectors[:300])
    for label in range(100):
        graph.delete(label)
    graph.add(list(range(1_000, 1_080)), vectors[1_000:1_080])
    assert (graph._index.get_current_count(), graph.deleted, len(graph.live)) == (300, 20, 280)
    [found] = graph.candidates(vectors[1_005:1_006], 1, 64)
    assert list(found) == [1_005]
    assert set(graph.candidates(vectors[:1], 280, 64)[0]) == graph.live
    index = index_of(vectors)
    index.add(list(range(2_000)), vectors)
    index.settle()
    index.delete(list(range(900)))
    with caplog.at_level(logging.INFO):
        index.settle()
        assert not caplog.text
        index.delete(list(range(900, 1_500)))
        index.settle()
    assert "most of its rows are deleted" in caplog.text
    assert index.labels == frozenset(range(1_500, 2_000))
    assert set(index.search(vectors[:1], 600)[0]) == set(range(1_500, 2_000))


@pytest.mark.parametrize("graph_dims", [0, 8, DIM])
@pytest.mark.parametrize("stays", [True, False])
def test_a_graph_without_rows_is_dropped_whether_or_not_the_store_lost_them_first(graph_dims: int, *, stays: bool) -> None:
    vectors = flat(300, 12, seed=1)
    stored = dict(enumerate(vectors))
    index = VectorIndex(
        DIM, lambda labels: {label: stored[label] for label in labels if label in stored}, flat_limit=100, graph_dims=graph_dims
    )
    index.add(list(range(200)), vectors[:200])
    index.settle()
    index.delete(list(range(200 if stays else 150)))
    stored.clear()
    assert index.optimise()
    assert (index.graph_rows, index.graph_width, index.search(vectors[:1], 5)) == (0, 0, [{}])
    index.add(list(range(200, 300)), vectors[200:])
    index.settle()
    assert list(index.search(vectors[250:251], 1)[0]) == [250]


@pytest.mark.parametrize("damage", ["none", "missing", "flipped"])
def test_a_projection_is_saved_with_its_graph_and_checked(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    vectors = flat(600, 12, seed=1)

    def opened(graph_dims: int | None = None) -> EmbeddedKnowledgeBase:
        return EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True, flat_limit=100, graph_dims=graph_dims)

    knowledge_base = opened()
    documents = [(Document(id=f"d{n}", text="x"), "d") for n in range(600)]
    knowledge_base.replace_documents(
        documents, [Passage(id=f"d{n}#0", document_id=f"d{n}", text="x", start=0) for n in range(600)], vectors
    )
    knowledge_base.snapshot()
    knowledge_base.close()
    [file] = tmp_path.glob("index-*.npy")
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with caplog.at_level(logging.INFO):
        knowledge_base = opened()
    assert ("projection is missing or damaged" in caplog.text) == (damage != "none")
    assert knowledge_base.graph_width == DIM // 4
    for row in (0, 300, 599):
        [[hit]] = knowledge_base.search([""], vectors[row : row + 1], SearchOptions(top_k=1, mode="dense"))
        assert hit.passage.document_id == f"d{row}"
        assert hit.score == pytest.approx(1.0, abs=1e-5)
    knowledge_base.close()
    before = knowledge_base.generation
    knowledge_base = opened(graph_dims=DIM)  # another setting is another generation, derived from the same truth
    assert knowledge_base.graph_width == DIM
    assert knowledge_base.generation != before
    knowledge_base.close()
    knowledge_base = opened()
    assert knowledge_base.graph_width == DIM
    knowledge_base.close()


def test_a_graph_that_was_built_again_is_saved_so_that_the_next_start_need_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = flat(600, 12, seed=1)

    def opened() -> EmbeddedKnowledgeBase:
        return EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True, flat_limit=100)

    knowledge_base = opened()
    documents = [(Document(id=f"d{n}", text="x"), "d") for n in range(600)]
    passages = [Passage(id=f"d{n}#0", document_id=f"d{n}", text="x", start=0) for n in range(600)]
    knowledge_base.replace_documents(documents, passages, vectors)
    knowledge_base.snapshot()
    knowledge_base.delete_documents([f"d{n}" for n in range(400)])
    knowledge_base.close()  # without another snapshot, as a kill would
    rebuilt = "most of its rows are deleted"
    with caplog.at_level(logging.INFO):
        for expected in (True, False):
            caplog.clear()
            knowledge_base = opened()
            assert (rebuilt in caplog.text) == expected
            knowledge_base.snapshot()
            knowledge_base.close()
