"""The knowledge base: what it finds against an exact oracle, and what survives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from openbook_server.bundle import file_digest
from openbook_server.errors import FingerprintMismatch, KnowledgeBaseDamaged, KnowledgeBaseLocked
from openbook_server.knowledge import Document, KnowledgeBase, Passage, SearchOptions
from openbook_server.knowledge.database import Database
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.filters import Filter, OneOf
from openbook_server.knowledge.fusion import LEXICAL_WEIGHT
from openbook_server.knowledge.graph import inner_products
from openbook_server.knowledge.inventory import look
from openbook_server.knowledge.lexical import question_words
from openbook_server.knowledge.store import FILE, FORMAT, Store
from openbook_server.knowledge.vectors import VectorIndex

if TYPE_CHECKING:
    from conftest import Place

DIM = 16
T = TypeVar("T")


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def nothing(labels: Sequence[int]) -> dict[int, np.ndarray]:
    """The truth of an index that never asks for it: it has no graph."""
    raise AssertionError(labels)


def truth_of(vectors: np.ndarray) -> Callable[[Sequence[int]], dict[int, np.ndarray]]:
    """A store that holds these as the rows from 0."""
    return lambda labels: {label: vectors[label] for label in labels}


def opened(folder: Path, **options: object) -> KnowledgeBase:
    return EmbeddedKnowledgeBase(folder, fingerprint="f" * 64, dim=DIM, create=True, **options)  # type: ignore[arg-type]


def store(knowledge_base: KnowledgeBase, texts: dict[str, str], vectors: np.ndarray, digest: str = "d") -> None:
    documents = [(Document(id=id_, text=text, metadata={"k": "v"}), digest) for id_, text in texts.items()]
    passages = [Passage(id=f"{id_}#0", document_id=id_, text=text, start=0) for id_, text in texts.items()]
    knowledge_base.replace_documents(documents, passages, vectors)


def found(knowledge_base: KnowledgeBase, question: str, vector: np.ndarray | None, mode: str, top_k: int = 5) -> list[str]:
    vectors = None if vector is None else vector[None]
    [hits] = knowledge_base.search([question], vectors, SearchOptions(top_k=top_k, mode=mode))  # type: ignore[arg-type]
    return [hit.passage.document_id for hit in hits]


@pytest.mark.parametrize("flat_limit", [0, 100, 10_000])
def test_nearest_vectors_are_those_of_an_exact_scan(flat_limit: int) -> None:
    vectors, queries = unit(2_000), unit(50, seed=1)
    index = VectorIndex(DIM, truth_of(vectors), flat_limit=flat_limit)
    for at in range(0, 2_000, 250):
        index.add(list(range(at, at + 250)), vectors[at : at + 250])
        index.settle()
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    got = [list(row) for row in index.search(queries, 10, ef=200)]
    recall = np.mean([len(set(a) & set(b.tolist())) / 10 for a, b in zip(got, exact, strict=True)])
    assert recall >= (1.0 if flat_limit == 10_000 else 0.98)
    for query, row in zip(queries, index.search(queries, 10), strict=True):
        assert list(row.values()) == sorted(row.values(), reverse=True)
        for label, score in row.items():
            assert score == pytest.approx(float(query @ vectors[label]), abs=1e-5)


@pytest.mark.parametrize("allowed", [None, frozenset(range(0, 300, 2))])
@pytest.mark.parametrize("flat_limit", [1_000, 100])
def test_a_question_s_scores_have_the_same_bits_alone_and_among_others(flat_limit: int, allowed: frozenset[int] | None) -> None:
    rows, questions = unit(300), unit(7, seed=1)
    index = VectorIndex(DIM, truth_of(rows), flat_limit=flat_limit)
    index.add(range(300), rows)
    index.settle()
    together = index.search(questions, 9, allowed=allowed)
    assert [index.search(question[None], 9, allowed=allowed)[0] for question in questions] == together


@pytest.mark.parametrize("limit", [1, 3, 7, 40, 61])
@pytest.mark.parametrize("flat_limit", [1_000, 100])
def test_of_equal_vectors_the_first_stored_come_first_however_few_are_asked_for(flat_limit: int, limit: int) -> None:
    rows = np.tile(unit(3), (70, 1))
    index = VectorIndex(DIM, truth_of(rows), flat_limit=flat_limit)
    for at in range(0, 210, 35):
        index.add(range(at, at + 35), rows[at : at + 35])
        index.settle()
    assert bool(index.graph_rows) == (flat_limit == 100)
    for twin, question in enumerate(rows[:3]):
        for allowed in (None, frozenset(range(90))) if flat_limit == 1_000 else (frozenset(range(90)),):
            [row] = index.search(question[None], limit, allowed=allowed)
            assert list(row)[:30] == list(range(twin, 90, 3))[:limit]
            assert len(set(list(row.values())[:30])) == 1


@pytest.mark.parametrize("graph_dims", [DIM, 8])
def test_what_a_graph_proposes_is_scored_by_the_stored_vectors_to_the_bit(graph_dims: int) -> None:
    rows, [question] = np.tile(unit(50), (2, 1)), unit(1, seed=1)
    index = VectorIndex(DIM, truth_of(rows), flat_limit=20, graph_dims=graph_dims)
    index.add(range(100), rows)
    index.settle()
    assert (index.graph_rows, index.graph_width) == (100, graph_dims)
    exact = dict(enumerate(inner_products(rows, question)))
    expected = sorted(exact.items(), key=lambda item: (-item[1], item[0]))[:10]  # of an even number of twins none is cut off
    assert list(index.search(question[None], 10)[0].items()) == expected
    assert index.compare(question, range(100)) == exact


@pytest.mark.parametrize("flat_limit", [0, 10_000])
def test_deleted_rows_are_never_found_and_asking_for_more_than_there_is_gives_what_there_is(flat_limit: int) -> None:
    vectors = unit(300)
    index = VectorIndex(DIM, truth_of(vectors), flat_limit=flat_limit)
    index.add(list(range(300)), vectors)
    index.settle()
    index.delete(list(range(0, 300, 2)))
    [row] = index.search(vectors[:1], 1_000)
    assert set(row) == set(range(1, 300, 2))
    index.delete(list(range(300)))
    assert index.search(vectors[:1], 5) == [{}]


def test_a_row_that_the_index_has_stays_as_it_is() -> None:
    vectors = unit(30)
    index = VectorIndex(DIM, truth_of(vectors), flat_limit=20)
    for held in (25, 30):  # the first in the graph, then some more in the buffer
        for _ in range(2):
            index.add(range(held), vectors[:held])
            index.settle()
        assert (len(index), index.graph_rows, next(iter(index.search(vectors[:1], 40)[0]))) == (held, 25, 0)


def test_passages_that_are_the_same_to_the_bit_hide_no_others() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 48))

    def drawn(count: int) -> np.ndarray:
        vectors = centres[rng.integers(0, 100, count)] + 0.1 * rng.normal(size=(count, 48))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    vectors = np.concatenate([drawn(3_000), np.repeat(drawn(3), 300, axis=0)])
    vectors = vectors[rng.permutation(len(vectors))]
    index = VectorIndex(48, truth_of(vectors), flat_limit=100)
    for at in range(0, len(vectors), 500):
        index.add(list(range(at, min(at + 500, len(vectors)))), vectors[at : at + 500])
        index.settle()
    queries = drawn(200)
    tenth = np.sort(queries @ vectors.T, axis=1)[:, -10]
    found = index.search(queries, 10)
    shares = [sum(score >= least - 1e-4 for score in row.values()) / 10 for row, least in zip(found, tenth, strict=True)]
    assert float(np.mean(shares)) > 0.97
    assert min(shares) > 0.5


@pytest.mark.parametrize("bad", [np.full((1, DIM), np.nan, np.float32), np.zeros((1, DIM), np.float32), np.ones((1, DIM + 1), np.float32)])
def test_a_vector_that_is_none_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"vectors"):
        VectorIndex(DIM, nothing).add([1], bad)


def test_every_mode_finds_what_was_stored_at_once_and_after_a_restart(place: Place) -> None:
    vectors = unit(3)
    texts = {"a": "running dogs", "b": "a quiet cat", "c": "the river bank"}
    knowledge_base = place.open()
    store(knowledge_base, texts, vectors)
    for _ in range(2):
        assert found(knowledge_base, "dog runs", None, "lexical") == ["a"]
        assert found(knowledge_base, "anything", vectors[1], "dense")[0] == "b"
        assert found(knowledge_base, "cat", vectors[2], "hybrid", top_k=2)[0] in {"b", "c"}
        knowledge_base.close()
        knowledge_base = place.open()
    knowledge_base.close()


def test_a_question_draws_the_same_passages_always_and_each_passage_as_often_as_any_other(place: Place) -> None:
    knowledge_base, questions = place.open(flat_limit=10), [f"question {n}" for n in range(400)]
    store(knowledge_base, {f"d{n}": "words" for n in range(20)}, unit(20))

    def drawn(questions: list[str], top_k: int) -> list[list[str]]:
        rows = knowledge_base.search(questions, None, SearchOptions(top_k=top_k, mode="random"))
        assert all(hit.dense_score is hit.lexical_score is None for hits in rows for hit in hits)
        return [[hit.passage.document_id for hit in hits] for hits in rows]

    before = drawn(questions, 5)
    assert drawn(questions[::-1], 5)[::-1] == before
    assert [row[:5] for row in drawn(questions, 12)] == before
    assert sorted(drawn(["one"], 50)[0]) == sorted(f"d{n}" for n in range(20))
    counts = [sum(f"d{n}" in row for row in before) for n in range(20)]
    assert sum(counts) == 2_000  # no passage twice
    assert min(counts) > 65  # of 100 expected; the standard deviation is 8.7
    assert max(counts) < 135
    knowledge_base.delete_documents(["d3", "d4"])
    store(knowledge_base, {"new": "words"}, unit(1, seed=1))
    kept = [[id_ for id_ in row if id_ not in ("d3", "d4")] for row in before]
    assert [[id_ for id_ in row if id_ != "new"][: len(left)] for row, left in zip(drawn(questions, 6), kept, strict=True)] == kept
    knowledge_base.close()


def test_hybrid_scores_are_cosine_weighted_bm25_and_overlap_over_both_candidate_lists(place: Place) -> None:
    vectors = unit(400)
    knowledge_base = place.open(flat_limit=50)
    store(knowledge_base, {f"d{n}": f"common word{n % 40}" for n in range(400)}, vectors)
    [hits] = knowledge_base.search(["word7"], vectors[3:4], SearchOptions(top_k=400))
    [words] = knowledge_base.search(["word7"], None, SearchOptions(top_k=400, mode="lexical"))
    assert {hit.passage.id for hit in words} <= {hit.passage.id for hit in hits}
    lexical = {hit.passage.id: hit.lexical_score or 0.0 for hit in words}
    for hit in hits:
        cosine = float(vectors[3] @ vectors[int(hit.passage.document_id[1:])])
        assert hit.dense_score == pytest.approx(cosine, abs=1e-5)
        assert (hit.overlap_score or 0.0) > 0 if hit.passage.id in lexical else hit.overlap_score == 0
        total = cosine + LEXICAL_WEIGHT * lexical.get(hit.passage.id, 0.0) + (hit.overlap_score or 0.0)
        assert hit.score == pytest.approx(total, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    knowledge_base.close()


def test_a_document_stored_again_replaces_itself_and_an_unchanged_one_is_recognised(place: Place) -> None:
    vectors = unit(3)
    knowledge_base = place.open()
    store(knowledge_base, {"a": "old words", "b": "other"}, vectors[:2], digest="1")
    assert knowledge_base.digests(["a", "b", "c"]) == {"a": "1", "b": "1"}
    store(knowledge_base, {"a": "new words"}, vectors[2:], digest="2")
    assert found(knowledge_base, "old", None, "lexical") == []
    assert found(knowledge_base, "new", None, "lexical") == ["a"]
    assert (knowledge_base.counts().documents, knowledge_base.counts().passages) == (2, 2)
    assert knowledge_base.delete_documents(["a", "unknown"]) == 1
    assert found(knowledge_base, "new", vectors[2], "hybrid") == ["b"]
    knowledge_base.close()


@pytest.mark.parametrize("question", ['"', "' OR 1=1", "a AND NOT b*", "NEAR(x)", "title:x", "(((", "ß…—", "\0", "ünï", "-", "the of and"])
def test_no_question_is_a_query_of_its_own(place: Place, question: str) -> None:
    knowledge_base = place.open()
    store(knowledge_base, {"a": "the of and x title near"}, unit(1))
    found(knowledge_base, question, None, "lexical")
    knowledge_base.close()


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_words_of_every_script_are_found_in_every_place(place: Place, mode: str) -> None:
    knowledge_base = place.open()
    texts = {
        "greek": "ο κόσμος είναι μεγάλος",
        "hindi": "हिन्दी भारत की भाषा है",
        "arabic": "هَذَا كِتَابٌ",
        "turkish": "İstanbul'da bir köprü",
        "composed": "her CV: résumé",
        "decomposed": unicodedata.normalize("NFD", "a škoda"),
        "whole": "Hamlet's uncle at 3.5 million",
    }
    vectors = unit(len(texts) + 1)
    store(knowledge_base, texts, vectors[:-1])
    questions = {"greek": "κόσμος", "hindi": "हिन्दी", "arabic": "كِتَابٌ", "turkish": "İstanbul'da"}
    questions |= {"composed": unicodedata.normalize("NFD", "résumé"), "decomposed": "škoda", "whole": "Hamlet's?"}
    for id_, question in questions.items():
        [hits] = knowledge_base.search([question], vectors[-1:], SearchOptions(top_k=9, mode=mode))  # type: ignore[arg-type]
        assert [hit.passage.document_id for hit in hits if hit.lexical_score is not None] == [id_]
    knowledge_base.close()


def test_stop_words_count_only_where_there_is_nothing_else() -> None:
    assert question_words("who is the king") == ["king"]
    assert question_words("who is the") == ["who", "is", "the"]
    assert question_words("?!") == []


def saved(folder: Path) -> np.ndarray:
    """A closed knowledge base of 300 rows with a snapshot of its graph, and 10 rows past it."""
    vectors = unit(310)
    knowledge_base = opened(folder, flat_limit=50)
    store(knowledge_base, {f"d{n}": f"w{n}" for n in range(300)}, vectors[:300])
    knowledge_base.snapshot()
    store(knowledge_base, {f"d{n}": f"w{n}" for n in range(300, 310)}, vectors[300:])
    knowledge_base.delete_documents(["d5"])
    knowledge_base.close()
    return vectors


DAMAGES = ["none", "truncated", "flipped", "written in part", "missing graph", "missing note", "torn note", "other generation"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_happens_to_a_snapshot_the_next_start_holds_what_the_store_holds(tmp_path: Path, damage: str) -> None:
    vectors = saved(tmp_path / "kb")
    [graph] = (tmp_path / "kb").glob("*.hnsw")
    note = graph.with_suffix(".json")
    if damage == "truncated":
        graph.write_bytes(graph.read_bytes()[:-100])
    elif damage == "flipped":
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(data)
    elif damage == "written in part":  # and its digest taken after that
        graph.write_bytes(graph.read_bytes()[: graph.stat().st_size * 3 // 5])
        digest = {"bytes": graph.stat().st_size, "sha256": file_digest(graph)}
        note.write_text(json.dumps(json.loads(note.read_text()) | digest))
    elif damage == "missing graph":
        graph.unlink()
    elif damage == "missing note":
        note.unlink()
    elif damage == "torn note":
        note.write_text(note.read_text()[:20])
    elif damage == "other generation":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"generation": "x"}))
    knowledge_base = opened(tmp_path / "kb", flat_limit=50)
    for row in (0, 5, 150, 299, 305):
        top = found(knowledge_base, "", vectors[row], "dense")
        assert (top[0] == f"d{row}") == (row != 5)
        assert "d5" not in top
    assert len(found(knowledge_base, "", vectors[0], "dense", top_k=500)) == 309
    knowledge_base.close()


@pytest.mark.parametrize("new", [{}, {"n": "after all were deleted"}])
def test_a_knowledge_base_whose_graph_lost_every_row_opens_again(tmp_path: Path, new: dict[str, str]) -> None:
    vectors, ids = unit(51), [f"d{n}" for n in range(50)]
    knowledge_base = opened(tmp_path, flat_limit=20)
    store(knowledge_base, dict.fromkeys(ids, "words"), vectors[:50])
    knowledge_base.snapshot()
    knowledge_base.delete_documents(ids)
    store(knowledge_base, new, vectors[50 : 50 + len(new)])
    knowledge_base.close()
    for _ in range(2):
        knowledge_base = opened(tmp_path, flat_limit=20)
        assert (found(knowledge_base, "words", vectors[50], "dense"), knowledge_base.graph_rows) == (list(new), 0)
        knowledge_base.snapshot()
        knowledge_base.close()


@pytest.mark.parametrize("condition", [None, OneOf("k", ("v",))])
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_search_finds_a_document_that_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, condition: Filter | None
) -> None:
    vectors, looked = unit(3), threading.Event()
    knowledge_base = EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True)
    store(knowledge_base, {"a": "zebra", "b": "zebra as well"}, vectors[:2])
    forget = knowledge_base._home.forget

    def search() -> list[str]:
        options = SearchOptions(top_k=5, mode=mode, condition=condition)  # type: ignore[arg-type]
        return sorted(hit.passage.text for hit in knowledge_base.search(["zebra"], vectors[:1], options)[0])

    def seen(find: Callable[..., T]) -> Callable[..., T]:
        def finding(*arguments: object, **options: object) -> T:
            found = find(*arguments, **options)
            looked.set()
            return found

        return finding

    def committed(removed: Sequence[int]) -> None:  # and the indexes have not heard of it; the search has looked at one of them
        searches.append(pool.submit(search))
        assert looked.wait(60)
        forget(removed)

    for index in (knowledge_base._index, knowledge_base._words):
        monkeypatch.setattr(index, "search", seen(index.search))
    monkeypatch.setattr(knowledge_base._home, "forget", committed)
    searches: list[Future[list[str]]] = []
    with ThreadPoolExecutor(1) as pool:
        store(knowledge_base, {"a": "zebra again"}, vectors[2:])
    assert searches[0].result() == ["zebra again", "zebra as well"]
    knowledge_base.close()


def test_only_what_is_replaced_meanwhile_makes_a_search_look_again(tmp_path: Path) -> None:
    knowledge_base = EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True)
    looks: list[str] = []

    def look(then: dict[str, str]) -> int:
        looks.append("")
        if len(looks) == 1:
            store(knowledge_base, then, unit(1))
        return len(looks)

    for then, expected in (({"a": "new"}, 1), ({"b": "new too"}, 1), ({"a": "again"}, 2)):
        looks.clear()
        assert knowledge_base._home.whole(lambda then=then: look(then)) == expected  # type: ignore[misc]
    knowledge_base.close()


def test_deletions_alone_make_a_graph_of_mostly_deleted_rows_be_built_again(tmp_path: Path) -> None:
    knowledge_base = EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True, flat_limit=20)
    vectors, ids = unit(50), [f"d{n}" for n in range(50)]
    store(knowledge_base, dict.fromkeys(ids, "words"), vectors)
    for gone, kept in ((25, 50), (26, 24), (45, 5), (50, 0)):  # documents deleted, rows that take up room in the graph
        knowledge_base.delete_documents(ids[:gone])
        graph = knowledge_base._index._graph
        assert (len(graph.live) + graph.deleted if graph else 0) == kept
        assert found(knowledge_base, "words", vectors[49], "dense", top_k=50)[:1] == ids[49:] * (gone < 50)
    knowledge_base.close()


class FullDisk:
    """hnswlib's index, of which the disk takes a part that is larger than all vectors."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def save_index(self, file: str) -> None:
        self._index.save_index(file)
        os.truncate(file, self._index.index_file_size() - 1)


