"""What only a knowledge base in Elasticsearch promises: whole documents whatever stops a write, and the failures of a cluster.

What it promises like every other is in test_knowledge.py, test_filters.py and test_knowledge_service.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import elasticsearch
import numpy as np
import pytest
from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseRefused, KnowledgeBaseUnavailable
from openbook_server.knowledge import Document, Passage, SearchOptions
from openbook_server.knowledge.elastic import candidates, connection, documents, doubt, schema
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.inventory import describe
from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

DIM = 8
FIRST, SECOND = "f" * 64, "e" * 64  # embedders


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def write(knowledge_base: ElasticsearchKnowledgeBase, word: str, passages: int, *ids: str) -> None:
    """Store documents of so many passages that all hold `word`."""
    rows = [Passage(id=f"{id_}#{n}", document_id=id_, text=f"{word} p{n}", start=n) for id_ in ids for n in range(passages)]
    knowledge_base.replace_documents([(Document(id=id_, text=""), word) for id_ in ids], rows, unit(len(rows)))


def words(knowledge_base: ElasticsearchKnowledgeBase, id_: str) -> list[str]:
    """The first words of the document's passages, as every way of reading gives them; they must agree."""
    stored = [passage.text.split()[0] for passage in knowledge_base.documents([id_]).get(id_, [])]
    [dense] = knowledge_base.search([""], unit(1), SearchOptions(top_k=50, mode="dense"))
    [lexical] = knowledge_base.search(["old new"], None, SearchOptions(top_k=50, mode="lexical"))
    for hits in (dense, lexical):
        assert sorted(hit.passage.text.split()[0] for hit in hits if hit.passage.document_id == id_) == sorted(stored)
    return stored


@pytest.fixture
def target(elasticsearch_host: str, alias: str) -> str:
    return f"elasticsearch://{elasticsearch_host}/{alias}?shards=2&replicas=0"


@pytest.fixture
def client(elasticsearch_host: str) -> Iterator[elasticsearch.Elasticsearch]:
    with elasticsearch.Elasticsearch(f"http://{elasticsearch_host}") as client:
        yield client


@pytest.fixture
def knowledge_base(target: str) -> Iterator[ElasticsearchKnowledgeBase]:
    knowledge_base = opened(target)
    yield knowledge_base
    knowledge_base.close()


def opened(target: str, fingerprint: str = FIRST, **options: bool) -> ElasticsearchKnowledgeBase:
    return ElasticsearchKnowledgeBase(target, fingerprint=fingerprint, dim=DIM, **{"create": True, **options})


def entries(client: elasticsearch.Elasticsearch, alias: str, kind: str) -> int:
    """How many entries of a kind there really are, live or not."""
    client.indices.refresh(index=f"{alias}*")
    return int(client.count(index=alias, query={"term": {"kind": kind}})["count"])


class Stopped(BaseException):
    """The process died here."""


