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
from openbook_server.knowledge.elastic import connection, documents, schema
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