def test_a_snapshot_of_which_the_disk_took_a_part_is_refused_and_the_one_before_stays(tmp_path: Path) -> None:
    saved(tmp_path / "kb")
    [before] = (tmp_path / "kb").glob("*.hnsw")
    knowledge_base = EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="f" * 64, dim=DIM, flat_limit=50)
    store(knowledge_base, {"new": "new"}, unit(1, seed=1))
    graph = knowledge_base._index._graph
    assert graph is not None
    graph._index = FullDisk(graph._index)
    with pytest.raises(KnowledgeBaseDamaged, match=r"index-.*\.hnsw could not be saved: .*only in part.*nothing that is stored is lost"):
        knowledge_base.snapshot()
    assert list((tmp_path / "kb").glob("*.hnsw")) == [before]
    knowledge_base.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "lock"}


def emptied(file: Path) -> None:
    file.write_bytes(b"")
    file.with_name(FILE + "-wal").write_bytes(b"what may be recovered")


def of_another_program(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE meta (mine)")
    connection.close()


def with_nothing_published(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM generations")
    connection.close()


@pytest.mark.parametrize("damage", [emptied, of_another_program, with_nothing_published])
def test_a_file_that_holds_no_generation_is_refused_and_nothing_beside_it_removed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "kb"
    saved(folder)
    damage(folder / FILE)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}
    for create in (False,) if damage is emptied else (False, True):
        with pytest.raises(KnowledgeBaseDamaged, match=r"holds no generation.*restore a backup"):
            EmbeddedKnowledgeBase(folder, fingerprint="f" * 64, dim=DIM, create=create)
    assert {name: (folder / name).read_bytes() for name in before} == before
    if damage is not with_nothing_published:
        with pytest.raises(KnowledgeBaseDamaged, match="holds no generation"), look(folder):
            pass


def test_a_knowledge_base_whose_making_was_cut_off_is_made_by_asking_again(tmp_path: Path) -> None:
    (tmp_path / "kb").mkdir()
    Database(tmp_path / "kb" / FILE).close()
    with pytest.raises(KnowledgeBaseDamaged, match="it is empty"):
        EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="f" * 64, dim=DIM)
    opened(tmp_path / "kb").close()
    EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="f" * 64, dim=DIM).close()


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replaced_by_a_backup(folder: Path) -> None:
    shutil.copy(folder / FILE, folder / "backup")
    (folder / "backup").rename(folder / FILE)


