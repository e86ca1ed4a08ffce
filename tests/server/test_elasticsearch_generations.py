"""What only generations in Elasticsearch promise: any process may die, write or publish at any moment, and nothing acknowledged is lost.

What they promise like every other's is in test_building.py and test_succession.py.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import elasticsearch
import numpy as np
import pytest
from openbook_server.errors import (
    FingerprintMismatch,
    GenerationNotReady,
    GenerationReplaced,
    InvalidRequest,
    KnowledgeBaseDamaged,
    KnowledgeBaseRefused,
    KnowledgeBaseUnavailable,
)
from openbook_server.knowledge import Document, Passage, PassageVectors, SearchOptions, pack
from openbook_server.knowledge.building import build_generation, publish_generation
from openbook_server.knowledge.elastic import connection, difference, publication, schema
from openbook_server.knowledge.elastic import knowledge_base as knowledge_base_module
from openbook_server.knowledge.elastic.address import parse_address
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.difference import differences
from openbook_server.knowledge.elastic.generations import Generation
from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase
from openbook_server.knowledge.records import BundlePlace

DIM = 8
FIRST, SECOND = "f" * 64, "e" * 64  # embedders
PLACES = {FIRST: BundlePlace("first", "/bundles/first"), SECOND: BundlePlace("second", "/bundles/second")}
SEED = {FIRST: 1, SECOND: 2}


def vectors(fingerprint: str, passages: Sequence[Passage]) -> PassageVectors:
    """What an embedder makes of passages: the same of the same text; of each, one window."""
    rows = [np.random.default_rng([*passage.text.encode(), SEED[fingerprint]]).normal(size=DIM) for passage in passages]
    found = np.array(rows, np.float32).reshape(len(rows), DIM)
    return PassageVectors(found / np.linalg.norm(found, axis=1, keepdims=True), [pack(row[None]) for row in found])


def embed(fingerprint: str) -> Callable[[Sequence[Passage]], PassageVectors]:
    return lambda passages: vectors(fingerprint, passages)


def write(knowledge_base: ElasticsearchKnowledgeBase, fingerprint: str, word: str, *ids: str) -> None:
    """Store documents of two passages that hold `word`."""
    rows = [Passage(id=f"{id_}#{n}", document_id=id_, text=f"{word} {n} of {id_}", start=n) for id_ in ids for n in range(2)]
    knowledge_base.replace_documents([(Document(id=id_, text=""), word) for id_ in ids], rows, *vectors(fingerprint, rows))


def stored(knowledge_base: ElasticsearchKnowledgeBase, fingerprint: str) -> dict[str, str]:
    """The word of each document; every one is whole, is found with the score of its embedder, and nothing else is found."""
    digests = knowledge_base.digests([id_ for _, id_, _, _ in knowledge_base.page(0, 10_000)])
    expected = {f"{digest} {n} of {id_}" for id_, digest in digests.items() for n in range(2)}
    question = vectors(fingerprint, [Passage(id="", document_id="", text="?", start=0)]).whole
    [dense] = knowledge_base.search([""], question, SearchOptions(top_k=2_000, mode="dense", ef=4_000))
    [lexical] = knowledge_base.search(["of"], None, SearchOptions(top_k=2_000, mode="lexical"))
    for hits in (dense, lexical):
        assert {hit.passage.text for hit in hits} == expected
        assert len(hits) == len(expected) == knowledge_base.counts().passages
    for hit in dense:
        assert hit.score == pytest.approx(float(question[0] @ vectors(fingerprint, [hit.passage]).whole[0]), abs=1e-5)
    return digests


@pytest.fixture
def target(elasticsearch_host: str, alias: str) -> str:
    return f"elasticsearch://{elasticsearch_host}/{alias}?shards=2&replicas=0"


@pytest.fixture
def client(elasticsearch_host: str) -> Iterator[elasticsearch.Elasticsearch]:
    with elasticsearch.Elasticsearch(f"http://{elasticsearch_host}") as client:
        yield client


def opened(target: str, fingerprint: str = FIRST, **options: Any) -> ElasticsearchKnowledgeBase:
    return ElasticsearchKnowledgeBase(target, fingerprint=fingerprint, dim=DIM, bundle=PLACES[fingerprint], **{"create": True, **options})


def opened_live(target: str) -> tuple[ElasticsearchKnowledgeBase, str]:
    """Whichever generation is live, and its embedder."""
    while True:
        for fingerprint in (FIRST, SECOND):
            with suppress(FingerprintMismatch):
                return opened(target, fingerprint), fingerprint


def beside(knowledge_base: ElasticsearchKnowledgeBase, fingerprint: str, name: str | None = None) -> ElasticsearchKnowledgeBase:
    return knowledge_base.open_beside(fingerprint=fingerprint, dim=DIM, bundle=PLACES[fingerprint], name=name)


@pytest.fixture
def live(target: str) -> Iterator[ElasticsearchKnowledgeBase]:
    knowledge_base = opened(target)
    write(knowledge_base, FIRST, "old", *(f"d{number}" for number in range(12)))
    yield knowledge_base
    knowledge_base.close()


OLD = {f"d{number}": "old" for number in range(12)}


class Stopped(BaseException):
    """The process died here."""


def stop_before(monkeypatch: pytest.MonkeyPatch, request: int) -> None:
    """Let the process die before the so-manieth request from now on, a refusal's tidying up included."""
    left = itertools.count()

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            if next(left) >= request:
                raise Stopped
            return real(*arguments, **options)

        return made

    for name in ("call", "bulk"):
        monkeypatch.setattr(Connection, name, dying(getattr(Connection, name)))


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_at_any_request_of_building_and_publishing_leaves_one_generation_live_and_the_next_goes_on(
    target: str, live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(publication, "HOLD_SECONDS", -1.0)  # whoever holds is dead: in this test one process runs at a time
    following = beside(live, SECOND)
    expected, published = dict(OLD), []
    for survived in itertools.count(step=stride):
        pair = {FIRST: live, SECOND: following}
        one = FIRST if live.live_generation == live.generation else SECOND
        other = SECOND if one == FIRST else FIRST
        write(pair[one], one, f"v{survived}", "d3", f"n{survived}")
        pair[one].delete_documents([f"n{survived - 3 * stride}"])
        expected |= {"d3": f"v{survived}", f"n{survived}": f"v{survived}"}
        expected.pop(f"n{survived - 3 * stride}", None)
        with monkeypatch.context() as dying:
            stop_before(dying, survived)
            try:
                again = beside(pair[one], other, pair[other].generation)
                build_generation(again, embed(other))
                publish_generation(again, embed(other))
                died = False
            except Stopped:
                died = True
        after = opened(target, FIRST if live.live_generation == live.generation else SECOND)
        published.append(after.generation != pair[one].generation)
        fingerprint = other if published[-1] else one
        assert stored(after, fingerprint) == expected
        write(after, fingerprint, "again", "d5")
        expected["d5"] = "again"
        assert stored(after, fingerprint) == expected
        assert sum(state.state == "live" for state in after.generation_states()) == 1
        live, following = (after, following) if fingerprint == FIRST else (live, after)
        if fingerprint == FIRST and published[-1]:
            following = beside(live, SECOND, following.generation)
        elif fingerprint == SECOND:
            live = beside(following, FIRST, live.generation)
        if not died:
            break
    assert survived > 20
    assert len(after.generation_states()) == 2


def test_writes_of_other_processes_while_generations_are_published_are_refused_or_found(
    target: str, live: ElasticsearchKnowledgeBase
) -> None:
    acknowledged: dict[str, str] = {}
    refused: list[str] = []
    failures: list[BaseException] = []
    stopping = threading.Event()

    def work(writer: str) -> None:
        knowledge_base, fingerprint, number = opened(target), FIRST, 0
        try:
            while not stopping.is_set():
                id_, word = f"{writer}{number % 7}", f"v{number}"
                number += 1
                try:
                    write(knowledge_base, fingerprint, word, id_)
                    acknowledged[id_] = word
                    if number % 5 == 0:
                        acknowledged.pop(id_)
                        knowledge_base.delete_documents([id_])
                except GenerationReplaced:  # no promise was made of this document; a server follows
                    acknowledged.pop(id_, None)
                    refused.append(id_)
                    knowledge_base.close()
                    knowledge_base, fingerprint = opened_live(target)
        except BaseException as error:
            failures.append(error)
        knowledge_base.close()

    threads = [threading.Thread(target=work, args=(writer,)) for writer in ("x", "y")]
    for thread in threads:
        thread.start()
    pair = {FIRST: live, SECOND: beside(live, SECOND)}
    answering = FIRST
    try:
        for _ in range(5):  # an odd number: whoever slept through all of it writes to one that is not live any more
            other = SECOND if answering == FIRST else FIRST
            pair[other] = beside(pair[answering], other, pair[other].generation)
            assert build_generation(pair[other], embed(other))
            publish_generation(pair[other], embed(other))
            answering = other
        deadline = time.monotonic() + 60
        while not refused and not failures and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert failures == []
    found = stored(pair[answering], answering)
    lost = {id_: (word, found.get(id_)) for id_, word in (OLD | acknowledged).items() if found.get(id_) != word}
    assert lost == {}
    assert {*found} - {*OLD, *acknowledged} <= {*refused}
    assert refused


def test_one_that_is_replaced_while_it_is_opened_says_so_when_it_is_written_to(
    target: str, live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = beside(live, SECOND)
    assert build_generation(second, embed(SECOND))
    really_open = knowledge_base_module.open_live

    def open_and_replace(*arguments: Any) -> Generation:
        found = really_open(*arguments)
        publish_generation(second, embed(SECOND))
        return found

    monkeypatch.setattr(knowledge_base_module, "open_live", open_and_replace)
    replaced = opened(target)
    with pytest.raises(GenerationReplaced):
        write(replaced, FIRST, "new", "d99")
    assert stored(second, SECOND) == OLD
    for knowledge_base in (replaced, second):
        knowledge_base.close()


def test_of_two_processes_that_publish_at_once_both_are_done_and_one_generation_is_live(
    target: str, live: ElasticsearchKnowledgeBase
) -> None:
    own = [beside(live, SECOND), opened(target, FIRST).open_beside(fingerprint=SECOND, dim=DIM, bundle=PLACES[SECOND])]
    assert own[0].generation == own[1].generation
    outcomes: list[BaseException | None] = []

    def work(knowledge_base: ElasticsearchKnowledgeBase) -> None:
        try:
            build_generation(knowledge_base, embed(SECOND))
            publish_generation(knowledge_base, embed(SECOND))
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None in outcomes
    assert all(outcome is None or isinstance(outcome, GenerationNotReady) for outcome in outcomes)
    after = opened(target, SECOND)
    assert stored(after, SECOND) == OLD
    write(after, SECOND, "new", "d1")
    assert [state.state for state in after.generation_states()] == ["kept", "live"]
    after.close()


def test_a_write_waits_while_the_live_generation_is_held_and_goes_on_when_it_is_let_go(
    target: str, live: ElasticsearchKnowledgeBase
) -> None:
    following = beside(live, SECOND)
    following.hold()
    writing = threading.Thread(target=write, args=(live, FIRST, "new", "d1"))
    writing.start()
    writing.join(timeout=0.5)
    assert writing.is_alive()
    assert stored(live, FIRST) == OLD  # and it can be read
    following.release()
    writing.join(timeout=30)
    assert stored(live, FIRST) == OLD | {"d1": "new"}
    following.close()


def test_who_holds_for_too_long_is_not_published_and_nothing_changed(
    live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = beside(live, SECOND)
    build_generation(following, embed(SECOND))
    following.hold()
    monkeypatch.setattr(publication, "HOLD_SECONDS", -1.0)
    write(live, FIRST, "new", "d1")
    monkeypatch.undo()
    with pytest.raises(GenerationNotReady, match="nothing changed, try again"):
        build_generation(following, embed(SECOND))
    following.release()
    build_generation(following, embed(SECOND))
    following.hold()
    other = beside(live, SECOND)
    with monkeypatch.context() as later:
        later.setattr(publication, "HOLD_SECONDS", -1.0)
        other.hold()  # and takes it from the first, which lacks nothing
    other.release()
    other.close()
    with pytest.raises(GenerationNotReady, match="nothing changed, try again"):
        following.publish()
    write(live, FIRST, "newer", "d1")
    assert stored(live, FIRST) == OLD | {"d1": "newer"}
    publish_generation(following, embed(SECOND))
    assert stored(following, SECOND) == OLD | {"d1": "newer"}
    with pytest.raises(GenerationReplaced, match=r"took the place.*second.*/bundles/second"):
        write(live, FIRST, "lost", "d1")
    with pytest.raises(GenerationReplaced):
        live.delete_documents(["d2"])
    assert stored(live, FIRST) == OLD | {"d1": "newer"}  # who has the old one open goes on reading it
    assert stored(following, SECOND) == OLD | {"d1": "newer"}
    following.close()


def test_a_copy_waits_while_its_generation_is_held_and_goes_on_when_it_is_let_go(target: str, live: ElasticsearchKnowledgeBase) -> None:
    following, other = beside(live, SECOND), beside(live, SECOND)
    following.hold()
    copying = threading.Thread(target=build_generation, args=(other, embed(SECOND)))
    copying.start()
    copying.join(timeout=0.5)
    assert copying.is_alive()
    assert following.counts().documents == 0
    following.release()
    copying.join(timeout=30)
    assert following.lacking(1) is None
    publish_generation(following, embed(SECOND))
    assert stored(following, SECOND) == OLD
    for each in (following, other):
        each.close()


def test_what_another_process_copies_while_a_generation_is_published_does_not_get_into_it(
    target: str, live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    following, other = beside(live, SECOND), beside(live, SECOND)
    late = other.lacking(100)  # and embeds it while all of this happens
    assert late is not None
    write(live, FIRST, "new", "d1")
    live.delete_documents(["d2"])
    build_generation(following, embed(SECOND))
    really_publish = publication.publish

    def publish_after_a_copy(*arguments: Any) -> None:
        with monkeypatch.context() as impatient:
            impatient.setattr(connection, "WRITING_PATIENCE", 0.3)
            with pytest.raises(KnowledgeBaseUnavailable, match="being published"):
                late.fill(*vectors(SECOND, late.passages))
        really_publish(*arguments)

    monkeypatch.setattr(publication, "publish", publish_after_a_copy)
    publish_generation(following, embed(SECOND))
    with pytest.raises(GenerationNotReady, match="published"):
        late.fill(*vectors(SECOND, late.passages))
    expected = OLD | {"d1": "new"}
    del expected["d2"]
    assert stored(following, SECOND) == expected
    for each in (following, other):
        each.close()


@pytest.mark.parametrize("who", ["writes", "copies", "opens"])
def test_who_dies_while_it_holds_stops_nobody_for_good(
    target: str, live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    dead, other = beside(live, SECOND), beside(live, SECOND)
    dead.hold()
    with monkeypatch.context() as later:
        later.setattr(publication, "HOLD_SECONDS", -1.0)
        if who == "writes":
            write(live, FIRST, "old", "d1")
        elif who == "copies":
            build_generation(other, embed(SECOND))
        else:
            beside(live, SECOND, other.generation).close()
    build_generation(other, embed(SECOND))
    publish_generation(other, embed(SECOND))
    assert stored(other, SECOND) == OLD
    dead.release()  # it was only slow
    write(other, SECOND, "new", "d1")
    assert stored(other, SECOND) == OLD | {"d1": "new"}
    for each in (dead, other):
        each.close()


def test_a_write_gives_up_after_a_while_and_says_what_it_waits_for(
    live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = beside(live, SECOND)
    following.hold()
    monkeypatch.setattr(connection, "WRITING_PATIENCE", 0.3)
    with pytest.raises(KnowledgeBaseUnavailable, match="being published"):
        write(live, FIRST, "new", "d1")
    following.release()
    following.close()


def test_an_index_that_an_operator_closed_to_writes_is_told_apart_from_one_that_is_held(
    live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    client.indices.add_block(index=alias, block="write")
    with pytest.raises(KnowledgeBaseRefused, match="operator"):
        write(live, FIRST, "new", "d1")


def test_a_generation_that_another_process_published_or_removed_takes_no_more_copies(target: str, live: ElasticsearchKnowledgeBase) -> None:
    following, gone = beside(live, SECOND), beside(live, SECOND)
    gap = gone.lacking(100)
    assert gap is not None
    build_generation(following, embed(SECOND))
    publish_generation(following, embed(SECOND))
    write(following, SECOND, "new", "d1")
    with pytest.raises(GenerationNotReady, match="published"):
        gap.fill(*vectors(SECOND, gap.passages))
    back = beside(following, FIRST, live.generation)
    gap = back.lacking(100)
    assert gap is not None
    following.remove_generation(live.generation)
    with pytest.raises(KnowledgeBaseDamaged, match="gone"):
        gap.fill(*vectors(FIRST, gap.passages))
    with pytest.raises(InvalidRequest, match="none of"):
        beside(following, FIRST, live.generation)
    assert stored(following, SECOND) == OLD | {"d1": "new"}
    for each in (following, gone, back):
        each.close()


def test_a_generation_that_was_replaced_again_takes_no_copies_until_somebody_builds_it(live: ElasticsearchKnowledgeBase) -> None:
    following, late = beside(live, SECOND), beside(live, SECOND)
    build_generation(following, embed(SECOND))
    publish_generation(following, embed(SECOND))
    back = beside(following, FIRST, live.generation)
    publish_generation(back, embed(FIRST))
    write(back, FIRST, "new", "d1")
    gap = late.lacking(100)
    assert gap is not None
    with pytest.raises(GenerationNotReady, match="published and replaced meanwhile"):
        gap.fill(*vectors(SECOND, gap.passages))
    again = beside(back, SECOND, late.generation)
    gap.fill(*vectors(SECOND, gap.passages))
    assert again.lacking(1) is None
    for each in (following, late, back, again):
        each.close()


def test_a_document_whose_passages_are_gone_is_named_and_not_copied_in_part(
    live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    [entry] = client.search(index=alias, query={"term": {"kind": "passage"}}, size=1)["hits"]["hits"]
    client.delete(index=alias, id=entry["_id"], routing=entry["_routing"], refresh=True)
    following = beside(live, SECOND)
    with pytest.raises(KnowledgeBaseDamaged, match=r"passages of document 'd\d+' are gone; write it again"):
        build_generation(following, embed(SECOND))
    write(live, FIRST, "new", *OLD)
    build_generation(following, embed(SECOND))
    publish_generation(following, embed(SECOND))
    assert stored(following, SECOND) == dict.fromkeys(OLD, "new")
    following.close()


def test_a_document_that_is_being_deleted_while_it_is_copied_is_not_taken_for_damaged(
    live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = beside(live, SECOND)
    client.indices.put_settings(index=alias, settings={"index.refresh_interval": "-1"})  # a search still finds its record as it was
    with monkeypatch.context() as dying:
        real = Connection.bulk

        def bulk(self: Connection, alias: str, actions: Any, **options: Any) -> Any:
            results = real(self, alias, actions, **options)
            if any(result is not None and result.get("result") == "deleted" for result in results):  # the passages; its record stays
                raise Stopped
            return results

        dying.setattr(Connection, "bulk", bulk)
        with pytest.raises(Stopped):
            live.delete_documents(["d1"])
    assert (gap := following.lacking(limit=10_000)) is not None
    assert {passage.document_id for passage in gap.passages} == OLD.keys() - {"d1"}
    following.close()


def test_indexes_that_hold_different_documents_are_told_apart_whatever_their_numbers_add_up_to(
    client: elasticsearch.Elasticsearch, elasticsearch_host: str, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difference, "LISTED", 2)
    numbers = {"one": {3, 6, 1_000, 7_777, 7_778, 7_779}, "other": {4, 5, 1_000, 7_777, 7_778, 7_779, 90_000}}
    for name, documents in numbers.items():
        settings = schema.settings(shards=1, replicas=0, active_copies="1")
        client.indices.create(index=f"{alias}-{name}", mappings=schema.mappings(DIM, {}), settings=settings)
        for number in documents:
            entry = {"kind": "document", "live": True, "number": number, "first": 1, "passages": 1, "mark": schema.mark(number)}
            client.index(index=f"{alias}-{name}", routing="x", document=entry)
        client.indices.refresh(index=f"{alias}-{name}")
    own = Connection(parse_address(f"elasticsearch://{elasticsearch_host}/{alias}"))
    found = list(differences(own, f"{alias}-one", f"{alias}-other"))
    covered = {number for part in found for number in range(part.low, part.high)}
    assert {3, 4, 5, 6, 90_000} <= covered
    assert not {7_777, 7_778, 7_779} & covered
    assert list(differences(own, f"{alias}-one", f"{alias}-one")) == []
    assert [part.low >= 80_000 for part in differences(own, f"{alias}-one", f"{alias}-other", low=7)] == [True]
    own.close()


def test_an_index_from_before_marks_and_tokens_is_written_and_copied(
    target: str, live: ElasticsearchKnowledgeBase, monkeypatch: pytest.MonkeyPatch, alias: str
) -> None:
    with monkeypatch.context() as before:
        real = schema.mappings

        def without_them(dim: int, facts: Any) -> dict[str, Any]:
            mappings = real(dim, facts)
            for name in schema.ADDED:
                del mappings["properties"][name]
            return mappings | {"dynamic": False}  # what an older server wrote has none; here they are not indexed

        before.setattr(schema, "mappings", without_them)
        older = opened(target.replace(alias, f"{alias}-older"))
        write(older, FIRST, "old", "a", "b")
    write(older, FIRST, "new", "b", "c")
    following = beside(older, SECOND)
    build_generation(following, embed(SECOND))
    publish_generation(following, embed(SECOND))
    assert stored(following, SECOND) == {"a": "old", "b": "new", "c": "new"}
    for each in (older, following):
        each.close()


def test_a_new_generation_lies_on_the_nodes_as_the_live_one_does_unless_the_address_says_otherwise(
    target: str, live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    client.indices.put_settings(index=alias, settings={"index.write.wait_for_active_shards": "all"})
    bare = target.partition("?")[0]
    for address, shards in ((bare, "2"), (f"{bare}?shards=3", "3")):
        following = opened(address, SECOND, new_generation=True)
        settings = client.indices.get_settings(index=f"{alias}-{following.generation}")[f"{alias}-{following.generation}"]["settings"][
            "index"
        ]
        found = (settings["number_of_shards"], settings["number_of_replicas"], settings["write"]["wait_for_active_shards"])
        assert found == (shards, "0", "all")
        following.close()
    assert [state.state for state in live.generation_states()] == ["live", "new", "new"]


def test_a_name_that_publishing_would_take_from_somebody_else_refuses_it(
    target: str, live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    second = beside(live, SECOND)
    assert build_generation(second, embed(SECOND))
    for others in ({"index": f"{alias}-others", "aliases": {f"{alias}-kept": {}}}, {"index": f"{alias}-previous"}):
        client.indices.create(**others)  # type: ignore[arg-type]
        with pytest.raises(KnowledgeBaseDamaged, match=f"means {others['index']}, which is none of its generations"):
            publish_generation(second, embed(SECOND))
        client.indices.delete(index=str(others["index"]))
    write(live, FIRST, "new", "d1")
    publish_generation(second, embed(SECOND))
    assert stored(second, SECOND) == OLD | {"d1": "new"}
    second.close()


def test_a_neighbour_of_a_newer_format_is_none_of_its_affair(
    target: str, live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    facts = {"format": str(schema.FORMAT + 1), "generation": "1-0123456789ab"}
    client.indices.create(index=f"{alias}-archive-1-0123456789ab", mappings={"_meta": {"openbook": facts}})
    assert [state.name for state in live.generation_states()] == [live.generation]


def test_names_that_an_operator_removed_are_told_with_the_request_that_brings_them_back(
    target: str, live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    second = beside(live, SECOND)
    assert build_generation(second, embed(SECOND))
    publish_generation(second, embed(SECOND))
    index = f"{alias}-{second.generation}"

    def told(refused: KnowledgeBaseDamaged) -> None:
        """Follow it."""
        [request] = re.findall(r"POST _aliases (\{.*\}\]\})", str(refused))
        client.indices.update_aliases(**json.loads(request))

    client.indices.delete_alias(index=index, name=f"{index}-here")
    with pytest.raises(KnowledgeBaseDamaged, match=f"{index}-here") as raised:
        write(second, SECOND, "new", "d1")
    told(raised.value)
    write(second, SECOND, "new", "d1")
    client.indices.delete_alias(index=index, name=f"{index}-here")
    client.indices.delete_alias(index=index, name=alias)
    for _ in range(2):
        with pytest.raises(KnowledgeBaseDamaged, match=f"but the index {index}") as raised:
            opened(target, SECOND)
        told(raised.value)
        write(opened(target, SECOND), SECOND, "again", "d2")
        client.indices.delete_alias(index=index, name=alias)  # and the other name stays
    told(raised.value)
    assert stored(opened(target, SECOND), SECOND) == OLD | {"d1": "new", "d2": "again"}
    second.close()


def test_a_generation_whose_index_an_operator_closed_keeps_its_number_and_is_in_nobodys_way(
    target: str, live: ElasticsearchKnowledgeBase, client: elasticsearch.Elasticsearch, alias: str
) -> None:
    second = beside(live, SECOND)
    assert build_generation(second, embed(SECOND))
    publish_generation(second, embed(SECOND))
    index = f"{alias}-{live.generation}"
    client.indices.close(index=index)
    assert [state.name for state in second.generation_states()] == [second.generation]
    third = opened(f"{target.replace('shards=2', 'shards=1')}", SECOND, new_generation=True)
    assert third.generation.startswith("3-")
    assert build_generation(third, embed(SECOND))
    publish_generation(third, embed(SECOND))
    assert {*client.indices.get_alias(name=f"{alias}-previous").body} == {f"{alias}-{second.generation}"}
    with pytest.raises(KnowledgeBaseRefused, match=f"POST {index}/_open"):
        build_generation(beside(second, FIRST), embed(FIRST))
    third.remove_generation(live.generation)
    assert not client.indices.exists(index=index)
    for each in (second, third):
        each.close()
