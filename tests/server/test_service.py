"""A real server with tiny models, asked over the wire: what it answers, and how it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from openbook.client import AsyncClient
from openbook.errors import RequestRejected
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb
from openbook_server import pipeline, service, turns
from openbook_server.backlog import Backlog, Group
from openbook_server.bundle import bundle_id
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest, KnowledgeBaseDamaged, Overloaded
from openbook_server.frontend import Frontend
from openbook_server.frontends.port import reserved_port
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge_service import KnowledgeService
from openbook_server.listening import LIVENESS, REQUESTS_A_ROW, listen_on_port
from openbook_server.manifest import MANIFEST
from openbook_server.metrics import Metrics
from openbook_server.models import Models, model_of
from openbook_server.serving import running_server
from openbook_server.status import grpc_status
from openbook_server.tokenization import Pair, TextEncoder
from prometheus_client import generate_latest

if TYPE_CHECKING:
    from openbook_server.served import Served

CONFIG = ServerConfig(port=0, device="cpu", max_texts=8, max_text_bytes=2_000, max_message_bytes=20_000, drain_seconds=1.0)


@pytest.fixture
async def address(tiny_bundle: Path, tiny_knowledge_base: Path) -> AsyncIterator[str]:
    async with running_server(tiny_bundle, tiny_knowledge_base, CONFIG) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> openbook_pb2_grpc.OpenBookAsyncStub:
    return openbook_pb2_grpc.OpenBookStub(channel)


def vectors(reply: pb.EmbedResponse) -> np.ndarray:
    return np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dim)


async def scrape(port: int) -> str:
    """What Prometheus would see."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return page