@pytest.mark.parametrize("happens", [removed, moved, replaced_by_a_backup])
def test_no_write_is_acknowledged_that_the_next_start_would_not_find(tmp_path: Path, happens: Callable[[Path], None]) -> None:
    folder = tmp_path / "kb"
    knowledge_base = opened(folder)
    store(knowledge_base, {"a": "first"}, unit(1))
    happens(folder)
    with pytest.raises(KnowledgeBaseDamaged, match=rf"{FILE} was moved, deleted or replaced while it is open.*put it back or restart"):
        store(knowledge_base, {"b": "second"}, unit(1))
    assert found(knowledge_base, "second", None, "lexical") == []
    assert found(knowledge_base, "first", None, "lexical") == ["a"]
    assert knowledge_base.size_bytes() > 0
    if happens is moved:
        folder.with_name("moved").rename(folder)
        store(knowledge_base, {"b": "second"}, unit(1))
        knowledge_base.close()
        knowledge_base = opened(folder)
        assert found(knowledge_base, "second", None, "lexical") == ["b"]
    knowledge_base.close()


def test_a_byte_that_the_disk_changed_costs_a_character_and_no_request_nor_start(tmp_path: Path) -> None:
    knowledge_base = opened(tmp_path / "kb")
    store(knowledge_base, {"a": "red king", "b": "red queen"}, unit(2))
    knowledge_base.close()
    with sqlite3.connect(tmp_path / "kb" / FILE) as connection:
        connection.execute("UPDATE passages SET text = CAST(x'726564ff206b696e67' AS TEXT) WHERE id = 'a#0'")
    connection.close()
    knowledge_base = opened(tmp_path / "kb")
    assert sorted(found(knowledge_base, "king queen", None, "lexical")) == ["a", "b"]
    [hits] = knowledge_base.search(["king"], unit(2)[:1], SearchOptions(top_k=2))
    assert sorted(hit.passage.text for hit in hits) == ["red queen", "red\ufffd king"]
    knowledge_base.close()