def stop_before(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the process die before the so-manieth bulk request from now on."""
    real, made = Connection.bulk, 0

    def bulk(self: Connection, *arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        if made > call:
            raise Stopped
        return real(self, *arguments, **options)

    monkeypatch.setattr(Connection, "bulk", bulk)


# Bulk requests of one replacement: numbers, intents, passages, commits, deletions of what was before, records without it.
@pytest.mark.parametrize("survived", range(6))
def test_a_replacement_that_dies_at_any_point_leaves_the_document_whole_and_leftovers_are_swept(
    knowledge_base: ElasticsearchKnowledgeBase,
    client: elasticsearch.Elasticsearch,
    target: str,
    alias: str,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    write(knowledge_base, "old", 3, "a", "b")
    with monkeypatch.context() as dying:
        stop_before(dying, survived)
        with pytest.raises(Stopped):
            write(knowledge_base, "new", 4, "a", "c")
    after = opened(target)
    committed = survived >= 4
    client.indices.refresh(index=alias)
    assert words(after, "a") == (["new"] * 4 if committed else ["old"] * 3)
    assert words(after, "c") == (["new"] * 4 if committed else [])
    assert words(after, "b") == ["old"] * 3
    assert after.digests(["a", "c"]) == ({"a": "new", "c": "new"} if committed else {"a": "old"})
    assert (after.counts().documents, after.counts().passages) == ((3, 11) if committed else (2, 6))
    monkeypatch.setattr(documents, "SWEEP_AFTER", -1.0)  # seconds: nobody else writes here, so what is not complete was stopped
    after.snapshot()
    assert words(after, "a") == (["new"] * 4 if committed else ["old"] * 3)
    assert entries(client, alias, "passage") == after.counts().passages
    assert entries(client, alias, "document") == after.counts().documents
    after.close()


@pytest.mark.parametrize("survived", range(5))  # the number, the mark, deletions, and the record's own, after nothing left to rewrite
def test_a_deletion_that_dies_at_any_point_has_happened_or_not(
    knowledge_base: ElasticsearchKnowledgeBase,
    client: elasticsearch.Elasticsearch,
    alias: str,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    write(knowledge_base, "old", 3, "a", "b")
    with monkeypatch.context() as dying:
        stop_before(dying, survived)
        with pytest.raises(Stopped):
            knowledge_base.delete_documents(["a"])
    client.indices.refresh(index=alias)
    assert words(knowledge_base, "a") == ([] if survived >= 2 else ["old"] * 3)
    assert knowledge_base.counts().documents == (1 if survived >= 2 else 2)
    write(knowledge_base, "new", 2, "a")
    assert words(knowledge_base, "a") == ["new"] * 2
    assert entries(client, alias, "passage") == 5


MODES = ("hybrid", "dense", "late_interaction", "lexical", "random")
QUESTION = unit(1, seed=99)


def write_near(knowledge_base: ElasticsearchKnowledgeBase, word: str, passages: int, *ids: str) -> None:
    """As `write`; every passage is nearer to `QUESTION` than any other one can be."""
    rows = [Passage(id=f"{id_}#{n}", document_id=id_, text=f"{word} p{n}", start=n) for id_ in ids for n in range(passages)]
    vectors = QUESTION + 0.001 * unit(len(rows), seed=6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    knowledge_base.replace_documents([(Document(id=id_, text=""), word) for id_ in ids], rows, vectors)


def stopped_before_the_commit(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str, passages: int, *ids: str
) -> None:
    """A write near `QUESTION` that died when all its passages were there."""
    with pytest.MonkeyPatch.context() as dying:
        stop_before(dying, 3)
        with pytest.raises(Stopped):
            write_near(knowledge_base, "new", passages, *ids)
    client.indices.refresh(index=alias)


def found(knowledge_base: ElasticsearchKnowledgeBase, mode: Any, top_k: int) -> list[str]:
    """The documents of a search's hits."""
    [hits] = knowledge_base.search(["new"], QUESTION, SearchOptions(top_k=top_k, mode=mode))
    return [hit.passage.document_id for hit in hits]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("documents", "passages"), [(1, 400), (400, 1)])
def test_what_a_stopped_write_left_near_a_question_keeps_no_hit_from_it(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str, mode: str, documents: int, passages: int
) -> None:
    others = [f"o{number}" for number in range(30)]
    write(knowledge_base, "new", 1, *others)
    stopped_before_the_commit(knowledge_base, client, alias, passages, *(f"s{number}" for number in range(documents)))
    for top_k in (1, 5):
        assert len(found(knowledge_base, mode, top_k)) == top_k
    assert sorted(found(knowledge_base, mode, 50)) == sorted(others)


def test_passages_that_no_record_lists_keep_no_hit_from_a_question(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "new", 1, "o")
    stopped_before_the_commit(knowledge_base, client, alias, 400, "s")
    key = schema.document_key("s")
    client.delete(index=alias, id=key, routing=key, refresh=True)
    for mode in MODES:
        assert found(knowledge_base, mode, 1) == ["o"]


def test_a_document_whose_replacement_was_stopped_is_found_as_it_was(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "new", 300, "a")
    stopped_before_the_commit(knowledge_base, client, alias, 300, "a")
    for mode in MODES:
        assert found(knowledge_base, mode, 20) == ["a"] * 20


