"""The client against a scripted server: results, retries, deadlines, and every error as its own class."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from openbook import cli, command_generate, messages
from openbook.client import AsyncClient, Client
from openbook.errors import ClientError, DeadlineExceeded, RequestRejected, ServerFailed, ServerOverloaded, ServerUnavailable
from openbook.parts import TEXTS_A_MESSAGE
from openbook.results import AnswerResult, Classified, Document, SearchResult, Written
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb

MAX_MESSAGE_BYTES = 1_000  # of an upsert; gRPC's own limit of 4 MiB holds as well


def failure(code: grpc.StatusCode, message: str, *details: object) -> Callable[[grpc.ServicerContext], None]:
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)  # type: ignore[arg-type]
    status = rpc_status.to_status(Status(code=code.value[0], message=message, details=packed))
    return lambda context: context.abort_with_status(status)


def come_back(milliseconds: int) -> RetryInfo:
    return RetryInfo(retry_delay=Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000))


def too_large(field: str, what: str) -> Callable[[grpc.ServicerContext], None]:
    """As the server says it."""
    violation = BadRequest.FieldViolation(field=field, description=what)
    details = ErrorInfo(reason="MESSAGE_TOO_LARGE"), BadRequest(field_violations=[violation])
    return failure(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {what}", *details)


class Scripted(openbook_pb2_grpc.OpenBookServicer, knowledge_base_pb2_grpc.KnowledgeBaseServicer):
    """Fails as the test scripted, then answers; remembers what it was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[grpc.ServicerContext], None]] = []
        self.requests: list[object] = []
        self.slow: set[str] = set()  # ids of documents that are never stored in time
        self.max_texts = 256  # that a message may list
        self.max_reply_texts = 256  # for which a reply is not too large
        self.long: set[str] = set()  # texts whose reply alone is too large
        self.refused = 0  # messages that listed too many

    def _next(self, request: Any, context: grpc.ServicerContext) -> None:
        self._check(request, context)
        self.requests.append(request)
        if self.script:
            self.script.pop(0)(context)

    def _check(self, request: Any, context: grpc.ServicerContext) -> None:
        field = next((name for name in ("texts", "questions", "ids", "documents") if name in request.DESCRIPTOR.fields_by_name), "")
        listed = getattr(request, field, [])
        self.refused += len(listed) > min(self.max_texts, self.max_reply_texts)
        if len(listed) > self.max_texts:
            too_large(field, f"{len(listed)} texts exceed the limit of {self.max_texts} a request")(context)
        if field not in {"", "documents"} and (len(listed) > self.max_reply_texts or self.long & set(listed)):
            too_large("request", "the reply has 9 bytes, the limit is 8; ask for less")(context)
        if field in {"texts", "questions"} and list(listed) == [""]:
            violation = BadRequest.FieldViolation(field=f"{field}[0]", description="empty")
            details = ErrorInfo(reason="INVALID_REQUEST"), BadRequest(field_violations=[violation])
            failure(grpc.StatusCode.INVALID_ARGUMENT, f"{field}[0]: empty", *details)(context)

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:  # noqa: N802
        self._next(request, context)
        vectors = np.array([[len(text), 1] for text in request.texts], "<f4")
        return pb.EmbedResponse(vectors=vectors.tobytes(), dim=2, errors=self._errors("texts", request.texts))

    def Search(self, request: pb.SearchRequest, context: grpc.ServicerContext) -> pb.SearchResponse:  # noqa: N802
        self._next(request, context)
        hit = pb.Hit(
            passage_id="d#0",
            document_id="d",
            score=1.5,
            lexical_score=0.0,
            window_score=0.5,
            token_score=0.75,
            text="the passage",
            source="file.txt",
        )
        return pb.SearchResponse(
            results=[pb.SearchResult(hits=[hit]) for _ in request.questions], errors=self._errors("questions", request.questions)
        )

    def Answer(self, request: pb.AnswerRequest, context: grpc.ServicerContext) -> pb.AnswerResponse:  # noqa: N802
        self._next(request, context)
        answer = pb.Answer(text="passage", probability=0.5, passage_id="d#0", document_id="d", start=4, end=11)
        hit = pb.Hit(passage_id="d#0", document_id="d", score=1.5, text="the passage")
        return pb.AnswerResponse(
            results=[pb.AnswerResult(answers=[answer], hits=[hit], no_answer_probability=0.25, passages_read=1) for _ in request.questions],
            errors=self._errors("questions", request.questions),
            timings=pb.Timings(total_ms=3),
        )

    def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:  # noqa: N802
        self._next(request, context)
        hit = pb.Hit(passage_id="d#0", document_id="d", score=0.75, text="the passage")
        labels = [pb.Label(label="yes", probability=0.75, alone=0.5, model=0.5, knn=1.0), pb.Label(label="no", probability=0.25)]
        return pb.ClassifyResponse(
            results=[
                pb.ClassifyResult(labels=labels, passages=1, neighbours=[pb.Neighbour(label="yes", hit=hit)] if request.explain else [])
                for _ in request.texts
            ],
            errors=self._errors("texts", request.texts),
            classifier="answers",
            timings=pb.Timings(total_ms=3),
        )

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:  # noqa: N802
        return pb.DescribeResponse(bundle=pb.DescribeResponse.Bundle(dim=2))

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self._next(request, context)
        yield pb.GenerateResponse(text="one", tokens=1)
        if request.text == "broken":
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        whole = "One Two" if request.text == "capitals" else "one two"
        ending = pb.GenerateResponse.Ending(finish=pb.FINISH_STOP, text=whole, seed=7, writer="generator")
        yield pb.GenerateResponse(text=" two", tokens=2, ending=ending)

    def RollBackGeneration(self, request: kb.RollBackGenerationRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._next(request, context)
        return kb.RollBackGenerationResponse(name="1-a")

    PublishGeneration = RemoveGeneration = RollBackGeneration

    def Upsert(self, request: kb.UpsertRequest, context: grpc.ServicerContext) -> kb.UpsertResponse:  # noqa: N802
        if (size := request.ByteSize()) > MAX_MESSAGE_BYTES:
            too_large("request", f"{size} bytes exceed the limit")(context)
        self._next(request, context)
        if any(document.id in self.slow for document in request.documents):
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too slow")
        return kb.UpsertResponse(results=self._written("documents", [document.id for document in request.documents]))

    def Delete(self, request: kb.DeleteRequest, context: grpc.ServicerContext) -> kb.DeleteResponse:  # noqa: N802
        self._next(request, context)
        return kb.DeleteResponse(results=self._written("ids", list(request.ids)))

    def _written(self, field: str, ids: list[str]) -> list[kb.WriteResult]:
        """Of an empty id a failure."""
        written = [kb.WriteResult(id=id_, outcome=kb.OUTCOME_CREATED) for id_ in ids]
        for error in self._errors(field, ids):
            written[error.index].error.CopyFrom(error)
        return written

    @staticmethod
    def _errors(field: str, texts: list[str]) -> list[pb.ItemError]:
        return [
            pb.ItemError(index=at, field=f"{field}[{at}]", reason="INVALID_REQUEST", message="empty")
            for at, text in enumerate(texts)
            if not text
        ]


@pytest.fixture
def server() -> Iterator[tuple[Scripted, str]]:
    scripted = Scripted()
    server = grpc.server(ThreadPoolExecutor(4))
    openbook_pb2_grpc.add_OpenBookServicer_to_server(scripted, server)
    knowledge_base_pb2_grpc.add_KnowledgeBaseServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def scripted(server: tuple[Scripted, str]) -> Scripted:
    return server[0]


@pytest.fixture
def client(server: tuple[Scripted, str]) -> Iterator[Client]:
    with Client(server[1], timeout_seconds=5) as client:
        yield client


def test_results_are_plain_objects_with_the_documented_json(client: Client) -> None:
    [answered] = client.answer(["what?"], top_k=1)
    assert isinstance(answered, AnswerResult)
    place = {"passage_id": "d#0", "document_id": "d"}
    assert answered.to_json() == {
        "question": "what?",
        "answers": [{"text": "passage", "probability": 0.5, **place, "start": 4, "end": 11, "document_start": 0, "document_end": 0}],
        "hits": [{**place, "score": 1.5, "title": "", "source": "", "document_start": 0}],
        "no_answer_probability": 0.25,
        "passages_read": 1,
        "timings_ms": {
            stage: 3.0 if stage == "total" else 0.0 for stage in ("tokenise", "embed", "search", "read", "rank", "queue", "total")
        },
    }
    [searched] = client.search(["what?"])
    assert isinstance(searched, SearchResult)
    hit = searched.hits[0]
    assert (hit.dense_score, hit.window_score, hit.token_score, hit.lexical_score, hit.overlap_score) == (None, 0.5, 0.75, 0.0, None)


def test_labels_are_plain_objects_with_the_documented_json(client: Client, scripted: Scripted) -> None:
    one, bad = client.classify(["a", ""], classifier="answers", explain=True, filter={"kind": "odd"})
    assert isinstance(one, Classified)
    assert isinstance(bad, RequestRejected)
    assert bad.field == "texts[1]"
    told = one.to_json()
    assert told["labels"] == [
        {"label": "yes", "probability": 0.75, "alone": 0.5, "model": 0.5, "knn": 1.0},
        {"label": "no", "probability": 0.25},
    ]
    assert told["neighbours"] == [
        {"label": "yes", "passage_id": "d#0", "document_id": "d", "score": 0.75, "title": "", "source": "", "document_start": 0}
    ]
    assert (told["text"], told["passages"], told["evidence"], told["timings_ms"]["total"]) == ("a", 1, [], 3.0)
    [request] = scripted.requests
    assert isinstance(request, pb.ClassifyRequest)
    assert (request.classifier, request.filter.all.filters[0].equals.key) == ("answers", "kind")


async def test_who_wants_the_same_bytes_in_any_batch_says_so_in_every_message(
    client: Client, scripted: Scripted, server: tuple[Scripted, str]
) -> None:
    client.embed(["a"] * (TEXTS_A_MESSAGE + 1), batch_invariant=True)
    client.search(["a"], batch_invariant=True)
    client.answer(["a"], batch_invariant=True)
    client.classify(["a"], batch_invariant=True)
    async with AsyncClient(server[1], timeout_seconds=5) as other:
        await other.embed(["a"], batch_invariant=True)
    options = ["--batch-invariant", "--server", server[1]]
    for command, arguments in (("embed", ["a"]), ("search", ["a"]), ("ask", ["a"]), ("classify", ["a"])):
        assert await asyncio.to_thread(cli.main, [command, *arguments, *options]) == 0
    assert len(scripted.requests) == 10
    assert all(request.batch_invariant for request in scripted.requests)  # type: ignore[attr-defined]
    client.embed(["a"])
    assert await asyncio.to_thread(cli.main, ["ask", "a", *options[1:]]) == 0
    assert not any(request.batch_invariant for request in scripted.requests[10:])  # type: ignore[attr-defined]


def test_evidence_travels_with_its_claim(client: Client, scripted: Scripted) -> None:
    claims = [str(number) for number in range(TEXTS_A_MESSAGE + 2)]
    client.classify(claims, evidence=[[f"of {claim}", "more"] for claim in claims])
    sent = [(text, list(one.passages)) for request in scripted.requests for text, one in zip(request.texts, request.evidence, strict=True)]  # type: ignore[attr-defined]
    assert sent == [(claim, [f"of {claim}", "more"]) for claim in claims]


def test_a_text_comes_in_pieces_and_is_asked_for_again_only_before_the_first(client: Client, scripted: Scripted) -> None:
    scripted.script = [failure(grpc.StatusCode.UNAVAILABLE, "starting", ErrorInfo(reason="NOT_SERVING"), come_back(1))]
    pieces = list(client.generate("prompt", stop=["three"], seed=7, mode="none"))
    assert [(piece.text, piece.tokens) for piece in pieces] == [("one", 1), (" two", 2)]
    assert pieces[0].ending is None
    assert pieces[1].ending is not None
    told = pieces[1].ending.to_json()
    assert (told["text"], told["finish"], told["tokens"], told["seed"], told["hits"]) == ("one two", "stop", 2, 7, [])
    sent = scripted.requests[-1]
    assert isinstance(sent, pb.GenerateRequest)
    assert (list(sent.stop), sent.seed, sent.mode) == (["three"], 7, pb.SEARCH_MODE_NONE)
    asked = len(scripted.requests)
    with pytest.raises(ServerUnavailable, match=r"no server at|gone"):
        list(client.generate("broken"))
    assert len(scripted.requests) == asked + 1


def test_a_last_try_that_runs_out_of_time_does_not_hide_why_those_before_failed(client: Client, scripted: Scripted) -> None:
    away = failure(
        grpc.StatusCode.UNAVAILABLE, "Elasticsearch cannot be reached", ErrorInfo(reason="KNOWLEDGE_BASE_UNAVAILABLE"), come_back(1)
    )
    scripted.script = [away, failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")]
    with pytest.raises(ServerUnavailable, match=r"^Elasticsearch cannot be reached; tried again, and no answer came within the \d+ s$"):
        client.search(["q"])
    scripted.script = [failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")]
    with pytest.raises(DeadlineExceeded, match="allow more time"):
        client.search(["q"])


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_the_command_line_shows_what_a_generator_wrote_as_the_passage_has_it(
    server: tuple[Scripted, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, on_a_terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_a_terminal, raising=False)
    parser = argparse.ArgumentParser()
    command_generate.add_arguments(parser)
    assert command_generate.run(parser.parse_args(["capitals", "--server", server[1]])) == 0
    out, err = capsys.readouterr()
    assert out == ("one two\nas it stands in the passage: One Two\n" if on_a_terminal else "One Two\n")
    assert "2 tokens, stop, seed 7" in err


def test_long_lists_travel_as_several_messages_and_come_back_in_order(client: Client, scripted: Scripted) -> None:
    texts = ["x" * n for n in range(1, TEXTS_A_MESSAGE * 2 + 4)]
    assert client.embed(texts)[:, 0].tolist() == [len(text) for text in texts]
    assert [len(request.texts) for request in scripted.requests] == [TEXTS_A_MESSAGE, TEXTS_A_MESSAGE, 3]  # type: ignore[attr-defined]


def test_a_bad_question_among_good_ones_takes_its_own_place_in_the_result(client: Client) -> None:
    first, second, third = client.answer(["a", "", "b"])
    assert isinstance(first, AnswerResult)
    assert isinstance(third, AnswerResult)
    assert isinstance(second, RequestRejected)
    assert (second.field, str(second)) == ("questions[1]", "questions[1]: empty")


def test_a_bad_text_is_named_by_its_place_in_the_caller_s_list(client: Client) -> None:
    texts = ["x"] * 70
    with pytest.raises(RequestRejected) as refused:
        client.embed([*texts[:35], "", *texts[36:]])
    assert (refused.value.field, str(refused.value)) == ("texts[35]", "texts[35]: empty")
    answers = client.answer([*texts[:66], "", *texts[67:]])
    [bad] = [result for result in answers if isinstance(result, RequestRejected)]
    assert answers.index(bad) == 66
    assert bad.field == "questions[66]"


def test_what_refuses_a_whole_later_message_is_named_by_its_place(client: Client, scripted: Scripted) -> None:
    violation = BadRequest.FieldViolation(field="texts[0]", description="9 tokens exceed the limit")
    refusal = failure(grpc.StatusCode.INVALID_ARGUMENT, "texts[0]: 9 tokens exceed the limit", BadRequest(field_violations=[violation]))
    scripted.script = [lambda context: None, refusal]
    with pytest.raises(RequestRejected, match=r"^texts\[32\]: 9 tokens exceed the limit$"):
        client.embed(["x"] * 33)


async def test_an_id_that_is_refused_is_named_by_its_place_among_all_that_are_deleted(server: tuple[Scripted, str]) -> None:
    ids = [*map(str, range(40)), "", "last"]
    with Client(server[1], timeout_seconds=5) as client:
        deleted = client.delete(ids)
    async with AsyncClient(server[1], timeout_seconds=5) as asynchronous:
        assert await asynchronous.delete(ids) == deleted
    assert [one.id for one in deleted] == ids
    assert {at: one.problem for at, one in enumerate(deleted) if one.problem} == {40: "ids[40]: empty"}


BOTH = [False, True]
METHODS = [("embed", "texts"), ("search", "questions"), ("answer", "questions"), ("classify", "texts"), ("delete", "ids")]


def ask_for(address: str, method: str, texts: list[str], *, asynchronous: bool, **options: Any) -> list[Any]:
    """What a client returns; it has a method for a list of texts."""

    async def ask() -> list[Any]:
        async with AsyncClient(address, timeout_seconds=5) as client:
            return list(await getattr(client, method)(texts, **options))

    if asynchronous:
        return asyncio.run(ask())
    with Client(address, timeout_seconds=5) as client:
        return list(getattr(client, method)(texts, **options))


def told(result: Any) -> str:
    """The text that a result is of, as `Scripted` has it."""
    if isinstance(result, np.ndarray):
        return "x" * int(result[0])
    return str(next(getattr(result, name) for name in ("question", "text", "id") if hasattr(result, name)))


@pytest.mark.parametrize("asynchronous", BOTH)
@pytest.mark.parametrize(("method", "field"), METHODS)
@pytest.mark.parametrize("limit", ["max_texts", "max_reply_texts"])
def test_a_list_travels_in_messages_that_the_server_takes(
    server: tuple[Scripted, str], method: str, field: str, limit: str, asynchronous: bool
) -> None:
    scripted, address = server
    setattr(scripted, limit, 5)
    texts = ["x" * length for length in range(1, 101)]
    assert [told(result) for result in ask_for(address, method, texts, asynchronous=asynchronous)] == texts
    sent = [list(getattr(request, field)) for request in scripted.requests]
    assert {len(listed) for listed in sent} == {4}
    assert sorted(text for listed in sent for text in listed) == texts


@pytest.mark.parametrize("asynchronous", BOTH)
def test_evidence_and_errors_keep_their_places_in_smaller_messages(server: tuple[Scripted, str], asynchronous: bool) -> None:
    scripted, address = server
    scripted.max_texts = 5
    claims = ["" if number == 35 else str(number) for number in range(70)]
    results = ask_for(address, "classify", claims, asynchronous=asynchronous, evidence=[[f"of {claim}"] for claim in claims])
    assert {at: str(result) for at, result in enumerate(results) if isinstance(result, RequestRejected)} == {35: "texts[35]: empty"}
    sent: list[Any] = scripted.requests
    assert all(list(one.passages) == [f"of {text}"] for request in sent for text, one in zip(request.texts, request.evidence, strict=True))


def test_what_was_too_many_for_a_server_is_remembered(client: Client, scripted: Scripted) -> None:
    scripted.max_texts = 8
    texts = [str(number) for number in range(10_000)]
    assert [told(result) for result in client.search(texts)] == texts
    assert scripted.refused < 25  # of 1,250 messages; now and then more is tried
    scripted.refused = 0
    client.search(texts[:100])
    client.search(texts[100:200])
    assert scripted.refused <= 1


def test_a_server_that_takes_more_again_is_sent_more(client: Client, scripted: Scripted) -> None:
    scripted.max_texts = 1
    client.search(["a"] * 40)
    scripted.max_texts = 256
    client.search(["a"] * 5_000)
    assert len(scripted.requests[-2].questions) == TEXTS_A_MESSAGE  # type: ignore[attr-defined]


@pytest.mark.parametrize("asynchronous", BOTH)
def test_a_question_whose_reply_alone_is_too_large_takes_its_own_place(server: tuple[Scripted, str], asynchronous: bool) -> None:
    scripted, address = server
    scripted.long = {"long"}
    questions = [*map(str, range(50)), "long", *map(str, range(50, 70))]
    results = ask_for(address, "answer", questions, asynchronous=asynchronous)
    assert [told(result) for result in results if isinstance(result, AnswerResult)] == [one for one in questions if one != "long"]
    refused = results[50]
    assert isinstance(refused, RequestRejected)
    assert (refused.field, refused.reason) == ("questions[50]", "MESSAGE_TOO_LARGE")
    assert (
        "too large for one message (request: the reply has 9 bytes, the limit is 8; ask for less); a server started with a larger"
        in str(refused)
    )
    with pytest.raises(RequestRejected, match=r"^questions\[0\]: too large"):
        ask_for(address, "answer", ["long"], asynchronous=asynchronous)


@pytest.mark.parametrize("asynchronous", BOTH)
def test_a_bad_text_that_is_alone_in_its_message_takes_its_own_place_too(server: tuple[Scripted, str], asynchronous: bool) -> None:
    results = ask_for(server[1], "answer", ["x"] * TEXTS_A_MESSAGE + [""], asynchronous=asynchronous)
    assert [at for at, result in enumerate(results) if isinstance(result, RequestRejected)] == [TEXTS_A_MESSAGE]
    assert str(results[-1]) == "questions[32]: empty"


def test_what_a_smaller_message_would_be_refused_for_too_is_told_at_once(client: Client, scripted: Scripted) -> None:
    violation = BadRequest.FieldViolation(field="questions", description="this bundle has no reader")
    details = ErrorInfo(reason="INVALID_REQUEST"), BadRequest(field_violations=[violation])
    scripted.script = [failure(grpc.StatusCode.INVALID_ARGUMENT, "questions: this bundle has no reader", *details)]
    with pytest.raises(RequestRejected, match="^questions: this bundle has no reader$"):
        client.answer(["a"] * 40)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("asynchronous", BOTH)
def test_of_texts_that_are_embedded_one_by_one_bad_ones_take_their_own_places(server: tuple[Scripted, str], asynchronous: bool) -> None:
    texts = ["xx"] * 35 + [""] + ["xx"] * 4
    results = ask_for(server[1], "embed_each", texts, asynchronous=asynchronous)
    assert {at: str(result) for at, result in enumerate(results) if isinstance(result, RequestRejected)} == {35: "texts[35]: empty"}
    assert [told(result) for result in results if isinstance(result, np.ndarray)] == ["xx"] * 39


@pytest.mark.parametrize("limit", ["max_texts", "max_reply_texts"])
def test_commands_send_files_in_messages_that_the_server_takes(
    server: tuple[Scripted, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    setattr(server[0], limit, 5)
    rows = [{"id": str(number), "text": "x" if number != 20 else "", "evidence": "e"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in ("ask", "classify", "embed"):
        out = tmp_path / f"{command}.jsonl"
        assert cli.main([command, "--file", str(tmp_path / "rows.jsonl"), "--out", str(out), "--server", server[1]]) == 3
        done = [row for row in map(json.loads, out.read_text().splitlines()) if "error" not in row]
        assert [row["id"] for row in done] == [row["id"] for row in rows if row["text"]]
        told, total = capsys.readouterr().err.splitlines()
        assert told.startswith(f"openbook {command}: {tmp_path / 'rows.jsonl'} line 21 (id 20): ")
        assert (told.endswith("empty"), total.startswith("39 of 40 ")) == (True, True)
    assert cli.main(["delete", *(row["id"] for row in rows), "--server", server[1]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40


def test_ids_and_documents_that_are_all_refused_end_a_command_as_one_that_did_nothing(server: tuple[Scripted, str], tmp_path: Path) -> None:
    assert cli.main(["delete", "", "--server", server[1]]) == 1
    assert cli.main(["delete", "", "a", "--server", server[1]]) == 3
    for number, (rows, status) in enumerate(((["{"], 1), (["{", '{"id": "a", "text": "x"}'], 3))):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
        assert cli.main(["upsert", str(tmp_path / f"{number}.jsonl"), "--server", server[1]]) == status


def test_json_loses_nothing_where_standard_output_lacks_a_character(server: tuple[Scripted, str], tmp_path: Path) -> None:
    text = "Straße → 🌍"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": text, "text": text}))
    ways = [
        *([command, text, "--json"] for command in ("ask", "search", "classify")),
        *([command, "--file", str(tmp_path / "rows.jsonl")] for command in ("ask", "classify")),
    ]
    for way in ways:
        command = [sys.executable, "-m", "openbook.cli", *way, "--server", server[1]]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert text in json.loads(done.stdout.decode("ascii")).values()
        plain = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        assert text.encode() in plain.stdout


def test_a_server_that_takes_few_documents_a_message_gets_all_of_them(client: Client, scripted: Scripted) -> None:
    scripted.max_texts = 5
    documents = [Document(id=str(number), text="x") for number in range(100)]
    assert [(one.id, one.outcome) for one in client.upsert(documents)] == [(one.id, "created") for one in documents]
    assert scripted.refused == 3


UNSENDABLE = [
    Document(id="cut", text="half a pair \ud800"),
    Document(id="large", text="x" * MAX_MESSAGE_BYTES),
    Document(id="larger", text="x" * 5_000_000),  # than gRPC takes
    Document(id="typed", text="x", metadata={"year": 1815}),  # type: ignore[dict-item]
    Document(id="\ud800", text="x"),
    Document(id=7, text="x"),  # type: ignore[arg-type]
]


def among_good_ones(document: Document) -> list[Document]:
    others = [Document(id=id_, text="x") for id_ in (*map(str, range(41)), "")]
    return [others[0], document, *others[1:]]


def check_that_one_failed(written: list[Written], document: Document, sent: list[Any]) -> None:
    assert [one.id for one in written] == [one.id for one in among_good_ones(document)]
    failed = {at: one.problem for at, one in enumerate(written) if one.outcome == "failed"}
    assert failed.keys() == {1, 42}
    assert failed[1].startswith("documents[1]")
    assert failed[42] == "documents[42]: empty"
    assert [one.id for request in sent for one in request.documents] == [one.id for one in written if one is not written[1]]


@pytest.mark.parametrize("document", UNSENDABLE, ids=["text", "large", "larger", "metadata", "id", "number"])
def test_a_document_that_cannot_be_sent_fails_alone_in_its_place(client: Client, scripted: Scripted, document: Document) -> None:
    check_that_one_failed(list(client.upsert(among_good_ones(document))), document, scripted.requests)


@pytest.mark.parametrize("document", UNSENDABLE, ids=["text", "large", "larger", "metadata", "id", "number"])
async def test_a_document_that_cannot_be_sent_fails_alone_in_the_async_client_too(server: tuple[Scripted, str], document: Document) -> None:
    async with AsyncClient(server[1], timeout_seconds=5) as client:
        written = [one async for one in client.upsert(among_good_ones(document))]
    check_that_one_failed(written, document, server[0].requests)


def test_a_server_that_takes_small_messages_gets_documents_in_smaller_ones(client: Client, scripted: Scripted) -> None:
    documents = [Document(id=str(number), text="x" * 300) for number in range(7)]
    assert [(one.id, one.outcome) for one in client.upsert(documents)] == [(one.id, "created") for one in documents]
    assert [len(request.documents) for request in scripted.requests] == [3, 2, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (Document(id=7, text="x"), "documents[0].id: 7 is no text; give a string"),  # type: ignore[arg-type]
        (Document(id="a", text="x", metadata={"a": 5}), "documents[0].metadata['a']: 5 is no text; give a string"),  # type: ignore[dict-item]
        (Document(id="a", text="x", metadata={1: "x"}), r"documents[0].metadata: 1 is no text; give a string"),  # type: ignore[dict-item]
        (Document(id="a", text="x", metadata=5), r"documents[0].metadata: 5 is no mapping; give {key: text}"),  # type: ignore[arg-type]
        (Document(id="a", text="x", metadata={"k": "\ud800"}), r"documents[0].metadata['k']: text that cannot be sent as UTF-8"),
        (Document(id="a", text="x", source=Path("f")), r"documents[0].source: PosixPath('f') is no text; give a string"),  # type: ignore[arg-type]
    ],
)
def test_what_of_a_document_cannot_be_sent_is_named_with_its_value(client: Client, document: Document, problem: str) -> None:
    [written] = client.upsert([document])
    assert written.problem.startswith(problem)


SLOW = "not stored within 5 s; allow more time (--timeout, timeout_seconds)"
LETTERS = [Document(id=id_, text="x") for id_ in "abcdefg"]


def test_a_document_that_takes_too_long_fails_alone(server: tuple[Scripted, str]) -> None:
    server[0].slow = set("abfg")  # no three in a row

    async def asynchronous() -> list[Written]:
        async with AsyncClient(server[1], timeout_seconds=5) as client:
            return [one async for one in client.upsert(LETTERS)]

    with Client(server[1], timeout_seconds=5) as client:
        written = list(client.upsert(LETTERS))
    assert asyncio.run(asynchronous()) == written
    assert [one.id for one in written] == list("abcdefg")
    assert {at: one.problem for at, one in enumerate(written) if one.problem} == {at: f"documents[{at}]: {SLOW}" for at in (0, 1, 5, 6)}


def test_a_server_that_hangs_costs_the_time_of_a_few_documents_and_not_of_all(client: Client, scripted: Scripted) -> None:
    documents = [Document(id=str(number), text="x") for number in range(200)]
    scripted.slow = {document.id for document in documents}
    upserting = client.upsert(documents)
    assert [next(upserting).outcome, next(upserting).outcome] == ["failed", "failed"]
    with pytest.raises(DeadlineExceeded, match="within 5 s"):
        next(upserting)
    assert [len(request.documents) for request in scripted.requests] == [32, 16, 8, 4, 2, 1, 1, 2, 1]  # type: ignore[attr-defined]


def test_a_server_that_takes_no_writes_ends_an_upsert(client: Client, scripted: Scripted) -> None:
    scripted.script = [failure(grpc.StatusCode.FAILED_PRECONDITION, "read-only", ErrorInfo(reason="READ_ONLY"))]
    with pytest.raises(RequestRejected, match="read-only"):
        list(client.upsert([Document(id="a", text="x"), Document(id="b", text="x")]))
    assert len(scripted.requests) == 1


def test_the_command_line_names_the_document_that_could_not_be_sent_and_stores_the_others(
    server: tuple[Scripted, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f'{{"id": "{id_}", "text": "{text}"}}\n' for id_, text in (("a", "x"), ("large", "x" * MAX_MESSAGE_BYTES), ("b", "x"))]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    assert cli.main(["upsert", str(tmp_path / "rows.jsonl"), "--server", server[1]]) == 3
    out, err = capsys.readouterr()
    assert out == "2 created, 1 failed\n"
    assert "openbook upsert: 'large': documents[1]: too large" in err


def test_the_command_line_says_that_no_document_was_found_only_where_none_was(
    server: tuple[Scripted, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    for content, said in (('{"id": "a", "text": "x"}\n', ""), ("\n", "no document was found\n")):
        rows.write_text(content)
        server[0].script = [failure(grpc.StatusCode.FAILED_PRECONDITION, "read-only", ErrorInfo(reason="READ_ONLY"))]
        assert cli.main(["upsert", str(rows), "--server", server[1]]) == 1
        assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    "fault",
    [
        failure(grpc.StatusCode.UNAVAILABLE, "starting", ErrorInfo(reason="NOT_SERVING"), come_back(1)),
        failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", ErrorInfo(reason="OVERLOADED"), come_back(1)),
        failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "gRPC's own: too many"),
        failure(grpc.StatusCode.UNAVAILABLE, "connection lost"),
    ],
)
def test_a_passing_fault_is_retried(client: Client, scripted: Scripted, fault: Callable[[grpc.ServicerContext], None]) -> None:
    scripted.script = [fault, fault]
    assert client.embed(["abc"])[0, 0] == 3
    assert len(scripted.requests) == 3


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            failure(
                grpc.StatusCode.INVALID_ARGUMENT,
                "top_k: 0 is outside",
                ErrorInfo(reason="INVALID_REQUEST"),
                BadRequest(field_violations=[BadRequest.FieldViolation(field="top_k", description="0 is outside 1 to 100")]),
            ),
            RequestRejected,
            "top_k: 0 is outside 1 to 100",
        ),
        (failure(grpc.StatusCode.INTERNAL, "broken"), ServerFailed, "INTERNAL broken"),
        (failure(grpc.StatusCode.UNIMPLEMENTED, "no such method"), RequestRejected, "does not serve openbook.v1"),
        (failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", ErrorInfo(reason="OVERLOADED"), come_back(60_000)), ServerOverloaded, "busy"),
        (failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max"), RequestRejected, "larger than max"),
    ],
)
def test_a_lasting_fault_is_told_at_once_by_its_class(
    client: Client, scripted: Scripted, fault: Callable[[grpc.ServicerContext], None], kind: type[ClientError], message: str
) -> None:
    scripted.script = [fault]
    with pytest.raises(kind, match=message):
        client.embed(["a"])
    assert len(scripted.requests) == 1


def test_a_server_that_answered_before_is_waited_for(client: Client, scripted: Scripted) -> None:
    """It starts again, more likely than not; one that never answered is told about after three tries."""
    client.embed(["a"])
    scripted.script = [failure(grpc.StatusCode.UNAVAILABLE, "connection lost")] * 4
    assert client.embed(["abc"])[0, 0] == 3
    assert len(scripted.requests) == 6


def test_a_change_of_generations_is_made_again_only_where_it_was_refused(server: tuple[Scripted, str]) -> None:
    """Rolling back twice undoes it: a reply that was lost must not be asked for again."""
    scripted, address = server
    lost = failure(grpc.StatusCode.UNAVAILABLE, "the engine ended", ErrorInfo(reason="NOT_SERVING"), come_back(1))
    with Client(address, timeout_seconds=5) as client:
        client.embed(["a"])
        for change in (client.roll_back_generation, client.publish_generation, lambda: client.remove_generation("1-a")):
            scripted.requests, scripted.script = [], [lost]
            with pytest.raises(ServerUnavailable):
                change()
            assert len(scripted.requests) == 1
        scripted.requests, scripted.script = (
            [],
            [failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", ErrorInfo(reason="OVERLOADED"), come_back(1))],
        )
        assert client.roll_back_generation() == "1-a"
        assert len(scripted.requests) == 2


def test_retries_end_with_the_deadline(server: tuple[Scripted, str]) -> None:
    scripted, address = server
    scripted.script = [failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", ErrorInfo(reason="OVERLOADED"), come_back(20))] * 1000
    with Client(address, timeout_seconds=0.3) as client, pytest.raises(ServerOverloaded):
        client.embed(["a"])
    assert 1 < len(scripted.requests) < 30


def test_a_server_too_slow_for_the_deadline_is_told_with_the_time_allowed(server: tuple[Scripted, str]) -> None:
    scripted, address = server
    import threading

    release = threading.Event()
    scripted.script = [lambda context: release.wait(30) and None]
    with Client(address, timeout_seconds=0.2) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        client.embed(["a"])
    release.set()


def test_no_server_is_told_quickly_with_the_way_out() -> None:
    with Client("127.0.0.1:9", timeout_seconds=30) as client, pytest.raises(ServerUnavailable, match="openbook serve"):
        client.describe()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.embed("one string"), "texts"),
        (lambda client: client.embed(["fine", "\ud800"]), r"texts\[1\]"),
        (lambda client: client.answer([None]), r"questions\[0\]"),
        (lambda client: client.search(["a"], top_k=2**40), "top_k"),
        (lambda client: client.search(["a"], top_k="5"), "^top_k: '5' is not a whole number"),
        (lambda client: client.search(["a"], rerank=2.0), "^rerank: 2.0 is not a whole number"),
        (lambda client: client.search(["a"], filter=5), "^filter: 5 is not a mapping of keys to values, a list of such pairs, or a Filter"),
        (lambda client: client.search(["a"], filter="lang=en"), "^filter: 'lang=en' is not a mapping"),
        (lambda client: client.search(["a"], filter=["ab"]), "^filter: 'ab' is no pair of a key and a value"),
        (lambda client: client.search(["a"], filter={"lang": None}), "^filter: 'lang' is to be None, which no metadata are; give a text, "),
        (lambda client: client.search(["a"], filter={"year": {"at_least": 5}}), "^filter: 'year' is to be .* or a Filter"),
        (lambda client: client.search(["a"], filter={"year": [[5]]}), "^filter: 'year' is to be "),
        (
            lambda client: client.search(["a"], filter={"lang": []}),
            "^filter: 'lang' is to be one of no values; name one, or leave the key out",
        ),
        (lambda client: client.search(["a"], min_score="0.5"), "^min_score: '0.5' is not a number"),
        (lambda client: client.search(["a"], mode=["dense"]), "^mode: .* is not a string"),
        (lambda client: client.search(5), "^questions: int is no list of strings"),
        (lambda client: client.answer(["a"], read_all="no"), "^read_all: 'no' is not True or False"),
        (lambda client: client.embed(["a"], truncate="no"), "^truncate: 'no' is not True or False"),
        (lambda client: client.classify(["a"], evidence=5), "^evidence: 5 is not a list"),
        (lambda client: client.build_generation(Path("bundle")), r"^bundle: PosixPath\('bundle'\) is not a string"),
        (lambda client: client.build_generation("bundle", graph_dims="4"), "^graph_dims: '4' is not a whole number"),
        (lambda client: client.publish_generation(3), "^name: 3 is not a string"),
        (lambda client: client.remove_generation(None), "^name: None is not a string"),
        (lambda client: client.search(["a"], mode="psychic"), "mode"),
        (lambda client: client.search(["a"], filter={"\ud800": "x"}), r"^filter: text that cannot be sent as UTF-8"),
        (lambda client: client.answer(["a"], filter={"kind": "\ud800"}), r"^filter: text that cannot be sent as UTF-8"),
        (lambda client: client.search(["a"], filter={3: "x"}), r"^filter: 3 is no text; give a string"),
        (lambda client: client.classify(["a"], label_key="\ud800"), "^label_key: text that cannot be sent as UTF-8"),
        (lambda client: client.classify(["a"], max_labels=2**40), "max_labels"),
        (lambda client: list(client.generate("a", seed=-1)), "seed"),
        (lambda client: list(client.generate("a", stop="b")), "stop is one string"),
        (lambda client: list(client.generate("\ud800")), r"text\[0\]"),
        (lambda client: client.classify(["a", "b"], evidence=[["c"]]), "evidence: 1 entries for 2 texts"),
        (lambda client: client.classify(["a"], evidence=["c"]), r"evidence\[0\] is one string"),
        (lambda client: client.classify(["a"], evidence=[["\ud800"]]), r"evidence\[0\]\[0\]"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(client: Client, call: Callable[[Client], object], field: str) -> None:
    with pytest.raises(RequestRejected, match=field):
        call(client)


@pytest.mark.parametrize(
    ("conditions", "meant"),
    [
        ({"lang": "en", "year": 1815}, [("lang", ["en"]), ("year", ["1815"])]),
        ([("lang", "en"), ("lang", "de")], [("lang", ["en"]), ("lang", ["de"])]),
        ({"lang": ["en", "de"]}, [("lang", ["en", "de"])]),
        ([["year", (1815, 1816.5)]], [("year", ["1815", "1816.5"])]),
        ({"lang": {"en"}, "day": date(1815, 6, 18)}, [("lang", ["en"]), ("day", ["1815-06-18"])]),
        ({"signed": True}, [("signed", ["true", "True"])]),  # as either may have been stored
    ],
)
def test_a_filter_means_every_pair_and_one_of_a_list(
    client: Client, scripted: Scripted, conditions: Any, meant: list[tuple[str, list[str]]]
) -> None:
    client.search(["a"], filter=conditions)
    [request] = scripted.requests
    assert isinstance(request, pb.SearchRequest)
    parts = request.filter.all.filters
    said = [getattr(part, str(part.WhichOneof("condition"))) for part in parts]
    assert [(one.key, list(one.values) if isinstance(one, pb.Filter.OneOf) else [one.value]) for one in said] == meant


def test_every_condition_of_the_command_line_must_hold(server: tuple[Scripted, str]) -> None:
    for command in ("ask", "search", "classify", "generate"):
        assert cli.main([command, "a", "--filter", "lang=en", "--filter", "lang=de", "--filter", "year=1815", "--server", server[1]]) == 0
        sent = [(one.equals.key, one.equals.value) for one in server[0].requests[-1].filter.all.filters]  # type: ignore[attr-defined]
        assert sent == [("lang", "en"), ("lang", "de"), ("year", "1815")]
        assert cli.main([command, "a", "--server", server[1]]) == 0
        assert not server[0].requests[-1].HasField("filter")  # type: ignore[attr-defined]


def test_every_option_has_a_kind_and_numpy_s_numbers_are_numbers(client: Client, scripted: Scripted) -> None:
    for options in (messages.RankedSearchOptions, messages.AnswerOptions, messages.ClassifyOptions, messages.GenerateOptions):
        assert options.__annotations__.keys() <= messages._KINDS.keys()
    client.search(["a"], top_k=np.int64(7), min_score=np.float32(0.5))
    [request] = scripted.requests
    assert (request.top_k, request.min_score) == (7, 0.5)  # type: ignore[attr-defined]


def test_no_texts_give_no_vectors_and_no_call(client: Client, scripted: Scripted) -> None:
    assert len(client.embed([])) == 0
    assert client.answer([]) == []
    assert scripted.requests == []


async def test_the_async_client_does_the_same(server: tuple[Scripted, str]) -> None:
    scripted, address = server
    scripted.script = [failure(grpc.StatusCode.UNAVAILABLE, "starting", ErrorInfo(reason="NOT_SERVING"), come_back(1))]
    async with AsyncClient(address, timeout_seconds=5) as client:
        assert (await client.embed(["ab", "c"]))[:, 0].tolist() == [2, 1]
        first, second = await client.answer(["a", ""])
        assert isinstance(first, AnswerResult)
        assert isinstance(second, RequestRejected)
        assert isinstance((await client.search(["a"]))[0], SearchResult)
        with pytest.raises(RequestRejected, match=r"^texts\[35\]: empty$"):
            await client.embed(["x"] * 35 + [""])


async def test_of_a_long_list_few_messages_are_in_flight_and_a_failure_calls_off_the_rest() -> None:
    """A message's time runs from when it is sent: hundreds at once would be late by their own queue."""
    flying, most, begun = 0, 0, 0

    requests = [pb.EmbedRequest(texts=[str(number)] * 2) for number in range(200)]

    async def echo(request: pb.EmbedRequest, **settings: float) -> str:
        nonlocal flying, most, begun
        flying, begun = flying + 1, begun + 1
        most = max(most, flying)
        await asyncio.sleep(0)
        flying -= 1
        if request.texts[0] == "50":
            raise RequestRejected("no", field="texts[1]")
        return request.texts[0]

    async with AsyncClient("127.0.0.1:9") as client:
        assert await client._each(echo, requests[:40], lambda part, reply: [reply] * len(part)) == [str(n) for n in range(40) for _ in "ab"]
        assert most == 8
        begun = 0
        with pytest.raises(RequestRejected, match=r"^texts\[101\]: no$"):
            await client._each(echo, requests, lambda part, reply: [reply])
        assert begun < 100