def test_damaged_metadata_cost_their_own_document_no_request_no_filter_and_no_deletion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    knowledge_base = opened(tmp_path / "kb")
    store(knowledge_base, {"a": "red king", "b": "red queen"}, unit(2))
    knowledge_base.close()
    with sqlite3.connect(tmp_path / "kb" / FILE) as connection:
        connection.execute("UPDATE documents SET metadata = '[' || substr(metadata, 2) WHERE id = 'a'")
    connection.close()
    knowledge_base = opened(tmp_path / "kb")
    [hits] = knowledge_base.search(["king queen"], unit(2)[:1], SearchOptions(top_k=2))
    assert {hit.passage.document_id: hit.passage.metadata for hit in hits} == {"a": {}, "b": {"k": "v"}}
    assert "metadata of document 'a'" in caplog.text
    [hits] = knowledge_base.search(["king queen"], unit(2)[:1], SearchOptions(top_k=2, condition=OneOf("k", ("v",))))
    assert [hit.passage.document_id for hit in hits] == ["b"]
    assert knowledge_base.delete_documents(["a"]) == 1
    knowledge_base.close()


@pytest.mark.parametrize(
    "damage", ["zeroblob(length(vector))", "x'00'", "CAST(substr(vector, 1, 3) || x'7f' || substr(vector, 5) AS BLOB)"]
)
def test_a_damaged_vector_is_refused_with_its_passage_and_the_way_out(tmp_path: Path, damage: str) -> None:
    knowledge_base = opened(tmp_path / "kb")
    store(knowledge_base, {"a": "red king", "b": "red queen"}, unit(2))
    knowledge_base.close()
    with sqlite3.connect(tmp_path / "kb" / FILE) as connection:
        [table] = connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'vectors_*' AND type = 'table'").fetchone()
        connection.execute(f"UPDATE {table} SET vector = {damage} WHERE passage = (SELECT number FROM passages WHERE id = 'b#0')")  # noqa: S608
    connection.close()
    with pytest.raises(KnowledgeBaseDamaged, match=r"the vector of passage 'b#0' is damaged; restore a backup, or index"):
        opened(tmp_path / "kb")


