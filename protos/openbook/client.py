"""The Python client, sync and async: texts in, plain results out, with deadlines and retries built in.

A call is retried while the server is unavailable or overloaded and time is left: after the delay the server asked for,
or with exponential back-off and jitter. Long lists of texts travel as several messages. Where one of several texts is
bad, its place in the result holds a `RequestRejected` and the others are served; a single bad text raises it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from openbook import __version__, results
from openbook.errors import ClientError, RequestRejected
from openbook.results import AnswerResult, Document, SearchResult, Written
from openbook.retrying import Attempts
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb

MODES = {
    "hybrid": pb.SEARCH_MODE_HYBRID,
    "dense": pb.SEARCH_MODE_DENSE,
    "lexical": pb.SEARCH_MODE_LEXICAL,
    "none": pb.SEARCH_MODE_NONE,
}
TEXTS_A_MESSAGE = 32
_BYTES_A_MESSAGE = 4 * 1024 * 1024  # of documents; half of what a server takes by default
_OPTIONS = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.primary_user_agent", f"openbook-python/{__version__}"),
    ("grpc.enable_retries", 0),  # retries are made here, where RetryInfo is understood
]


def default_address() -> str:
    """$OPENBOOK_SERVER, or localhost:50051."""
    return os.environ.get("OPENBOOK_SERVER", "localhost:50051")


def _embed_requests(texts: Sequence[str], *, truncate: bool) -> list[pb.EmbedRequest]:
    return [pb.EmbedRequest(texts=part, truncate=truncate) for part in _parts(texts, "texts")]


def _search_requests(questions: Sequence[str], **options: Any) -> list[pb.SearchRequest]:
    return [pb.SearchRequest(questions=part, **_given(options)) for part in _parts(questions, "questions")]


def _answer_requests(questions: Sequence[str], **options: Any) -> list[pb.AnswerRequest]:
    return [pb.AnswerRequest(questions=part, **_given(options)) for part in _parts(questions, "questions")]


def _upsert_requests(documents: Iterable[Document]) -> Iterator[kb.UpsertRequest]:
    """Messages of bounded size; documents are taken from the iterable no sooner than they are sent."""
    request, size, ids = kb.UpsertRequest(), 0, set[str]()
    for at, document in enumerate(documents):
        try:
            message = document.to_message()
        except (UnicodeEncodeError, TypeError, ValueError) as error:
            raise RequestRejected(f"document {document.id!r} cannot be sent ({error})", field=f"documents[{at}]") from error
        full = len(ids) == TEXTS_A_MESSAGE or size + message.ByteSize() > _BYTES_A_MESSAGE
        if ids and (full or document.id in ids):  # of one id that comes twice, the last one stays
            yield request
            request, size, ids = kb.UpsertRequest(), 0, set()
        request.documents.append(message)
        size += message.ByteSize()
        ids.add(document.id)
    if request.documents:
        yield request


def _parts(texts: Sequence[str], field: str) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise RequestRejected(f"{field} is one string; give a list of strings", field=field)
    for at, text in enumerate(texts):
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise RequestRejected(f"{type(text).__name__} that cannot be sent as UTF-8 ({error})", field=f"{field}[{at}]") from error
    for at in range(0, len(texts), TEXTS_A_MESSAGE):
        yield list(texts[at : at + TEXTS_A_MESSAGE])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    if "mode" in given:
        if given["mode"] not in MODES:
            raise RequestRejected(f"{given['mode']!r} is none of {', '.join(MODES)}", field="mode")
        given["mode"] = MODES[given["mode"]]
    for name in ("top_k", "max_answers", "ef"):
        if name in given and not -(2**31) <= given[name] < 2**31:
            raise RequestRejected(f"{given[name]} is no 32-bit number", field=name)
    return given


def _vectors(replies: Sequence[pb.EmbedResponse]) -> NDArray[np.float32]:
    for reply in replies:
        for error in reply.errors:
            raise _item_error(error)
    if not replies:
        return np.empty((0, 0), np.float32)
    return np.concatenate([np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dim) for reply in replies]).astype(np.float32, copy=False)


def _item_error(error: pb.ItemError) -> RequestRejected:
    return RequestRejected(error.message, field=error.field, reason=error.reason)


def _search_results(request: pb.SearchRequest, reply: pb.SearchResponse) -> list[SearchResult | RequestRejected]:
    bad = {error.index: _item_error(error) for error in reply.errors}
    timings = results.timings_ms(reply.timings)
    return [
        bad.get(at)
        or SearchResult(
            question=question,
            hits=tuple(map(results.hit, result.hits)),
            timings_ms=timings,
            bundle_id=reply.provenance.bundle_id,
            generation=reply.provenance.generation,
        )
        for at, (question, result) in enumerate(zip(request.questions, reply.results, strict=True))
    ]


def _answer_results(request: pb.AnswerRequest, reply: pb.AnswerResponse) -> list[AnswerResult | RequestRejected]:
    bad = {error.index: _item_error(error) for error in reply.errors}
    timings = results.timings_ms(reply.timings)
    return [
        bad.get(at)
        or AnswerResult(
            question=question,
            answers=tuple(map(results.answer, result.answers)),
            hits=tuple(map(results.hit, result.hits)),
            no_answer_probability=result.no_answer_probability,
            timings_ms=timings,
            bundle_id=reply.provenance.bundle_id,
            generation=reply.provenance.generation,
        )
        for at, (question, result) in enumerate(zip(request.questions, reply.results, strict=True))
    ]


class Client:
    """A connection to one server; safe to share between threads. Use as a context manager, or call `close`."""

    def __init__(self, address: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        """`timeout_seconds` bounds every message, retries included."""
        self.address, self._timeout = address or default_address(), timeout_seconds
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        self._stub: Any = openbook_pb2_grpc.OpenBookStub(self._channel)
        self._knowledge_base: Any = knowledge_base_pb2_grpc.KnowledgeBaseStub(self._channel)

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """(texts, dim) unit vectors.

        Raises:
            RequestRejected: a text is empty or (without `truncate`) too long; its field names it.
            ClientError: see openbook.errors.
        """
        return _vectors([self._call(self._stub.Embed, request) for request in _embed_requests(texts, truncate=truncate)])

    def search(
        self, questions: Sequence[str], *, top_k: int | None = None, mode: str | None = None, ef: int | None = None
    ) -> list[SearchResult | RequestRejected]:
        """The best passages for each question; `mode` is hybrid (default), dense or lexical."""
        found: list[SearchResult | RequestRejected] = []
        for request in _search_requests(questions, top_k=top_k, mode=mode, ef=ef):
            found += _search_results(request, self._call(self._stub.Search, request))
        return found

    def answer(
        self,
        questions: Sequence[str],
        *,
        top_k: int | None = None,
        max_answers: int | None = None,
        mode: str | None = None,
        ef: int | None = None,
    ) -> list[AnswerResult | RequestRejected]:
        """Answers to each question from the `top_k` best passages; `mode` may also be none (no retrieval)."""
        found: list[AnswerResult | RequestRejected] = []
        for request in _answer_requests(questions, top_k=top_k, max_answers=max_answers, mode=mode, ef=ef):
            found += _answer_results(request, self._call(self._stub.Answer, request))
        return found

    def upsert(self, documents: Iterable[Document]) -> Iterator[Written]:
        """Store documents; yields what became of each, in order, as soon as it is durable and searchable.

        Nothing is sent before the first result is asked for.
        """
        for request in _upsert_requests(documents):
            yield from map(results.written, self._call(self._knowledge_base.Upsert, request).results)

    def delete(self, ids: Sequence[str]) -> list[Written]:
        """Remove documents for good."""
        replies = [self._call(self._knowledge_base.Delete, kb.DeleteRequest(ids=part)) for part in _parts(ids, "ids")]
        return [results.written(result) for reply in replies for result in reply.results]

    def describe(self) -> pb.DescribeResponse:
        """What the server serves, and within which limits."""
        reply: pb.DescribeResponse = self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        attempts = Attempts(self.address, self._timeout)
        while True:
            try:
                return method(request, timeout=attempts.seconds_left)
            except grpc.RpcError as failure:
                time.sleep(attempts.delay_after(failure))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio; messages of one call are in flight together."""

    def __init__(self, address: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        self.address, self._timeout = address or default_address(), timeout_seconds
        self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        self._stub: Any = openbook_pb2_grpc.OpenBookStub(self._channel)
        self._knowledge_base: Any = knowledge_base_pb2_grpc.KnowledgeBaseStub(self._channel)

    async def embed(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """As `Client.embed`."""
        return _vectors(await self._calls(self._stub.Embed, _embed_requests(texts, truncate=truncate)))

    async def search(
        self, questions: Sequence[str], *, top_k: int | None = None, mode: str | None = None, ef: int | None = None
    ) -> list[SearchResult | RequestRejected]:
        """As `Client.search`."""
        requests = _search_requests(questions, top_k=top_k, mode=mode, ef=ef)
        replies = await self._calls(self._stub.Search, requests)
        return [result for request, reply in zip(requests, replies, strict=True) for result in _search_results(request, reply)]

    async def answer(
        self,
        questions: Sequence[str],
        *,
        top_k: int | None = None,
        max_answers: int | None = None,
        mode: str | None = None,
        ef: int | None = None,
    ) -> list[AnswerResult | RequestRejected]:
        """As `Client.answer`."""
        requests = _answer_requests(questions, top_k=top_k, max_answers=max_answers, mode=mode, ef=ef)
        replies = await self._calls(self._stub.Answer, requests)
        return [result for request, reply in zip(requests, replies, strict=True) for result in _answer_results(request, reply)]

    async def upsert(self, documents: Iterable[Document]) -> AsyncIterator[Written]:
        """As `Client.upsert`."""
        for request in _upsert_requests(documents):
            reply: kb.UpsertResponse = await self._call(self._knowledge_base.Upsert, request)
            for result in reply.results:
                yield results.written(result)

    async def delete(self, ids: Sequence[str]) -> list[Written]:
        """As `Client.delete`."""
        replies = await self._calls(self._knowledge_base.Delete, [kb.DeleteRequest(ids=part) for part in _parts(ids, "ids")])
        return [results.written(result) for reply in replies for result in reply.results]

    async def describe(self) -> pb.DescribeResponse:
        """As `Client.describe`."""
        reply: pb.DescribeResponse = await self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    async def _calls(self, method: Callable[..., Awaitable[Any]], requests: Sequence[object]) -> list[Any]:
        return list(await asyncio.gather(*(self._call(method, request) for request in requests)))

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        attempts = Attempts(self.address, self._timeout)
        while True:
            try:
                return await method(request, timeout=attempts.seconds_left)
            except grpc.RpcError as failure:
                await asyncio.sleep(attempts.delay_after(failure))

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


__all__ = ["AsyncClient", "Client", "ClientError", "Document", "Written", "default_address"]
