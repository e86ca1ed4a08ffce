"""Writing to a real server over the wire: what is acknowledged is searchable at once and after a restart."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from openbook.client import AsyncClient, Document
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb
from openbook_server import serving
from openbook_server.bundle import load_bundle
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, KnowledgeBaseUnavailable
from openbook_server.ingest import preparation
from openbook_server.ingest.parts import Parts
from openbook_server.knowledge import Document as StoredDocument
from openbook_server.knowledge import Passage, SearchOptions, open_knowledge_base
from openbook_server.knowledge.fusion import LEXICAL_WEIGHT, TOKEN_WEIGHT
from openbook_server.knowledge.store import FILE
from openbook_server.knowledge_service import KnowledgeService
from openbook_server.serving import running_server
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_server.wire import Parsed
from openbook_server.work import Work
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from conftest import Place

CONFIG = ServerConfig(port=0, device="cpu", max_texts=10, drain_seconds=1.0)


@pytest.fixture
async def channel(tiny_bundle: Path, tiny_place: Place) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        running_server(tiny_bundle, tiny_place.target, CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub:
    return knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)


async def search(channel: grpc.aio.Channel, question: str, mode: pb.SearchMode) -> list[str]:
    stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
    reply = await stub.Search(pb.SearchRequest(questions=[question], mode=mode, top_k=20))
    return [hit.document_id for hit in reply.results[0].hits]


def document(id_: str, text: str = "the green book of the river", **others: str) -> kb.Document:
    return kb.Document(id=id_, text=text, **others)  # type: ignore[arg-type]


async def test_an_acknowledged_document_is_found_at_once_and_after_a_restart(tiny_bundle: Path, tiny_place: Place) -> None:
    for run in range(2):
        async with (
            running_server(tiny_bundle, tiny_place.target, CONFIG) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            if run == 0:
                stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
                reply = await stub.Upsert(kb.UpsertRequest(documents=[document("new", "a zebra was in the city", title="zebra")]))
                assert [(result.id, result.outcome, result.passages) for result in reply.results] == [("new", kb.OUTCOME_CREATED, 1)]
            assert await search(channel, "zebra", pb.SEARCH_MODE_LEXICAL) == ["new"]
            assert "new" in await search(channel, "zebra", pb.SEARCH_MODE_DENSE)
            questions: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
            reply = await questions.Search(pb.SearchRequest(questions=["zebra"]))
            [new] = [hit for hit in reply.results[0].hits if hit.document_id == "new"]
            assert all(hit.HasField("window_score") and hit.HasField("token_score") for hit in reply.results[0].hits)
            near = new.window_score + TOKEN_WEIGHT * new.token_score
            assert new.score == pytest.approx(near + LEXICAL_WEIGHT * new.lexical_score + new.overlap_score)


async def test_a_document_too_large_for_a_message_is_named_and_those_around_it_are_stored(tiny_bundle: Path, tiny_place: Place) -> None:
    documents = [Document(id=id_, text=text) for id_, text in (("first", "a zebra"), ("large", "x" * 9_000_000), ("last", "a yak"))]
    async with running_server(tiny_bundle, tiny_place.target, CONFIG) as port, AsyncClient(f"127.0.0.1:{port}") as client:
        first, large, last = [written async for written in client.upsert(documents)]
    assert [(one.id, one.outcome) for one in (first, large, last)] == [("first", "created"), ("large", "failed"), ("last", "created")]
    assert large.problem.startswith("documents[1]: too large for one message (request: 90000")


async def test_passages_keep_their_tokens_whoever_stored_them(tiny_bundle: Path, tiny_place: Place) -> None:
    async with (
        running_server(tiny_bundle, tiny_place.target, CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        await stub.Upsert(kb.UpsertRequest(documents=[document("new", "a zebra was in the city", title="zebra")]))
    bundle = load_bundle(tiny_bundle)
    knowledge_base = open_knowledge_base(tiny_place.target, bundle)
    [hits] = knowledge_base.search(["zebra river city"], None, SearchOptions(top_k=20, mode="lexical"))
    knowledge_base.close()
    assert "new" in {hit.passage.document_id for hit in hits}
    assert len(hits) > 1  # the others were indexed
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path), bundle.tokenizer_digest)
    assert [hit.passage.tokens for hit in hits] == encoder.kept([hit.passage.text for hit in hits])


async def test_writing_again_replaces_and_writing_the_same_changes_nothing(
    channel: grpc.aio.Channel, stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub
) -> None:
    first = await stub.Upsert(kb.UpsertRequest(documents=[document("x", "one zebra")]))
    same = await stub.Upsert(kb.UpsertRequest(documents=[document("x", "one zebra")]))
    assert (same.results[0].outcome, same.results[0].passages, same.sequence) == (kb.OUTCOME_UNCHANGED, 1, first.sequence)
    changed = await stub.Upsert(kb.UpsertRequest(documents=[document("x", "one yak"), document("y", "two yak")]))
    assert [result.outcome for result in changed.results] == [kb.OUTCOME_REPLACED, kb.OUTCOME_CREATED]
    assert [result.replaced_source for result in changed.results] == ["", ""]
    moved = kb.Document(id="y", text="two yaks", source="elsewhere")
    [other] = (await stub.Upsert(kb.UpsertRequest(documents=[moved]))).results
    [back] = (await stub.Upsert(kb.UpsertRequest(documents=[document("y", "two yak")]))).results
    assert (other.outcome, other.replaced_source, back.replaced_source) == (kb.OUTCOME_REPLACED, document("y", "").source, "elsewhere")
    assert changed.sequence > first.sequence
    assert await search(channel, "zebra", pb.SEARCH_MODE_LEXICAL) == []
    assert set(await search(channel, "yak", pb.SEARCH_MODE_LEXICAL)) == {"x", "y"}


async def test_bad_documents_fail_alone_each_by_its_field(stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub) -> None:
    documents = [
        document("good"),
        document(""),
        document("empty", " "),
        document("good", "again"),
        document("i" * 600),
        document("nul", "a\0b"),
        document("long title", title="t" * 2_049),
        document(" "),
        kb.Document(id="nul in a key", text="red", metadata={"a\0b": "v"}),
        kb.Document(id="no key", text="red", metadata={"": "v"}),
    ]
    reply = await stub.Upsert(kb.UpsertRequest(documents=documents))
    assert [(result.outcome, result.error.field) for result in reply.results] == [
        (kb.OUTCOME_CREATED, ""),
        (kb.OUTCOME_UNSPECIFIED, "documents[1].id"),
        (kb.OUTCOME_UNSPECIFIED, "documents[2].text"),
        (kb.OUTCOME_UNSPECIFIED, "documents[3].id"),
        (kb.OUTCOME_UNSPECIFIED, "documents[4].id"),
        (kb.OUTCOME_UNSPECIFIED, "documents[5].text"),
        (kb.OUTCOME_UNSPECIFIED, "documents[6].title"),
        (kb.OUTCOME_UNSPECIFIED, "documents[7].id"),
        (kb.OUTCOME_UNSPECIFIED, "documents[8].metadata"),
        (kb.OUTCOME_UNSPECIFIED, "documents[9].metadata"),
    ]
    assert all(result.HasField("error") == (at > 0) for at, result in enumerate(reply.results))


@pytest.mark.parametrize(
    ("big", "field", "limit"),
    [
        (kb.Document(title="ü" * 1_025), "title", 2_048),
        (kb.Document(source="s" * 4_097), "source", 4_096),
        (kb.Document(metadata={str(n): "v" for n in range(65)}), "metadata", 64),
        (kb.Document(metadata={"k": "v" * 16_384}), "metadata", 16_384),
    ],
)
async def test_what_would_stand_beside_every_passage_is_limited(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub, big: kb.Document, field: str, limit: int
) -> None:
    big.id, big.text = "big", "red king"
    [refused, good] = (await stub.Upsert(kb.UpsertRequest(documents=[big, document("good")]))).results
    assert refused.error.field == f"documents[0].{field}"
    assert f"exceed the limit of {limit}; " in refused.error.message
    assert good.outcome == kb.OUTCOME_CREATED


async def test_bytes_that_are_not_utf8_fail_their_document_alone(channel: grpc.aio.Channel) -> None:
    upsert = channel.unary_unary("/openbook.v1.KnowledgeBase/Upsert", response_deserializer=kb.UpsertResponse.FromString)
    good = kb.UpsertRequest(documents=[document("good")]).SerializeToString()
    reply = await upsert(good + b"\x0a\x07\x0a\x01b\x1a\x02\xff\xfe")
    assert [result.outcome for result in reply.results] == [kb.OUTCOME_CREATED, kb.OUTCOME_UNSPECIFIED]
    assert "UTF-8" in reply.results[1].error.message


async def test_a_stream_answers_each_request_in_order_and_survives_bad_documents(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub,
) -> None:
    async def requests() -> AsyncIterator[kb.UpsertRequest]:
        for number in range(5):
            yield kb.UpsertRequest(documents=[document(f"s{number}", f"yak {number}"), document("", "no id")])

    replies = [reply async for reply in stub.UpsertStream(requests())]
    assert [reply.results[0].id for reply in replies] == [f"s{number}" for number in range(5)]
    assert all(reply.results[0].outcome == kb.OUTCOME_CREATED and reply.results[1].HasField("error") for reply in replies)

    async def deletions() -> AsyncIterator[kb.DeleteRequest]:
        for number in (0, 9):
            yield kb.DeleteRequest(ids=[f"s{number}"])

    removed = [reply.results[0].outcome async for reply in stub.DeleteStream(deletions())]
    assert removed == [kb.OUTCOME_DELETED, kb.OUTCOME_ABSENT]


async def test_a_deleted_document_is_never_found_again(
    channel: grpc.aio.Channel, stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub
) -> None:
    await stub.Upsert(kb.UpsertRequest(documents=[document("gone", "one yak. " * 30)]))
    reply = await stub.Delete(kb.DeleteRequest(ids=["gone", "never"]))
    assert [(result.outcome, result.passages > 1) for result in reply.results] == [(kb.OUTCOME_DELETED, True), (kb.OUTCOME_ABSENT, False)]
    assert await search(channel, "yak", pb.SEARCH_MODE_LEXICAL) == []
    assert "gone" not in await search(channel, "yak", pb.SEARCH_MODE_DENSE)
    assert len((await stub.Get(kb.GetRequest(ids=["gone"]))).documents) == 0


async def test_deleting_a_document_whose_write_was_stopped_removes_what_that_left(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub, tiny_bundle: Path, tiny_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tiny_place.in_elasticsearch:
        pytest.skip("a write to a folder is one transaction")
    from openbook_server.knowledge.elastic.schema import document_key

    embedder = load_bundle(tiny_bundle).embedder
    other: Any = tiny_place.open(fingerprint=embedder.fingerprint, dim=embedder.dim)
    other.snapshot()  # so that its write begins with no sweep
    real, left = other._entrance.bulk, iter(range(3))

    def bulk(actions: Any) -> Any:
        if next(left, None) is None:
            raise KnowledgeBaseUnavailable("stopped before the commit")
        return real(actions)

    monkeypatch.setattr(other._entrance, "bulk", bulk)
    vectors = np.eye(1, embedder.dim, dtype=np.float32)
    with pytest.raises(KnowledgeBaseUnavailable):
        other.replace_documents([(StoredDocument(id="s", text=""), "")], [Passage(id="s#0", document_id="s", text="yak", start=0)], vectors)
    key = document_key("s")
    assert key in other._documents.stored([key])
    reply = await stub.Delete(kb.DeleteRequest(ids=["s"]))
    assert [result.outcome for result in reply.results] == [kb.OUTCOME_ABSENT]
    assert other._documents.stored([key]) == {}
    other.close()


async def test_get_and_list_give_back_what_was_written(stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub) -> None:
    text = "The red king. " * 20
    written = kb.Document(id="w", title="Kings", text=text, source="file", metadata={"k": "v"})
    await stub.Upsert(kb.UpsertRequest(documents=[written]))
    [stored] = (await stub.Get(kb.GetRequest(ids=["absent", "w", "w"]))).documents
    assert (stored.id, stored.title, stored.source, dict(stored.metadata)) == ("w", "Kings", "file", {"k": "v"})
    assert len(stored.passages) > 1
    for passage in stored.passages:
        assert text[passage.document_start : passage.document_start + len(passage.text)] == passage.text
    for size in (1, 2, 3, 4, 5):
        pages, token = list[list[str]](), ""
        while not pages or token:
            page = await stub.List(kb.ListRequest(page_size=size, page_token=token))
            pages.append([document.id for document in page.documents])
            token = page.next_page_token
        assert pages == [["d0", "d1", "d2", "w"][at : at + size] for at in range(0, 4, size)]


class Documents:
    """A knowledge base of documents of one passage each, that knows how many were asked for."""

    def __init__(self, size: int) -> None:
        self.passage, self.asked = Passage(id="p", document_id="d", text="x" * size, start=0), 0

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        self.asked += len(ids)
        return {id_: [self.passage] for id_ in reversed(ids)}


async def test_no_more_is_read_than_a_reply_may_hold_and_the_order_is_the_request_s() -> None:
    config = ServerConfig(max_message_bytes=1_024, max_texts=200)  # and four times as many of a reply

    async def get(size: int) -> list[str]:
        service = KnowledgeService(None, documents := Documents(size), None, config)  # type: ignore[arg-type]
        parsed = Parsed(kb.GetRequest(ids=[str(number) for number in range(100)]), frozenset())
        try:
            return [document.id for document in (await service.get(parsed, Work(0.0))).documents]
        finally:
            assert documents.asked == (100 if size == 1 else 16)

    assert await get(1) == [str(number) for number in range(100)]
    with pytest.raises(InvalidRequest, match=r"^ids: 4 of these documents exceed the limit of 4096 bytes a reply; ask for fewer"):
        await get(1_200)


@pytest.mark.parametrize("id_", ["i" * 600, " "])
async def test_a_document_whose_id_would_be_refused_today_can_be_read_and_deleted(
    tiny_bundle: Path, tiny_knowledge_base: Path, id_: str
) -> None:
    with sqlite3.connect(tiny_knowledge_base / FILE) as connection:  # as versions before wrote it
        connection.execute("UPDATE documents SET id = ? WHERE id = 'd0'", (id_,))
    connection.close()
    async with (
        running_server(tiny_bundle, str(tiny_knowledge_base), CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        [stored] = (await stub.Get(kb.GetRequest(ids=[id_]))).documents
        assert stored.id == id_
        [deleted] = (await stub.Delete(kb.DeleteRequest(ids=[id_]))).results
        assert deleted.outcome == kb.OUTCOME_DELETED


async def test_describe_and_snapshot_tell_the_state(stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub, tiny_place: Place) -> None:
    state = await stub.Describe(kb.DescribeKnowledgeBaseRequest())
    assert (state.documents, state.writable, len(state.embedder_fingerprint)) == (3, True, 64)
    assert state.bytes > 0
    saved = await stub.Snapshot(kb.SnapshotRequest())
    in_graph = 0 if not tiny_place.in_elasticsearch else state.passages  # so few are scanned in a folder
    assert (saved.sequence, saved.graph_passages) == (state.sequence, in_graph)


async def test_concurrent_writes_of_one_document_leave_one_of_them_whole(
    channel: grpc.aio.Channel, stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub
) -> None:
    writes = [stub.Upsert(kb.UpsertRequest(documents=[document("c", f"yak {number}. " * 9)])) for number in range(8)]
    replies = await asyncio.gather(*writes)
    assert sorted(reply.results[0].outcome for reply in replies) == [kb.OUTCOME_CREATED, *[kb.OUTCOME_REPLACED] * 7]
    [stored] = (await stub.Get(kb.GetRequest(ids=["c"]))).documents
    assert len({passage.text[:5] for passage in stored.passages}) == 1
    assert set(await search(channel, "yak", pb.SEARCH_MODE_LEXICAL)) == {"c"}


async def test_of_concurrent_writes_of_one_text_one_creates_it_and_the_others_change_nothing(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub,
) -> None:
    before = (await stub.Describe(kb.DescribeKnowledgeBaseRequest())).sequence
    replies = await asyncio.gather(*[stub.Upsert(kb.UpsertRequest(documents=[document("c", "one yak. " * 9)])) for _ in range(8)])
    assert sorted(reply.results[0].outcome for reply in replies) == [kb.OUTCOME_CREATED, *[kb.OUTCOME_UNCHANGED] * 7]
    assert len({reply.results[0].passages for reply in replies}) == 1
    assert (await stub.Describe(kb.DescribeKnowledgeBaseRequest())).sequence == before + 1


async def test_a_large_document_holds_up_no_other_write_and_is_given_up_with_its_caller(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, split_up = threading.Event(), preparation.split

    def split(documents: Sequence[Document], tokenizer: Tokenizer, *, passage_tokens: int, overlap: int) -> Parts[list[list[Passage]]]:
        while documents[0].id == "endless":
            begun.set()
            yield
        return (yield from split_up(documents, tokenizer, passage_tokens=passage_tokens, overlap=overlap))

    monkeypatch.setattr(preparation, "split", split)
    endless = stub.Upsert(kb.UpsertRequest(documents=[document("endless")]))
    assert await asyncio.to_thread(begun.wait, 10)
    [stored] = (await stub.Upsert(kb.UpsertRequest(documents=[document("n")]))).results
    [deleted] = (await stub.Delete(kb.DeleteRequest(ids=["n"]))).results
    assert (stored.outcome, deleted.outcome) == (kb.OUTCOME_CREATED, kb.OUTCOME_DELETED)
    endless.cancel()  # type: ignore[attr-defined]  # if its parts went on, the server would not stop
    with pytest.raises(grpc.aio.AioRpcError, match="the deadline passed|Deadline Exceeded"):
        await stub.Upsert(kb.UpsertRequest(documents=[document("endless")]), timeout=0.3)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Upsert", kb.UpsertRequest(), "documents"),
        ("Upsert", kb.UpsertRequest(documents=[kb.Document(id=str(n), text="x") for n in range(11)]), "documents"),
        ("Delete", kb.DeleteRequest(), "ids"),
        ("Get", kb.GetRequest(ids=[""]), "ids[0]"),
        ("Get", kb.GetRequest(ids=["i" * 8_192, "i" * 8_193]), "ids[1]"),
        ("List", kb.ListRequest(page_size=0), "page_size"),
        ("List", kb.ListRequest(page_token="x"), "page_token"),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub, method: str, request_: object, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub, method)(request_)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(raised.value.details()).startswith(f"{field}:")


@pytest.mark.parametrize(
    ("flags", "elsewhere", "writable"), [({}, True, False), ({"writable": True}, True, True), ({"read_only": True}, False, False)]
)
async def test_writes_from_other_machines_must_be_allowed_and_may_be_refused_to_all(
    tiny_bundle: Path, tiny_place: Place, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], elsewhere: bool, writable: bool
) -> None:
    if elsewhere:
        monkeypatch.setattr(serving, "LOOPBACK", ())  # as if the server listened on an address that others reach
    config = ServerConfig(port=0, device="cpu", **flags)
    async with (
        running_server(tiny_bundle, tiny_place.target, config) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        assert (await stub.Describe(kb.DescribeKnowledgeBaseRequest())).writable == writable
        if writable:
            assert (await stub.Upsert(kb.UpsertRequest(documents=[document("n")]))).results[0].outcome == kb.OUTCOME_CREATED
            return
        with pytest.raises(grpc.aio.AioRpcError, match="--read-only.*--writable") as raised:
            await stub.Upsert(kb.UpsertRequest(documents=[document("n")]))
        info = ErrorInfo()
        rpc_status.from_call(raised.value).details[0].Unpack(info)
        assert info.reason == "READ_ONLY"


def test_taking_writes_from_everybody_and_from_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--read-only: and --writable contradict each other"):
        ServerConfig(writable=True, read_only=True)