def plain_file(folder: Path) -> None:
    folder.write_text("x")


def link_to_nothing(folder: Path) -> None:
    folder.symlink_to(folder.with_name("gone"))


@pytest.mark.parametrize("made", [plain_file, link_to_nothing])
def test_what_is_no_folder_is_called_so(tmp_path: Path, made: Callable[[Path], None]) -> None:
    made(tmp_path / "kb")
    for create in (False, True):
        with pytest.raises(KnowledgeBaseDamaged, match=r"kb is no folder.*name"):
            EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="f" * 64, dim=DIM, create=create)
    with pytest.raises(KnowledgeBaseDamaged, match="is no folder"), look(tmp_path / "kb"):
        pass
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("write", ["truncate", "write", "flush"])
def test_a_disk_that_does_not_take_the_lock_s_owner_is_told_and_leaves_nothing_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    real = Path.open

    class Full:
        """A file on a full disk."""

        def __init__(self, file: IO[str]) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return self._fail if name == write else getattr(self._file, name)

        def _fail(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: Full(real(path, *mode)))
        with pytest.raises(KnowledgeBaseDamaged, match=r"kb cannot be written: No space left on device.*the disk has room"):
            opened(tmp_path / "kb")
    opened(tmp_path / "kb").close()


def test_a_second_process_is_refused_by_the_first_ones_pid(tmp_path: Path) -> None:
    knowledge_base = opened(tmp_path / "kb")
    with pytest.raises(KnowledgeBaseLocked, match=r"pid \d+"):
        opened(tmp_path / "kb")
    knowledge_base.close()
    opened(tmp_path / "kb").close()


