"""The Python client, sync and async: texts in, plain results out, with deadlines and retries built in.

A call is retried while the server is unavailable or overloaded and time is left: after the delay the server asked for,
or with exponential back-off and jitter; a server that has never answered is given up after three tries. Calls that change generations
are retried only where the server refused to begin. Long lists of texts travel as several messages. Where one of several texts is
bad, its place in the result holds a `RequestRejected` and the others are served; a single bad text raises it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from openbook import __version__, messages, replies, results
from openbook.calls import AsyncCalling, Call, Calling, GenerationMethods, T
from openbook.errors import ClientError, DeadlineExceeded, RequestRejected
from openbook.messages import AnswerOptions, ClassifyOptions, GenerateOptions, RankedSearchOptions
from openbook.parts import Alone, Pace, Part, Parts, Read, parts_of
from openbook.results import AnswerResult, Classified, Document, Piece, SearchResult, Written
from openbook.retrying import Attempts
from openbook.upserting import Upsert
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
_AT_ONCE = 8  # messages of one call in flight, of an AsyncClient
R = TypeVar("R")


def default_address() -> str:
    """$OPENBOOK_SERVER, or localhost:50051."""
    return os.environ.get("OPENBOOK_SERVER", "localhost:50051")


class Client(GenerationMethods, Calling):
    """A connection to one server; safe to share between threads. Use as a context manager, or call `close`."""

    def __init__(self, address: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        """`timeout_seconds` bounds every message, retries included."""
        self.address, self._timeout = address or default_address(), timeout_seconds
        self._channel, self._answered = grpc.insecure_channel(self.address, options=_OPTIONS), False
        self._stub: Any = openbook_pb2_grpc.OpenBookStub(self._channel)
        self._knowledge_base: Any = knowledge_base_pb2_grpc.KnowledgeBaseStub(self._channel)
        self._paces: defaultdict[object, Pace] = defaultdict(Pace)  # by method

    def embed(self, texts: Sequence[str], *, truncate: bool = False, batch_invariant: bool = False) -> NDArray[np.float32]:
        """(texts, dim) unit vectors.

        Args:
            truncate: cut texts that are too long for the model instead of refusing them.
            batch_invariant: the same text gives the same bytes whatever shares its batch; slower where the model does not give that.

        Raises:
            RequestRejected: a text is empty or (without `truncate`) too long; its field names it.
            ClientError: see openbook.errors.
        """
        requests = messages.embed_requests(texts, truncate=truncate, batch_invariant=batch_invariant)
        return replies.stacked(list(self._each(self._stub.Embed, requests, replies.all_vectors, replies.raised)))

    def embed_each(
        self, texts: Sequence[str], *, truncate: bool = False, batch_invariant: bool = False
    ) -> list[NDArray[np.float32] | RequestRejected]:
        """As `embed`, a (dim,) vector for each text or the `RequestRejected` that says why it has none."""
        requests = messages.embed_requests(texts, truncate=truncate, batch_invariant=batch_invariant)
        return list(self._each(self._stub.Embed, requests, replies.vectors))

    def search(self, questions: Sequence[str], **options: Unpack[RankedSearchOptions]) -> list[SearchResult | RequestRejected]:
        """The best passages for each question; `mode` is hybrid (default), late_interaction, dense, lexical or random (a baseline)."""
        return replies.settled(self._each(self._stub.Search, messages.search_requests(questions, **options), replies.search_results))

    def answer(self, questions: Sequence[str], **options: Unpack[AnswerOptions]) -> list[AnswerResult | RequestRejected]:
        """Answers to each question from the `top_k` best passages; `mode` may also be none (no retrieval)."""
        return replies.settled(self._each(self._stub.Answer, messages.answer_requests(questions, **options), replies.answer_results))

    def classify(self, texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[Classified | RequestRejected]:
        """The labels of each text, most probable first; of a verifier the texts are claims."""
        return replies.settled(self._each(self._stub.Classify, messages.classify_requests(texts, **options), replies.classify_results))

    def generate(self, text: str, **options: Unpack[GenerateOptions]) -> Iterator[Piece]:
        """What a model writes after a prompt, or of a question, piece by piece; the last one has an `ending`.

        Nothing is sent before the first piece is asked for, and nothing again once one has come.
        """
        request, attempts = messages.generate_request(text, **options), Attempts(self.address, self._timeout, answered=self._answered)
        begun = False
        while True:
            try:
                for reply in self._stub.Generate(request, timeout=attempts.seconds_left):
                    begun = self._answered = True
                    yield results.piece(reply)
                return
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure, again=not begun)
            time.sleep(delay)

    def upsert(self, documents: Iterable[Document]) -> Iterator[Written]:
        """Store documents; yields what became of each, in order, as soon as it is durable and searchable.

        One that cannot be sent, is too large for the server, or is not stored within the time allowed has failed as one that the
        server refuses has; the others are stored. After three in a row that take too long the server is taken to hang, and
        `DeadlineExceeded` is raised.
        Nothing is sent before the first result is asked for.
        """
        method = self._knowledge_base.Upsert
        return self._send(method, Upsert(documents, self._timeout, self._paces[method]))

    def delete(self, ids: Sequence[str]) -> list[Written]:
        """Remove documents for good."""
        requests = messages.delete_requests(ids)
        return list(self._each(self._knowledge_base.Delete, requests, replies.written_results, replies.written_alone))

    def describe(self) -> pb.DescribeResponse:
        """What the server serves, and within which limits."""
        reply: pb.DescribeResponse = self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    def _make(self, call: Call[T]) -> T:
        return call.result(self._call(getattr(self._knowledge_base, call.method), call.request, repeatable=call.repeatable))

    def _each(
        self, method: Callable[..., Any], requests: Iterable[Message], read: Read[R], alone: Alone[Any] = replies.refused_alone
    ) -> Iterator[R]:
        """The result of each text of a list that requests share out; `read` and `alone` as of `Parts`."""
        return self._send(method, Parts(parts_of(requests), read, alone, self._paces[method]))

    def _send(self, method: Callable[..., Any], parts: Parts[R]) -> Iterator[R]:
        for part in parts:
            if not isinstance(part, Part):
                yield part
                continue
            try:
                reply = self._call(method, part.request)
            except (RequestRejected, DeadlineExceeded) as failure:
                yield from parts.failed(part, failure)
            else:
                yield from parts.answered(part, reply)

    def _call(self, method: Callable[..., Any], request: object, *, repeatable: bool = True) -> Any:
        attempts = Attempts(self.address, self._timeout, answered=self._answered, repeatable=repeatable)
        while True:
            try:
                reply = method(request, timeout=attempts.seconds_left)
                self._answered = True
                return reply
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure)
            time.sleep(delay)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient(GenerationMethods, AsyncCalling):
    """`Client` for asyncio; up to eight messages of one call are in flight together."""

    def __init__(self, address: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        self.address, self._timeout = address or default_address(), timeout_seconds
        self._channel, self._answered = grpc.aio.insecure_channel(self.address, options=_OPTIONS), False
        self._stub: Any = openbook_pb2_grpc.OpenBookStub(self._channel)
        self._knowledge_base: Any = knowledge_base_pb2_grpc.KnowledgeBaseStub(self._channel)
        self._paces: defaultdict[object, Pace] = defaultdict(Pace)  # by method

    async def embed(self, texts: Sequence[str], *, truncate: bool = False, batch_invariant: bool = False) -> NDArray[np.float32]:
        """As `Client.embed`."""
        requests = messages.embed_requests(texts, truncate=truncate, batch_invariant=batch_invariant)
        return replies.stacked(await self._each(self._stub.Embed, requests, replies.all_vectors, replies.raised))

    async def embed_each(
        self, texts: Sequence[str], *, truncate: bool = False, batch_invariant: bool = False
    ) -> list[NDArray[np.float32] | RequestRejected]:
        """As `Client.embed_each`."""
        requests = messages.embed_requests(texts, truncate=truncate, batch_invariant=batch_invariant)
        return await self._each(self._stub.Embed, requests, replies.vectors)

    async def search(self, questions: Sequence[str], **options: Unpack[RankedSearchOptions]) -> list[SearchResult | RequestRejected]:
        """As `Client.search`."""
        return replies.settled(await self._each(self._stub.Search, messages.search_requests(questions, **options), replies.search_results))

    async def answer(self, questions: Sequence[str], **options: Unpack[AnswerOptions]) -> list[AnswerResult | RequestRejected]:
        """As `Client.answer`."""
        return replies.settled(await self._each(self._stub.Answer, messages.answer_requests(questions, **options), replies.answer_results))

    async def classify(self, texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[Classified | RequestRejected]:
        """As `Client.classify`."""
        requests = messages.classify_requests(texts, **options)
        return replies.settled(await self._each(self._stub.Classify, requests, replies.classify_results))

    async def generate(self, text: str, **options: Unpack[GenerateOptions]) -> AsyncIterator[Piece]:
        """As `Client.generate`."""
        request, attempts = messages.generate_request(text, **options), Attempts(self.address, self._timeout, answered=self._answered)
        begun = False
        while True:
            try:
                async for reply in self._stub.Generate(request, timeout=attempts.seconds_left):
                    begun = self._answered = True
                    yield results.piece(reply)
                return
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure, again=not begun)
            await asyncio.sleep(delay)

    def upsert(self, documents: Iterable[Document]) -> AsyncIterator[Written]:
        """As `Client.upsert`."""
        method = self._knowledge_base.Upsert
        return self._send(method, Upsert(documents, self._timeout, self._paces[method]))

    async def delete(self, ids: Sequence[str]) -> list[Written]:
        """As `Client.delete`."""
        requests = messages.delete_requests(ids)
        return await self._each(self._knowledge_base.Delete, requests, replies.written_results, replies.written_alone)

    async def describe(self) -> pb.DescribeResponse:
        """As `Client.describe`."""
        reply: pb.DescribeResponse = await self._call(self._stub.Describe, pb.DescribeRequest())
        return reply

    async def _make(self, call: Call[T]) -> T:
        return call.result(await self._call(getattr(self._knowledge_base, call.method), call.request, repeatable=call.repeatable))

    async def _each(
        self, method: Callable[..., Awaitable[Any]], requests: Iterable[Message], read: Read[R], alone: Alone[Any] = replies.refused_alone
    ) -> list[R]:
        """As `Client._each`, a few requests at a time: more would wait for each other in the server, while their time runs."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(part: Part) -> list[R]:
            async with places:
                return [result async for result in self._send(method, Parts([part], read, alone, self._paces[method]))]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(part)) for part in parts_of(requests)]
        except BaseExceptionGroup as failures:  # of several, the first; the others were called off
            raise failures.exceptions[0] from None
        return [result for task in tasks for result in task.result()]

    async def _send(self, method: Callable[..., Awaitable[Any]], parts: Parts[R]) -> AsyncIterator[R]:
        for part in parts:
            if not isinstance(part, Part):
                yield part
                continue
            try:
                reply = await self._call(method, part.request)
            except (RequestRejected, DeadlineExceeded) as failure:
                results = parts.failed(part, failure)
            else:
                results = parts.answered(part, reply)
            for result in results:
                yield result

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object, *, repeatable: bool = True) -> Any:
        attempts = Attempts(self.address, self._timeout, answered=self._answered, repeatable=repeatable)
        while True:
            try:
                reply = await method(request, timeout=attempts.seconds_left)
                self._answered = True
                return reply
            except grpc.RpcError as failure:
                delay = attempts.delay_after(failure)
            await asyncio.sleep(delay)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


__all__ = ["AsyncClient", "Client", "ClientError", "Document", "Written", "default_address"]