async def refusal(call: grpc.aio.UnaryUnaryCall[object, object]) -> tuple[grpc.StatusCode, str, list[str]]:
    """(status, reason, fields) of a call that must fail with google.rpc details."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status = rpc_status.from_call(raised.value)
    info, bad = ErrorInfo(), BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return raised.value.code(), info.reason, [violation.field for violation in bad.field_violations]


async def test_embed_returns_a_unit_vector_a_text_in_order(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    reply = await stub.Embed(pb.EmbedRequest(texts=["red city", "blue", "one two three river king book red blue"]))
    assert vectors(reply).shape == (3, reply.dim)
    assert np.linalg.norm(vectors(reply), axis=1) == pytest.approx(1.0, abs=1e-5)
    assert list(reply.tokens) == [4, 3, 10]
    assert len(reply.provenance.bundle_id) == 64
    assert reply.timings.total_ms > 0


@pytest.mark.parametrize("cache_mb", [0, 1])
async def test_the_same_text_gives_the_same_bytes_whatever_shares_its_batch(tiny_bundle: Path, cache_mb: int) -> None:
    config = dataclasses.replace(CONFIG, cache_mb=cache_mb)
    async with running_server(tiny_bundle, None, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await same_bytes(openbook_pb2_grpc.OpenBookStub(channel))


async def same_bytes(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    text = "the red city"
    alone = (await stub.Embed(pb.EmbedRequest(texts=[text]))).vectors
    for others in (["blue"] * 7, ["one two three city river king book " * 3, "red", "the blue city"]):
        reply = await stub.Embed(pb.EmbedRequest(texts=[text, *others]))
        assert vectors(reply)[0].tobytes() == alone
    crowd = await asyncio.gather(*(stub.Embed(pb.EmbedRequest(texts=[text if n % 2 else "a king"])) for n in range(40)))
    assert all(reply.vectors == alone for reply in crowd[1::2])


async def test_search_returns_hits_best_first_in_every_mode(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    for mode in pb.SearchMode.values():
        if mode == pb.SEARCH_MODE_NONE:
            continue
        reply = await stub.Search(pb.SearchRequest(questions=["red river", "book"], top_k=3, mode=mode))
        assert len(reply.results) == 2
        for result in reply.results:
            scores = [hit.score for hit in result.hits]
            assert scores == sorted(scores, reverse=True)
            assert len({hit.passage_id for hit in result.hits}) == len(scores)
            for hit in result.hits:  # what was compared, and nothing else
                close = mode in (pb.SEARCH_MODE_UNSPECIFIED, pb.SEARCH_MODE_HYBRID, pb.SEARCH_MODE_LATE_INTERACTION)
                assert hit.HasField("window_score") == hit.HasField("token_score") == close
                assert hit.HasField("overlap_score") == (close and mode != pb.SEARCH_MODE_LATE_INTERACTION)
        assert reply.provenance.generation
    assert [
        hit.document_id for hit in (await stub.Search(pb.SearchRequest(questions=["book"], mode=pb.SEARCH_MODE_LEXICAL))).results[0].hits
    ] == ["d2"]


async def test_reranked_hits_stand_in_the_order_of_what_was_read_in_them(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    questions = ["what is red ?", "who is king ?"]
    plain = (await stub.Search(pb.SearchRequest(questions=questions, top_k=3))).results
    reranked = (await stub.Search(pb.SearchRequest(questions=questions, top_k=3, rerank=3))).results
    answered = (await stub.Answer(pb.AnswerRequest(questions=questions, top_k=3, max_answers=20))).results
    for before, after, answer in zip(plain, reranked, answered, strict=True):
        assert not any(hit.HasField("answer_probability") for hit in before.hits)
        assert {hit.passage_id: hit.score for hit in before.hits} == {hit.passage_id: hit.score for hit in after.hits}
        probabilities = [hit.answer_probability for hit in after.hits]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) + answer.no_answer_probability == pytest.approx(1.0)
        assert [(hit.passage_id, hit.answer_probability) for hit in answer.hits] == [
            (hit.passage_id, pytest.approx(hit.answer_probability)) for hit in after.hits
        ]
    assert any(
        [hit.passage_id for hit in before.hits] != [hit.passage_id for hit in after.hits]
        for before, after in zip(plain, reranked, strict=True)
    )


async def test_only_the_hits_that_were_read_change_places(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    [plain] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=3))).results
    [partly] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=3, rerank=2))).results
    [deeper] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=1, rerank=3))).results
    assert {hit.passage_id for hit in partly.hits[:2]} == {hit.passage_id for hit in plain.hits[:2]}
    assert [hit.HasField("answer_probability") for hit in partly.hits] == [True, True, False]
    assert partly.hits[2] == plain.hits[2]
    [all_read] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=3, rerank=3))).results
    assert list(deeper.hits) == list(all_read.hits[:1])


@pytest.mark.parametrize("rerank", [-1, 101, 2**31 - 1])
async def test_a_rerank_out_of_range_is_named(stub: openbook_pb2_grpc.OpenBookAsyncStub, rerank: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Search(pb.SearchRequest(questions=["red"], rerank=rerank))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{rerank} is outside 0 to 100" in str(caught.value.details())


async def test_an_answer_is_the_span_it_points_at(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    reply = await stub.Answer(pb.AnswerRequest(questions=["what is red ?", "who is king ?"], top_k=3, max_answers=2))
    for result in reply.results:
        texts = {hit.passage_id: hit.text for hit in result.hits}
        assert 1 <= len(result.answers) <= 2
        for answer in result.answers:
            assert texts[answer.passage_id][answer.start : answer.end] == answer.text
        assert 0 <= result.no_answer_probability <= 1
        assert sum(answer.probability for answer in result.answers) + result.no_answer_probability <= 1 + 1e-6


async def test_reading_stops_when_the_answer_is_settled_and_changes_nothing_where_it_is_not(
    tiny_bundle: Path, tiny_knowledge_base: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    request = pb.AnswerRequest(questions=["what is red ?", "who is king ?"], top_k=3)
    results = {}
    for name, settling in (
        ("off", None),
        ("never", {"unread_weight": 1e5}),
        ("at once", {"unread_weight": -1e5}),
    ):
        bundle = shutil.copytree(tiny_bundle, tmp_path / name)
        manifest = json.loads((bundle / MANIFEST).read_text())
        manifest["reader"] |= {"settling": settling} if settling else {}
        (bundle / MANIFEST).write_text(json.dumps(manifest | {"id": bundle_id(manifest)}))
        config = dataclasses.replace(CONFIG, metrics_port=unused_tcp_port if name == "at once" else 0)
        async with (
            running_server(bundle, tiny_knowledge_base, config) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
            results[name] = (await stub.Answer(request)).results
            page = await scrape(unused_tcp_port) if name == "at once" else ""
            whole = pb.AnswerRequest(questions=request.questions, top_k=3, read_all=True)
            results[f"{name}, all asked for"] = (await stub.Answer(whole)).results
    assert [result.passages_read for result in results["off"]] == [len(result.hits) for result in results["off"]] == [3, 3]
    for name in ("never", "never, all asked for", "at once, all asked for"):
        assert list(results[name]) == list(results["off"])
    assert [(result.passages_read, len(result.hits)) for result in results["at once"]] == [(1, 3)] * 2
    assert [[hit.HasField("answer_probability") for hit in result.hits] for result in results["at once"]] == [[True, False, False]] * 2
    first = {result.hits[0].passage_id for result in results["at once"]}
    assert {answer.passage_id for result in results["at once"] for answer in result.answers} <= first
    assert "openbook_question_passages_sum 2.0" in page


async def test_what_will_yet_be_read_for_a_question_is_told_before_it_is_embedded(
    stub: openbook_pb2_grpc.OpenBookAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    expect = Backlog.expect

    def spy(backlog: Backlog, group: Group, rows: int, deadline: float) -> None:
        told.append((model_of(group.graph), rows))
        expect(backlog, group, rows, deadline)

    monkeypatch.setattr(Backlog, "expect", spy)
    await stub.Answer(pb.AnswerRequest(questions=["what is red ?", "who is king ?"], top_k=3))
    assert told == [("reader", 6), ("reader", -6), ("reader", 0), ("reader", 0)]
    told.clear()
    await stub.Search(pb.SearchRequest(questions=["what is red ?", "who is king ?"], top_k=3, rerank=2))
    assert told == [("reader", 4), ("reader", -4), ("reader", 0), ("reader", 0)]


async def test_how_much_is_usually_read_is_learned_from_what_was_read(
    tiny_bundle: Path, tiny_knowledge_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["reader"] |= {"settling": {"unread_weight": 1e5}}  # never settled: all three are read, in three rounds
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"id": bundle_id(manifest)}))
    told: list[int] = []
    monkeypatch.setattr(Backlog, "expect", lambda backlog, group, rows, deadline: told.append(rows))
    async with (
        running_server(bundle, tiny_knowledge_base, CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        request = pb.AnswerRequest(questions=["what is red ?", "who is king ?"], top_k=3)
        await stub.Answer(request)
        assert set(told) == {0}
        told.clear()
        await stub.Answer(request)
    assert [rows for rows in told if rows > 0] == [6, 4]  # nothing is left for the third round, which finds nothing unread
    assert sum(told) == 0


async def test_without_retrieval_nothing_is_read_and_nothing_answered(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    [result] = (await stub.Answer(pb.AnswerRequest(questions=["what is red ?"], mode=pb.SEARCH_MODE_NONE))).results
    assert (list(result.answers), list(result.hits), result.no_answer_probability) == ([], [], 1.0)


async def test_describe_names_what_is_served_and_its_limits(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    reply = await stub.Describe(pb.DescribeRequest())
    assert (reply.limits.max_texts, reply.limits.max_top_k, reply.device, reply.precision) == (8, 100, "cpu", "fp32")
    assert reply.knowledge_base.documents == 3
    assert set(reply.bundle.tasks) == {"embed", "answer"}


async def test_one_bad_text_among_good_ones_fails_alone(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    reply = await stub.Embed(pb.EmbedRequest(texts=["red", "", "blue", "x" * 3_000]))
    assert {error.index: (error.field, error.reason) for error in reply.errors} == {
        1: ("texts[1]", "INVALID_REQUEST"),
        3: ("texts[3]", "INVALID_REQUEST"),
    }
    assert np.linalg.norm(vectors(reply), axis=1) == pytest.approx([1, 0, 1, 0], abs=1e-5)
    answers = await stub.Answer(pb.AnswerRequest(questions=["", "what is red ?"]))
    assert [error.index for error in answers.errors] == [0]
    assert answers.results[1].answers


async def test_invalid_utf8_is_pinned_to_its_text(channel: grpc.aio.Channel) -> None:
    embed = channel.unary_unary("/openbook.v1.OpenBook/Embed", response_deserializer=pb.EmbedResponse.FromString)
    reply = await embed(b"\x0a\x03red\x0a\x02\xff\xfe")
    assert [(error.index, error.field) for error in reply.errors] == [(1, "texts[1]")]
    assert await refusal(embed(b"\x0a\x02\xff\xfe")) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", ["texts[0]"])
    assert await refusal(embed(b"\xff\xff\xff")) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", ["request"])


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Embed", pb.EmbedRequest(), "texts"),
        ("Embed", pb.EmbedRequest(texts=[" "]), "texts[0]"),
        ("Embed", pb.EmbedRequest(texts=["red " * 400]), "texts[0]"),
        ("Search", pb.SearchRequest(questions=["red"], top_k=0), "top_k"),
        ("Search", pb.SearchRequest(questions=["red"], top_k=-1), "top_k"),
        ("Search", pb.SearchRequest(questions=["red"], top_k=2_000_000_000), "top_k"),
        ("Search", pb.SearchRequest(questions=["red"], top_k=5, ef=4), "ef"),
        ("Search", pb.SearchRequest(questions=["red"], mode=17), "mode"),  # type: ignore[arg-type]
        ("Search", pb.SearchRequest(questions=["red"], fusion=17), "fusion"),  # type: ignore[arg-type]
        ("Search", pb.SearchRequest(questions=["red"], diversity=1.5), "diversity"),
        ("Answer", pb.AnswerRequest(questions=["red"], diversity=float("nan")), "diversity"),
        ("Answer", pb.AnswerRequest(questions=["red"], min_score=float("nan")), "min_score"),
        ("Answer", pb.AnswerRequest(questions=["red"], mode=pb.SEARCH_MODE_NONE, top_k=0), "top_k"),
        ("Answer", pb.AnswerRequest(questions=["red"], max_answers=0), "max_answers"),
        ("Answer", pb.AnswerRequest(questions=["red " * 400]), "questions[0]"),
    ],
)
async def test_a_bad_field_is_refused_by_name(stub: openbook_pb2_grpc.OpenBookAsyncStub, method: str, request_: object, field: str) -> None:
    assert await refusal(getattr(stub, method)(request_)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", [field])


@pytest.mark.parametrize(("texts", "field"), [(["red"] * 9, "texts"), (["x" * 30_000], "request")])
async def test_a_message_that_holds_too_much_has_a_reason_of_its_own(
    stub: openbook_pb2_grpc.OpenBookAsyncStub, texts: list[str], field: str
) -> None:
    """By which clients know that fewer texts a message would do."""
    refused = await refusal(stub.Embed(pb.EmbedRequest(texts=texts)))
    assert refused == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", [field])


async def test_what_is_hardly_out_of_range_is_told_as_it_was_sent(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"diversity: 1\.0000001 is outside 0 to 1"):
        await stub.Search(pb.SearchRequest(questions=["red"], diversity=1.0000001))


async def test_what_needs_a_reader_is_refused_as_not_in_the_bundle_where_there_is_none(
    tiny_bundle: Path, tiny_knowledge_base: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"reader": None}
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"id": bundle_id(manifest)}))
    async with (
        running_server(bundle, tiny_knowledge_base, CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        assert (await stub.Search(pb.SearchRequest(questions=["red"]))).results[0].hits
        missing = (grpc.StatusCode.FAILED_PRECONDITION, "NOT_IN_BUNDLE", list[str]())
        assert await refusal(stub.Search(pb.SearchRequest(questions=["red"], rerank=2))) == missing
        assert await refusal(stub.Answer(pb.AnswerRequest(questions=["red"]))) == missing


async def test_options_of_a_search_reach_the_knowledge_base(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    [weighted] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=3))).results
    ranks = pb.SearchRequest(questions=["what is red ?"], top_k=3, fusion=pb.FUSION_RECIPROCAL_RANK)
    assert all(0 < hit.score <= 2 / 61 for hit in (await stub.Search(ranks)).results[0].hits)
    least = weighted.hits[1].score
    [best] = (await stub.Search(pb.SearchRequest(questions=["what is red ?"], top_k=3, min_score=least))).results
    assert [hit.passage_id for hit in best.hits] == [hit.passage_id for hit in weighted.hits if hit.score >= least]
    [nothing] = (await stub.Answer(pb.AnswerRequest(questions=["what is red ?"], min_score=1e9))).results
    assert (len(nothing.answers), len(nothing.hits), nothing.no_answer_probability) == (0, 0, 1.0)


async def test_a_deadline_that_cannot_be_met_is_refused_by_the_server(tiny_bundle: Path) -> None:
    hurried = ServerConfig(port=0, device="cpu", max_deadline_seconds=0.0)  # however long the caller would wait
    async with running_server(tiny_bundle, None, hurried) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        refused = await refusal(stub.Embed(pb.EmbedRequest(texts=["red"]), timeout=60))
    assert refused == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", [])


async def test_a_knowledge_base_that_does_not_answer_holds_up_nothing_that_needs_none_of_it(
    tiny_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(EmbeddedKnowledgeBase, "page", lambda self, after, size: gate.wait(60) and [])
    config = ServerConfig(port=0, device="cpu")
    async with running_server(tiny_bundle, tiny_knowledge_base, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        listing = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        hanging = [asyncio.ensure_future(listing.List(kb.ListRequest())) for _ in range(100)]
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        try:
            reply = await stub.Embed(pb.EmbedRequest(texts=["red city in the " * 8] * 200, truncate=True), timeout=30)
        finally:
            gate.set()
        await asyncio.gather(*hanging)
    assert len(reply.tokens) == 200


async def test_a_long_request_is_refused_before_it_is_tokenised(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenised = []
    texts = TextEncoder.texts
    monkeypatch.setattr(TextEncoder, "texts", lambda self, batch: tokenised.append(len(batch)) or texts(self, batch))
    hurried = ServerConfig(port=0, device="cpu", max_deadline_seconds=0.0)
    async with running_server(tiny_bundle, None, hurried) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        refused = await refusal(stub.Embed(pb.EmbedRequest(texts=["red city in the " * 2] * 200), timeout=60))
        too_many = await refusal(stub.Embed(pb.EmbedRequest(texts=["red city in the "] * 300)))
    assert not tokenised
    assert (refused[0], too_many[0]) == (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INVALID_ARGUMENT)


async def test_many_passages_are_refused_before_they_are_put_beside_their_questions(
    stub: openbook_pb2_grpc.OpenBookAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Models, model: str, lengths: Sequence[int], *, deadline: float, begun: bool = False) -> None:
        if model == "reader":
            raise Overloaded(f"{len(lengths)} are too many", retry_after_seconds=1.0)

    def pairs(self: TextEncoder, *arguments: object) -> list[Pair]:
        raise AssertionError("they were put beside their questions")

    monkeypatch.setattr(Models, "check", check)
    monkeypatch.setattr(TextEncoder, "pairs", pairs)
    call = stub.Answer(pb.AnswerRequest(questions=["what is red ?"] * 8, top_k=3, read_all=True))
    with pytest.raises(grpc.aio.AioRpcError, match="24 are too many") as raised:
        await call
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_of_many_questions_lets_others_have_their_turns(
    stub: openbook_pb2_grpc.OpenBookAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, done = 0, dict[str, list[int]]()  # the event loop's, and in which of them each step was done

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def noted(owner: object, name: str) -> None:
        step = getattr(owner, name)

        def note(*arguments: Any, **options: Any) -> object:
            done.setdefault(name, []).append(turn)
            return step(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    monkeypatch.setattr(turns, "TURN_SECONDS", -1.0)  # as if every step took long
    noted(TextEncoder, "pairs")
    noted(pipeline, "rank_answers")
    noted(pipeline.Pipeline, "_posterior")
    noted(service, "to_answer_result")
    counting = asyncio.create_task(count())
    await stub.Answer(pb.AnswerRequest(questions=["what is red ?"] * 4, top_k=2))
    counting.cancel()
    assert {name: len(set(steps)) for name, steps in done.items()} == dict.fromkeys(done, 4)
    assert len(done) == 4


async def test_requests_beyond_a_bound_are_refused_while_others_are_worked_on(
    tiny_bundle: Path, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate, search = asyncio.Event(), threading.Event(), EmbeddedKnowledgeBase.search
    loop = asyncio.get_running_loop()

    def gated(*arguments: object, **options: object) -> object:
        loop.call_soon_threadsafe(started.set)
        assert gate.wait(timeout=30)
        return search(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddedKnowledgeBase, "search", gated)
    config = ServerConfig(port=0, device="cpu", max_queued=1)
    async with (
        running_server(tiny_bundle, tiny_knowledge_base, config) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        request = pb.SearchRequest(questions=["red"], mode=pb.SEARCH_MODE_LEXICAL)
        calls = [stub.Search(request) for _ in range(REQUESTS_A_ROW + 1)]
        await started.wait()
        ended, waiting = await asyncio.wait([asyncio.ensure_future(refusal(call)) for call in calls], return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in ended] == [(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", [])]
        for task in waiting:
            task.cancel()
        gate.set()
        assert (await stub.Search(request)).results


async def test_an_absurdly_long_deadline_is_served(stub: openbook_pb2_grpc.OpenBookAsyncStub) -> None:
    assert (await stub.Embed(pb.EmbedRequest(texts=["red"]), timeout=3e7)).dim > 0


async def test_health_tells_readiness_and_liveness(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "openbook.v1.OpenBook", LIVENESS):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_the_protocol_to_a_stranger(channel: grpc.aio.Channel, version: str) -> None:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    for symbol, message in (
        ("openbook.v1.OpenBook", b"AnswerRequest"),
        ("openbook.v1.KnowledgeBase", b"UpsertRequest"),
        ("openbook.v1.OpenBook.Embed", b"EmbedRequest"),
        ("openbook.v1.EmbedRequest", b"EmbedRequest"),
    ):
        requests = iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)])
        replies = [reply async for reply in ask(requests)]
        assert any(message in file for reply in replies for file in reply.file_descriptor_response.file_descriptor_proto)
    requests = iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="openbook.v1.OpenBook.Absent")])
    assert [reply.error_response.error_code async for reply in ask(requests)] == [grpc.StatusCode.NOT_FOUND.value[0]]


async def test_a_port_in_use_is_refused_with_the_way_out(address: str, tiny_bundle: Path) -> None:
    taken = ServerConfig(port=int(address.rpartition(":")[2]), device="cpu")
    with pytest.raises(InvalidRequest, match="choose another --port"):
        async with running_server(tiny_bundle, None, taken):
            pass


async def test_a_host_that_is_not_this_machine_is_refused_by_its_name(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="--host: cannot listen on 192.0.2.1, which is no address of this machine"):
        async with running_server(tiny_bundle, None, ServerConfig(host="192.0.2.1", port=0, device="cpu")):
            pass


def free_port(host: str) -> int:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind((host, 0))
            return int(tried.getsockname()[1])
    except OSError:
        pytest.skip(f"this machine has no {host}")


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_an_ipv6_address_is_listened_on_for_calls_and_metrics(tiny_bundle: Path, caplog: pytest.LogCaptureFixture, host: str) -> None:
    metrics_port = free_port("::1")
    config = ServerConfig(host=host, port=0, device="cpu", metrics_port=metrics_port)
    with caplog.at_level("INFO"):
        async with running_server(tiny_bundle, None, config) as port, grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
            stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
            assert (await stub.Embed(pb.EmbedRequest(texts=["red"]))).dim > 0
            scraped = await asyncio.to_thread(urllib.request.urlopen, f"http://[::1]:{metrics_port}/metrics")
            assert scraped.status == 200
            with pytest.raises(InvalidRequest, match=rf"cannot listen on \[::1\]:{port}; is it in use"):
                await listen_on_port([], dataclasses.replace(config, port=port))
    assert f"on [::1]:{port}: " in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="front ends share a port as only Linux does")
def test_front_ends_share_a_port_of_an_ipv6_address() -> None:
    free_port("::1")
    with reserved_port(ServerConfig(host="[::1]", port=0)) as config:
        assert config.port


async def test_a_metrics_port_in_use_is_refused_with_the_way_out_before_anything_is_loaded(
    address: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_server.serving._load", lambda *_: pytest.fail("it was loaded"))
    taken = ServerConfig(port=0, device="cpu", metrics_port=int(address.rpartition(":")[2]))
    with pytest.raises(InvalidRequest, match="choose another --metrics-port"):
        async with running_server(tiny_bundle, None, taken):
            pass


async def test_without_a_knowledge_base_what_needs_none_is_served_and_the_rest_says_how_to_get_one(tiny_bundle: Path) -> None:
    async with (
        running_server(tiny_bundle, None, CONFIG) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        assert (await stub.Embed(pb.EmbedRequest(texts=["red"]))).dim > 0
        [alone] = (await stub.Answer(pb.AnswerRequest(questions=["what is red ?"], mode=pb.SEARCH_MODE_NONE))).results
        assert (alone.passages_read, len(alone.answers), alone.no_answer_probability) == (0, 0, 1)  # as with one
        writes: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        for call in (
            stub.Search(pb.SearchRequest(questions=["red"])),
            stub.Answer(pb.AnswerRequest(questions=["red"])),
            writes.Delete(kb.DeleteRequest(ids=["a"])),
        ):
            assert await refusal(call) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_KNOWLEDGE_BASE", [])


async def test_metrics_count_requests_by_method_and_status(tiny_bundle: Path, unused_tcp_port: int) -> None:
    config = ServerConfig(port=0, device="cpu", metrics_port=unused_tcp_port)
    async with running_server(tiny_bundle, None, config) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        await stub.Embed(pb.EmbedRequest(texts=["red", "blue"]))
        await stub.Embed(pb.EmbedRequest(texts=["red", "Red", "green"]))
        await refusal(stub.Embed(pb.EmbedRequest()))
        refused = 'openbook_requests_total{method="Embed",status="INVALID_ARGUMENT"} 1.0'
        while refused not in (page := await scrape(unused_tcp_port)):  # counted once the caller has its answer
            await asyncio.sleep(0.01)
    assert 'openbook_requests_total{method="Embed",status="OK"} 2.0' in page
    assert 'openbook_batch_rows_count{graph="embedder"}' in page
    lookups = {result: f'openbook_cache_lookups_total{{result="{result}"}} ' for result in ("hit", "joined", "miss")}
    assert [page.partition(name)[2].partition("\n")[0] for name in lookups.values()] == ["1.0", "1.0", "3.0"]
    assert float(page.partition("\nopenbook_cache_bytes ")[2].partition("\n")[0]) > 0
    assert "red" not in page.replace("registered", "")


async def test_a_knowledge_base_that_fails_is_in_the_log_once(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise KnowledgeBaseDamaged("kb: the disk is full")

    monkeypatch.setattr(KnowledgeService, "upsert", fail)
    knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
    for _ in range(3):
        told = await refusal(knowledge.Upsert(kb.UpsertRequest(documents=[kb.Document(id="a", text="secret")])))
        assert told == (grpc.StatusCode.FAILED_PRECONDITION, "KNOWLEDGE_BASE_DAMAGED", [])
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["Upsert fails: kb: the disk is full"]


async def test_a_reply_that_would_be_too_large_is_an_error_of_the_request_and_counts_as_one(
    tiny_bundle: Path, tiny_knowledge_base: Path, unused_tcp_port: int
) -> None:
    config = ServerConfig(port=0, device="cpu", max_message_bytes=1_024, drain_seconds=1.0, metrics_port=unused_tcp_port)
    async with (
        running_server(tiny_bundle, tiny_knowledge_base, config) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        request = pb.SearchRequest(questions=["red"] * 50, top_k=3, mode=pb.SEARCH_MODE_LEXICAL)
        with pytest.raises(grpc.aio.AioRpcError, match="the limit is 4096; ask for fewer") as raised:
            await stub.Search(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await refusal(stub.Search(request)) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", ["request"])
        assert (await stub.Search(pb.SearchRequest(questions=["red"], top_k=3))).results
        page = await scrape(unused_tcp_port)
    assert 'openbook_requests_total{method="Search",status="INVALID_ARGUMENT"} 2.0' in page


@pytest.mark.parametrize("limits", [{"max_texts": 5}, {"max_message_bytes": 1_024}])
async def test_a_client_s_long_list_comes_through_a_server_with_small_limits(
    tiny_bundle: Path, tiny_knowledge_base: Path, limits: dict[str, int]
) -> None:
    config = ServerConfig(port=0, device="cpu", drain_seconds=1.0, **limits)
    questions = [f"what is {'red' if at % 2 else 'blue'} ?" if at != 40 else "" for at in range(70)]
    async with running_server(tiny_bundle, tiny_knowledge_base, config) as port, AsyncClient(f"127.0.0.1:{port}") as client:
        for found in (await client.search(questions, top_k=5), await client.answer(questions, top_k=5)):
            assert [at for at, result in enumerate(found) if isinstance(result, RequestRejected)] == [40]
            assert [result.question for result in found if not isinstance(result, RequestRejected)] == [*questions[:40], *questions[41:]]


# Methods that everybody depends on, or that change something: never refused unread.
SPARED = ("/openbook.v1.OpenBook/Describe", "/openbook.v1.KnowledgeBase/Upsert", "/grpc.health.v1.Health/Check")


def retry_seconds(status: grpc.Status) -> float:
    retry = RetryInfo()
    details = Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"]).details
    assert any(detail.Unpack(retry) for detail in details)
    return retry.retry_delay.ToTimedelta().total_seconds()


def test_calls_that_came_too_late_are_refused_unread_where_they_wait_for_the_models() -> None:
    frontend = Frontend(ServerConfig(), Metrics())
    frontend.unread("/openbook.v1.OpenBook/Answer", 0.0, 0.5)
    assert frontend.unread("/openbook.v1.OpenBook/Answer", 1.0, 0.5) is None  # while nothing is served, callers hear of that
    frontend.served = cast("Served", object())
    assert frontend.unread("/openbook.v1.OpenBook/Answer", 1.0, 0.5) is None  # nothing has come too late yet
    late = [frontend.unread("/openbook.v1.OpenBook/Answer", 0.0, 0.5) is not None for _ in range(20)]
    assert late[0] is False  # one is not enough
    assert late[-1] is True
    assert [frontend.unread(path, 1.0, 0.5) for path in SPARED] == [None] * 3
    refused = frontend.unread("/openbook.v1.OpenBook/Answer", 1.0, 0.5)
    assert refused is not None
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again in 1 s" in refused.details
    assert retry_seconds(refused) == 1
    assert frontend.unread("/openbook.v1.OpenBook/Answer", None, 0.5) is None  # it can wait
    counted = generate_latest(frontend._metrics.registry).decode()
    assert f'openbook_requests_total{{method="Answer",status="RESOURCE_EXHAUSTED"}} {sum(late) + 1}.0' in counted


def test_where_many_calls_do_not_fit_the_queue_those_without_hope_are_refused_unread() -> None:
    frontend = Frontend(ServerConfig(), Metrics())
    frontend.served = cast("Served", object())
    frontend.shedding.crowded = lambda left: 2.34 if left < 5 else 0.0
    assert frontend.unread("/openbook.v1.OpenBook/Embed", 1.0, 0.0) is None  # they are few: each is looked at, for it may be remembered
    for _ in range(20_000):
        frontend.shedding.count(time.monotonic())
    assert [frontend.unread(path, 1.0, 0.0) for path in SPARED] == [None] * 3
    refused = frontend.unread("/openbook.v1.OpenBook/Embed", 1.0, 0.0)
    assert refused is not None
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the queue needs about 2.4 s" in refused.details
    assert retry_seconds(refused) == pytest.approx(2.4)
    frontend.shedding.crowded = lambda left: 0.1 if left < 0 else 0.0
    assert frontend.unread("/openbook.v1.OpenBook/Embed", -1.0, 0.0) is None  # its time is over, the queue is not too long
    frontend.shedding.crowded = lambda left: 2.34 if left < 5 else 0.0
    assert frontend.unread("/openbook.v1.OpenBook/Embed", 60.0, 0.0) is None
    assert frontend.unread("/openbook.v1.OpenBook/Embed", None, 0.0) is None


@pytest.mark.parametrize("letter", ["x", "\x01", "ü", "\udcff"])
def test_what_a_request_names_is_not_sent_back_without_limit(letter: str) -> None:
    status = grpc_status(InvalidRequest("classifier", f"this bundle has no {letter * 1_000_000!r}; name one of topics"))
    assert status.details.startswith("classifier: this bundle has no '")
    assert "bytes left out" in status.details
    assert status.details.endswith("; name one of topics")
    assert len(status.details.encode()) + sum(len(value) for _, value in status.trailing_metadata or ()) < 4_000