def test_another_embedder_is_refused_with_both_names_and_the_way_out(place: Place) -> None:
    place.open().close()
    with pytest.raises(FingerprintMismatch, match=r"ffffffffffff.*eeeeeeeeeeee.*openbook index"):
        place.open(fingerprint="e" * 64)
    place.open().close()  # and the refusal left nothing locked


def test_a_generation_that_is_refused_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path / "kb").close()
    really_open, really_close, left = Store.__init__, Store.close, set[int]()

    def open_(self: Store, *arguments: Any, **options: Any) -> None:
        really_open(self, *arguments, **options)
        left.add(id(self))

    def close(self: Store) -> None:
        really_close(self)
        left.remove(id(self))

    monkeypatch.setattr(Store, "__init__", open_)
    monkeypatch.setattr(Store, "close", close)
    with pytest.raises(FingerprintMismatch):
        EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="e" * 64, dim=DIM)
    assert not left


def test_a_knowledge_base_that_is_not_there_is_not_made_by_asking_for_it(place: Place) -> None:
    for _ in range(2):
        with pytest.raises(KnowledgeBaseDamaged, match="openbook index"):
            place.open(create=False)


def test_a_page_goes_on_after_the_one_before_and_facts_are_kept(place: Place) -> None:
    knowledge_base = place.open()
    assert (knowledge_base.facts("overlap"), knowledge_base.page(0, 5), knowledge_base.sequence) == ({}, [], 0)
    store(knowledge_base, {f"d{n}": f"w{n}" for n in range(5)}, unit(5))
    knowledge_base.record({"overlap": "3"})
    knowledge_base.close()
    knowledge_base = place.open()
    assert knowledge_base.facts("overlap", "fingerprint", "absent") == {"overlap": "3", "fingerprint": "f" * 64}
    first = knowledge_base.page(0, 2)
    assert [(id_, passages) for _, id_, _, passages in first] == [("d0", 1), ("d1", 1)]
    assert [id_ for _, id_, _, _ in knowledge_base.page(first[-1][0], 5)] == ["d2", "d3", "d4"]
    before = knowledge_base.sequence
    store(knowledge_base, {"d0": "again"}, unit(1))
    assert knowledge_base.sequence > before > 0
    assert [id_ for _, id_, _, _ in knowledge_base.page(0, 9)] == ["d1", "d2", "d3", "d4", "d0"]
    assert knowledge_base.size_bytes() > 0
    knowledge_base.close()