def test_a_document_that_is_replaced_while_it_is_searched_for_is_found_old_or_new(
    knowledge_base: ElasticsearchKnowledgeBase, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(knowledge_base, "old", 1, "a")
    other = opened(target)
    other.snapshot()  # so that its write begins with no sweep
    intended, looked, written = threading.Event(), threading.Event(), threading.Event()
    real_bulk, made = Connection.bulk, 0

    def bulk(self: Connection, *arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        if made == 4:  # the passages are written, the commit is next
            self.refresh(other._generation.index)
            intended.set()
            assert looked.wait(60)
        return real_bulk(self, *arguments, **options)

    def look(*arguments: Any) -> Any:
        known = real_look(*arguments)
        looked.set()
        assert written.wait(60)
        return known

    real_look = candidates.look
    monkeypatch.setattr(Connection, "bulk", bulk)
    monkeypatch.setattr(candidates, "look", look)
    writing = threading.Thread(target=lambda: (write_near(other, "new", 40, "a"), written.set()))
    writing.start()
    assert intended.wait(60)
    assert found(knowledge_base, "dense", 1) == ["a"]
    writing.join()
    other.close()


def test_a_search_that_is_outrun_by_writes_says_so_instead_of_finding_less(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(knowledge_base, "new", 1, "o")
    stopped_before_the_commit(knowledge_base, client, alias, 1, "s")
    monkeypatch.setattr(candidates, "_ROUNDS", 1)
    with pytest.raises(KnowledgeBaseUnavailable, match="try again later"):
        found(knowledge_base, "dense", 1)
    monkeypatch.undo()
    write(knowledge_base, "new", 300, *(f"o{number}" for number in range(3)))
    stopped_before_the_commit(knowledge_base, client, alias, 1, *(f"o{number}" for number in range(3)))
    monkeypatch.setattr(doubt, "_SPANS", 2)
    assert len(found(knowledge_base, "dense", 50)) == 50
    monkeypatch.setattr(doubt, "_NUMBERS", 200)
    with pytest.raises(KnowledgeBaseUnavailable, match="too many passages"):
        found(knowledge_base, "dense", 50)


def test_entries_that_were_put_into_the_index_by_hand_are_no_documents_and_no_hits(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "new", 1, "a")
    key = schema.document_key("a")
    passage = {"kind": "passage", "text": "new by hand", "vector": QUESTION[0].tolist()}
    for id_, routing in (("foo", "foo"), ("foo.bar", "foo"), ("abc.5", "abc"), ("a", key), (f"{key}.900", "elsewhere"), (f"{key}.0", key)):
        client.index(index=alias, id=id_, routing=routing, document=passage)
    client.index(
        index=alias, id="ddd", routing="ddd", document={"kind": "document", "live": True, "unsettled": True, "number": 500, "passages": 1}
    )
    client.indices.refresh(index=alias)
    for mode in MODES:
        assert found(knowledge_base, mode, 5) == ["a"]
    assert [id_ for _, id_, _, _ in knowledge_base.page(0, 10)] == ["a"]
    assert knowledge_base.counts().documents == 1
    knowledge_base.snapshot()
    write(knowledge_base, "new", 1, "a")


def test_writers_of_one_document_leave_it_whole_and_nothing_else(
    target: str, knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    failures: list[BaseException] = []

    def work(word: str, passages: int) -> None:
        own = opened(target)
        try:
            for _ in range(4):
                write(own, word, passages, "a", word)
        except BaseException as error:
            failures.append(error)
        own.close()

    threads = [threading.Thread(target=work, args=arguments) for arguments in (("old", 2), ("new", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert words(knowledge_base, "a") in (["old"] * 2, ["new"] * 3)
    assert words(knowledge_base, "old") == ["old"] * 2
    assert entries(client, alias, "passage") == knowledge_base.counts().passages


def test_a_slow_writer_that_was_taken_for_dead_begins_again(
    target: str,
    knowledge_base: ElasticsearchKnowledgeBase,
    client: elasticsearch.Elasticsearch,
    alias: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = opened(target)
    knowledge_base.snapshot()  # so that its write begins with no sweep
    real, made = Connection.bulk, 0

    def bulk(self: Connection, *arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        if made == 4:  # the passages are written, the commit is next
            with monkeypatch.context() as patch:
                patch.setattr(Connection, "bulk", real)
                patch.setattr(documents, "SWEEP_AFTER", -1.0)
                client.indices.refresh(index=alias)
                other.snapshot()
                assert entries(client, alias, "passage") == 0
        return real(self, *arguments, **options)

    with monkeypatch.context() as slow:
        slow.setattr(Connection, "bulk", bulk)
        write(knowledge_base, "new", 3, "a")
    assert made > 4
    assert words(other, "a") == ["new"] * 3
    assert entries(client, alias, "passage") == 3
    other.close()


def test_a_write_to_an_index_that_is_gone_does_not_make_another(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "old", 1, "a")
    client.indices.delete(index=f"{alias}-{knowledge_base.generation}")
    with pytest.raises(KnowledgeBaseDamaged, match=r"gone.*restart"):
        write(knowledge_base, "new", 1, "a")
    with pytest.raises(KnowledgeBaseDamaged, match="gone"):
        knowledge_base.search(["old"], None, SearchOptions(top_k=1, mode="lexical"))
    assert client.indices.get(index=f"{alias}*").body == {}


def test_names_that_mean_something_else_are_refused(target: str, client: elasticsearch.Elasticsearch, alias: str) -> None:
    client.indices.create(index=alias)
    with pytest.raises(KnowledgeBaseDamaged, match="is an index"):
        opened(target)
    client.indices.delete(index=alias)
    client.indices.create(index=f"{alias}-foreign", aliases={alias: {}})
    with pytest.raises(KnowledgeBaseDamaged, match="is no knowledge base"):
        opened(target)
    client.indices.create(index=f"{alias}-other", aliases={alias: {}})
    with pytest.raises(KnowledgeBaseDamaged, match=r"means 2 indices \(.*-foreign, .*-other\)"):
        opened(target)


def test_a_newer_format_is_refused(target: str, knowledge_base: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "FORMAT", 0)
    with pytest.raises(KnowledgeBaseDamaged, match="update openbook"):
        opened(target)


def test_a_full_disk_refuses_writes_at_once_and_names_the_watermark(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "old", 1, "a")
    client.indices.put_settings(index=alias, settings={"index.blocks.read_only_allow_delete": True})  # what Elasticsearch does itself
    with pytest.raises(KnowledgeBaseRefused, match="watermark"):
        write(knowledge_base, "new", 1, "a")
    assert words(knowledge_base, "a") == ["old"]
    client.indices.put_settings(index=alias, settings={"index.blocks.read_only_allow_delete": None})
    write(knowledge_base, "new", 1, "a")


def test_a_knowledge_base_whose_shards_are_on_no_node_is_red_until_they_are(
    target: str, client: elasticsearch.Elasticsearch, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    real = schema.settings
    nowhere = "routing.allocation.require._name"
    with monkeypatch.context() as misplaced:
        misplaced.setattr(schema, "settings", lambda **options: real(**options) | {nowhere: "no-such-node"})
        with pytest.raises(KnowledgeBaseUnavailable, match=r"red: 2 of its shards.*allocation/explain"):
            opened(f"{target}&timeout=10")
    with pytest.raises(KnowledgeBaseUnavailable, match="nothing is answered from a part"):
        describe(target)
    client.indices.put_settings(index=alias, settings={f"index.{nowhere}": None})
    client.cluster.health(index=alias, wait_for_status="green", timeout="20s")
    knowledge_base = opened(target)
    write(knowledge_base, "old", 1, "a")
    assert words(knowledge_base, "a") == ["old"]
    knowledge_base.close()


def test_the_graph_holds_bytes_and_scores_are_those_of_the_float32_vectors(
    knowledge_base: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    write(knowledge_base, "old", 300, "a")
    [mapping] = client.indices.get_mapping(index=alias).body.values()
    assert mapping["mappings"]["properties"]["vector"]["index_options"]["type"] == "int8_hnsw"
    question, stored = unit(1, seed=1), unit(300)
    [hits] = knowledge_base.search([""], question, SearchOptions(top_k=20, mode="dense"))
    expected = np.sort(stored @ question[0])[::-1][:20]
    assert [hit.score for hit in hits] == pytest.approx(expected.tolist(), abs=1e-6)


def test_info_tells_what_there_is_without_a_bundle(target: str, knowledge_base: ElasticsearchKnowledgeBase) -> None:
    write(knowledge_base, "old", 2, "a")
    facts = describe(target)
    assert (facts["documents"], facts["passages"], facts["fingerprint"], facts["writes"]) == (1, 2, FIRST, 1)
    assert str(facts["health"]).startswith("green")
