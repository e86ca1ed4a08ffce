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
from typing import TYPE_CHECKING, Any, Unpack

import grpc
import grpc.aio

from openbook import __version__, messages, results
from openbook.calls import AsyncCalling, Call, Calling, GenerationMethods, T
from openbook.errors import ClientError, RequestRejected
from openbook.messages import AnswerOptions, ClassifyOptions, GenerateOptions, RankedSearchOptions
from openbook.results import AnswerResult, Classified, Document, Piece, SearchResult, Written
from openbook.retrying import Attempts
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OPTIONS = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.primary_user_agent", f"openbook-python/{__version__}"),
    ("grpc.enable_retries", 0),  # retries are made here, where RetryInfo is understood
]


def default_address() -> str:
    """$OPENBOOK_SERVER, or localhost:50051."""
    return os.environ.get("OPENBOOK_SERVER", "localhost:50051")


class Client(GenerationMethods, Calling):
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
        return messages.vectors([self._call(self._stub.Embed, request) for request in messages.embed_requests(texts, truncate=truncate)])

    def search(self, questions: Sequence[str], **options: Unpack[RankedSearchOptions]) -> list[SearchResult | RequestRejected]:
        """The best passages for each question; `mode` is hybrid (default), dense or lexical."""
        found: list[SearchResult | RequestRejected] = []
        for request in messages.search_requests(questions, **options):
            found += messages.search_results(request, self._call(self._stub.Search, request))
        return found

    def answer(self, questions: Sequence[str], **options: Unpack[AnswerOptions]) -> list[AnswerResult | RequestRejected]:
        """Answers to each question from the `top_k` best passages; `mode` may also be none (no retrieval)."""
        found: list[AnswerResult | RequestRejected] = []
        for request in messages.answer_requests(questions, **options):
            found += messages.answer_results(request, self._call(self._stub.Answer, request))
        return found

    def classify(self, texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[Classified | RequestRejected]:
        """The labels of each text, most probable first; of a verifier the texts are claims."""
        found: list[Classified | RequestRejected] = []
        for request in messages.classify_requests(texts, **options):
            found += messages.classify_results(request, self._call(self._stub.Classify, request))
        return found

    def generate(self, text: str, **options: Unpack[GenerateOptions]) -> Iterator[Piece]:
        """What a model writes after a prompt, or of a question, piece by piece; the last one has an `ending`.

        Nothing is sent before the first piece is asked for, and nothing again once one has come.
        """
        request, attempts = messages.generate_request(text, **options), Attempts(self.address, self._timeout)
        begun = False
        while True:
            try:
                for reply in self._stub.Generate(request, timeout=attempts.seconds_left):
                    begun = True
                    yield results.piece(reply)
                return
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure, again=not begun)
            time.sleep(delay)

    def upsert(self, documents: Iterable[Document]) -> Iterator[Written]:
        """Store documents; yields what became of each, in order, as soon as it is durable and searchable.

        Nothing is sent before the first result is asked for.
        """
        for request in messages.upsert_requests(documents):
            yield from map(results.written, self._call(self._knowledge_base.Upsert, request).results)

    def delete(self, ids: Sequence[str]) -> list[Written]:
        """Remove documents for good."""
        replies = [self._call(self._knowledge_base.Delete, kb.DeleteRequest(ids=part)) for part in messages.parts(ids, "ids")]
        return [results.written(result) for reply in replies for result in reply.results]

    def describe(self) -> pb.DescribeResponse:
        """What the server serves, and within which limits."""
        reply: pb.DescribeResponse = self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    def _make(self, call: Call[T]) -> T:
        return call.result(self._call(getattr(self._knowledge_base, call.method), call.request))

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


class AsyncClient(GenerationMethods, AsyncCalling):
    """`Client` for asyncio; messages of one call are in flight together."""

    def __init__(self, address: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        self.address, self._timeout = address or default_address(), timeout_seconds
        self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        self._stub: Any = openbook_pb2_grpc.OpenBookStub(self._channel)
        self._knowledge_base: Any = knowledge_base_pb2_grpc.KnowledgeBaseStub(self._channel)

    async def embed(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """As `Client.embed`."""
        return messages.vectors(await self._calls(self._stub.Embed, messages.embed_requests(texts, truncate=truncate)))

    async def search(self, questions: Sequence[str], **options: Unpack[RankedSearchOptions]) -> list[SearchResult | RequestRejected]:
        """As `Client.search`."""
        requests = messages.search_requests(questions, **options)
        replies = await self._calls(self._stub.Search, requests)
        return [result for request, reply in zip(requests, replies, strict=True) for result in messages.search_results(request, reply)]

    async def answer(self, questions: Sequence[str], **options: Unpack[AnswerOptions]) -> list[AnswerResult | RequestRejected]:
        """As `Client.answer`."""
        requests = messages.answer_requests(questions, **options)
        replies = await self._calls(self._stub.Answer, requests)
        return [result for request, reply in zip(requests, replies, strict=True) for result in messages.answer_results(request, reply)]

    async def classify(self, texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[Classified | RequestRejected]:
        """As `Client.classify`."""
        requests = messages.classify_requests(texts, **options)
        replies = await self._calls(self._stub.Classify, requests)
        return [result for request, reply in zip(requests, replies, strict=True) for result in messages.classify_results(request, reply)]

    async def generate(self, text: str, **options: Unpack[GenerateOptions]) -> AsyncIterator[Piece]:
        """As `Client.generate`."""
        request, attempts = messages.generate_request(text, **options), Attempts(self.address, self._timeout)
        begun = False
        while True:
            try:
                async for reply in self._stub.Generate(request, timeout=attempts.seconds_left):
                    begun = True
                    yield results.piece(reply)
                return
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure, again=not begun)
            await asyncio.sleep(delay)

    async def upsert(self, documents: Iterable[Document]) -> AsyncIterator[Written]:
        """As `Client.upsert`."""
        for request in messages.upsert_requests(documents):
            reply: kb.UpsertResponse = await self._call(self._knowledge_base.Upsert, request)
            for result in reply.results:
                yield results.written(result)

    async def delete(self, ids: Sequence[str]) -> list[Written]:
        """As `Client.delete`."""
        replies = await self._calls(self._knowledge_base.Delete, [kb.DeleteRequest(ids=part) for part in messages.parts(ids, "ids")])
        return [results.written(result) for reply in replies for result in reply.results]

    async def describe(self) -> pb.DescribeResponse:
        """As `Client.describe`."""
        reply: pb.DescribeResponse = await self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    async def _make(self, call: Call[T]) -> T:
        return call.result(await self._call(getattr(self._knowledge_base, call.method), call.request))

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