def test_a_document_s_passages_come_back_in_order_with_all_they_had(place: Place) -> None:
    knowledge_base = place.open()
    document = Document(id="ü/1 \n", text="", title="T", source="s", metadata={"a.b$": "x", "": "y" * 40_000})
    passages = [
        Passage(
            id=f"{document.id}#{n}",
            document_id=document.id,
            text=f"p{n} " * 20,
            start=7 * n,
            title="T",
            source="s",
            metadata=document.metadata,
        )
        for n in range(12)
    ]
    knowledge_base.replace_documents([(document, "d"), (Document(id="empty", text=""), "e")], passages, unit(12))
    assert knowledge_base.documents([document.id, "empty", "absent"]) == {document.id: passages}
    assert knowledge_base.digests([document.id, "empty", "absent"]) == {document.id: "d", "empty": "e"}
    assert (knowledge_base.counts().documents, knowledge_base.counts().passages) == (2, 12)
    [hits] = knowledge_base.search(["p7"], unit(12)[:1], SearchOptions(top_k=3))
    assert [hit.passage for hit in hits if hit.passage.start == 49] == [passages[7]]
    assert knowledge_base.delete_documents([document.id, "empty"]) == 12
    assert (knowledge_base.counts().documents, knowledge_base.counts().passages) == (0, 0)
    knowledge_base.close()


@pytest.mark.parametrize("bad", [np.full((1, DIM), np.nan, np.float32), np.zeros((1, DIM), np.float32), np.ones((1, DIM + 1), np.float32)])
def test_a_write_with_a_vector_that_is_none_stores_nothing(place: Place, bad: np.ndarray) -> None:
    knowledge_base = place.open()
    with pytest.raises(ValueError, match="vectors"):
        store(knowledge_base, {"a": "x"}, bad)
    assert (knowledge_base.counts().documents, knowledge_base.sequence) == (0, 0)
    knowledge_base.close()


def test_diverse_hits_are_chosen_from_the_stored_vectors(place: Place) -> None:
    vectors = np.repeat(unit(4), 5, axis=0)  # four groups of five equal passages
    knowledge_base = place.open()
    store(knowledge_base, {f"d{n}": f"w{n}" for n in range(20)}, vectors)
    [hits] = knowledge_base.search([""], vectors[:1], SearchOptions(top_k=4, mode="dense", diversity=0.9))
    assert {int(hit.passage.document_id[1:]) // 5 for hit in hits} == {0, 1, 2, 3}
    knowledge_base.close()


def test_a_newer_and_a_damaged_store_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseDamaged):
        EmbeddedKnowledgeBase(tmp_path / "none", fingerprint="f", dim=DIM)
    assert not (tmp_path / "none").exists()
    saved(tmp_path / "kb")
    with sqlite3.connect(tmp_path / "kb" / FILE) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(FORMAT + 1),))
    connection.close()
    with pytest.raises(KnowledgeBaseDamaged, match="update openbook"):
        opened(tmp_path / "kb")
    (tmp_path / "kb" / FILE).write_bytes(b"not a database" * 1_000)
    with pytest.raises(KnowledgeBaseDamaged, match=r"recover"):
        opened(tmp_path / "kb")
