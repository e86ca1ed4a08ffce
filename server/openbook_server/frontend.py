"""Where gRPC begins and ends: bytes to parsed messages and back, deadlines from contexts, errors to statuses, requests to metrics.

While no service is set (starting, draining) every method answers
UNAVAILABLE with a time to come back.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb

from openbook_server.call import Call
from openbook_server.config import ServerConfig
from openbook_server.errors import InferenceFailed, MessageTooLarge, NoKnowledgeBase, NotServing, OpenBookError, Overloaded
from openbook_server.gate import Gate
from openbook_server.generations_service import GenerationsService
from openbook_server.listening import REQUESTS_A_ROW, max_wire_bytes
from openbook_server.metrics import Metrics
from openbook_server.outages import Outages
from openbook_server.served import Served
from openbook_server.shedding import Shedding
from openbook_server.status import grpc_status
from openbook_server.wire import Parsed, parser
from openbook_server.work import Work

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["OpenBook"].full_name
KNOWLEDGE_SERVICE = kb.DESCRIPTOR.services_by_name["KnowledgeBase"].full_name

WAITING = ("Embed", "Search", "Answer", "Classify", "Generate")  # what waits for the models
_STEP = 0.1  # seconds by which the lengths of the queue differ that callers are told

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)
Method = Callable[[Parsed[Request], Work], Awaitable[Reply]]
StreamMethod = Callable[[Parsed[Request], Work], AsyncIterator[Reply]]


class Frontend:
    """The methods of openbook.v1 as gRPC sees them."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._limit, self._running = REQUESTS_A_ROW * config.max_queued, 0
        self.served: Served | None = None  # may be replaced at any time: requests that began go on with the one before
        self.generations: GenerationsService | None = None
        self.writes = Gate()  # every request that writes is inside
        self.refusal = "the server is starting"  # told to callers while nothing is served
        problem = "more calls come in than can be read; try again in 1 s, or another server"
        self._unread = grpc_status(Overloaded(problem, retry_after_seconds=1.0))
        self.shedding, self._outages = Shedding(), Outages()

    def handlers(self) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
        """The methods of both services, as `listening.listen` takes them."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Embed": self._unary("Embed", pb.EmbedRequest, lambda served: served.openbook.embed),
            "Search": self._unary("Search", pb.SearchRequest, lambda served: served.openbook.search),
            "Answer": self._unary("Answer", pb.AnswerRequest, lambda served: served.openbook.answer),
            "Classify": self._unary("Classify", pb.ClassifyRequest, lambda served: served.classification.classify),
            "Generate": self._replies("Generate", pb.GenerateRequest, lambda served: served.text_generation.generate),
            "Describe": self._unary("Describe", pb.DescribeRequest, lambda served: served.openbook.describe),
        }
        knowledge: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Upsert": self._unary("Upsert", kb.UpsertRequest, lambda served: served.knowledge.upsert, writes=True),
            "UpsertStream": self._stream("Upsert", kb.UpsertRequest, lambda served: served.knowledge.upsert),
            "Delete": self._unary("Delete", kb.DeleteRequest, lambda served: served.knowledge.delete, writes=True),
            "DeleteStream": self._stream("Delete", kb.DeleteRequest, lambda served: served.knowledge.delete),
            "Get": self._unary("Get", kb.GetRequest, lambda served: served.knowledge.get),
            "List": self._unary("List", kb.ListRequest, lambda served: served.knowledge.list),
            "Describe": self._unary("DescribeKnowledgeBase", kb.DescribeKnowledgeBaseRequest, lambda served: served.knowledge.describe),
            "Snapshot": self._unary("Snapshot", kb.SnapshotRequest, lambda served: served.knowledge.snapshot),
            "BuildGeneration": self._change("BuildGeneration", kb.BuildGenerationRequest, lambda generations: generations.build),
            "ListGenerations": self._change("ListGenerations", kb.ListGenerationsRequest, lambda generations: generations.list),
            "PublishGeneration": self._change("PublishGeneration", kb.PublishGenerationRequest, lambda generations: generations.publish),
            "RollBackGeneration": self._change(
                "RollBackGeneration", kb.RollBackGenerationRequest, lambda generations: generations.roll_back
            ),
            "RemoveGeneration": self._change("RemoveGeneration", kb.RemoveGenerationRequest, lambda generations: generations.remove),
        }
        return (
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(KNOWLEDGE_SERVICE, knowledge),
        )

    def unread(self, path: str, left: float | None, lag: float) -> grpc.Status | None:
        """What a call gets at sight, see `RpcServer.refusal`; None of a method that everybody depends on, or that changes something."""
        name = path.removeprefix(f"/{SERVICE}/")
        if name not in WAITING or self.served is None:
            return None
        left, now, status = self._allowed(left), time.monotonic(), None
        if self.shedding.is_late(left, lag, now):
            status = self._unread
        elif wait := self.shedding.wait(max(0.0, left), now):
            self.shedding.count(now)
            status = _queued(math.ceil(wait / _STEP))
        if status is not None:
            self._metrics.count_request(name, status.code.name)
        return status

    def _unary(
        self, name: str, kind: type[Request], method_of: Callable[[Served], Method[Request, Reply]], *, writes: bool = False
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(parsed: Parsed[Request], context: Call) -> bytes:
            return await self._reply(name, method_of, parsed, context, writes=writes)

        return grpc.unary_unary_rpc_method_handler(handle, **self._serialisers(kind))

    def _change(
        self, name: str, kind: type[Request], method_of: Callable[[GenerationsService], Method[Request, Reply]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Of what is served, or a look at it: it is not served by the pair of the moment, for it may wait until that one serves nobody."""

        async def handle(parsed: Parsed[Request], context: Call) -> bytes:
            return await self._reply(name, lambda _: method_of(self._generations), parsed, context, writes=False, counted=False)

        return grpc.unary_unary_rpc_method_handler(handle, **self._serialisers(kind))

    def _replies(
        self, name: str, kind: type[Request], method_of: Callable[[Served], StreamMethod[Request, Reply]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """One request, several replies."""

        async def handle(parsed: Parsed[Request], context: Call) -> AsyncIterator[bytes]:
            async with self._serving(name, parsed, context, writes=False) as (served, work):
                async for reply in method_of(served)(parsed, work):
                    yield self._serialised(reply)

        return grpc.unary_stream_rpc_method_handler(handle, **self._serialisers(kind))

    def _stream(
        self, name: str, kind: type[Request], method_of: Callable[[Served], Method[Request, Reply]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Writes: a reply a request, in order; the next request is read when the reply to the one before is out."""

        async def handle(requests: AsyncIterator[Parsed[Request]], context: Call) -> AsyncIterator[bytes]:
            async for parsed in requests:
                yield await self._reply(name, method_of, parsed, context, writes=True)

        return grpc.stream_stream_rpc_method_handler(handle, **self._serialisers(kind))

    def _serialisers(self, kind: type[Message]) -> dict[str, Any]:
        return {
            "request_deserializer": parser(kind, self._config.max_message_bytes),
            "response_serializer": bytes,  # they are by then
        }

    def _serialised(self, reply: Message) -> bytes:
        """Where its size can still be an error of the request: gRPC would refuse a larger one without a word on how to go on."""
        data, limit = reply.SerializeToString(), max_wire_bytes(self._config)
        if len(data) > limit:
            way_out = "ask for fewer texts, documents or passages a request, or set omit_text where there is one"
            raise MessageTooLarge("request", f"the reply has {len(data)} bytes, the limit is {limit}; {way_out}")
        return data

    async def _reply(
        self,
        name: str,
        method_of: Callable[[Served], Method[Request, Reply]],
        parsed: Parsed[Request],
        context: Call,
        *,
        writes: bool,
        counted: bool = True,
    ) -> bytes:
        async with self._serving(name, parsed, context, writes=writes, counted=counted) as (served, work):
            return self._serialised(await method_of(served)(parsed, work))

    @asynccontextmanager
    async def _serving(
        self, name: str, parsed: Parsed[Request], context: Call, *, writes: bool, counted: bool = True
    ) -> AsyncIterator[tuple[Served, Work]]:
        """What a request is served by, and what it takes along; its failures become statuses, its end a metric.

        Args:
            counted: among the requests that what serves it must finish before it is closed.
        """
        work, began = Work(self._deadline(context)), time.perf_counter()
        status = grpc.StatusCode.CANCELLED  # what remains when the caller hangs up
        self._running += 1
        try:
            if self.served is None:
                raise self._not_serving()
            if self._running > self._limit:
                raise Overloaded(f"{self._limit} requests are being worked on; try again in 1 s", retry_after_seconds=1.0)
            if parsed.failure is not None:
                raise parsed.failure
            async with self.writes.passed(work.deadline) if writes else nullcontext():
                served = self.served  # as it is now: it may have been replaced while the gate was closed
                if served is None:
                    raise self._not_serving()
                with served.request() if counted else nullcontext():
                    yield served, work
            status = grpc.StatusCode.OK
            self._outages.worked(name, time.monotonic())
        except OpenBookError as error:
            status = error.status
            self._outages.failed(name, error, time.monotonic())
            if isinstance(error, Overloaded) and name in WAITING:
                self.shedding.count(time.monotonic())
            await context.abort_with_status(grpc_status(error))
        except Exception as error:  # a defect of ours: logged whole, reported without internals
            log.exception("%s failed", name)
            status = grpc.StatusCode.INTERNAL
            await context.abort_with_status(grpc_status(InferenceFailed(f"internal error: {type(error).__name__}")))
        finally:
            self._running -= 1
            self._metrics.observe_request(name, status.name, time.perf_counter() - began, work)

    @property
    def _generations(self) -> GenerationsService:
        if self.generations is None:
            raise NoKnowledgeBase
        return self.generations

    def _not_serving(self) -> NotServing:
        return NotServing(f"{self.refusal}; try again, or another server", retry_after_seconds=1.0)

    def _deadline(self, context: Call) -> float:
        return time.monotonic() + self._allowed(context.time_remaining())

    def _allowed(self, left: float | None) -> float:
        """Seconds that a call may take whose caller waits so long."""
        return self._config.default_deadline_seconds if left is None else min(left, self._config.max_deadline_seconds)


@functools.lru_cache(256)
def _queued(steps: int) -> grpc.Status:
    """For calls that are not read; made once for each of few lengths of the queue, for making it takes longer than all else about them."""
    wait = steps * _STEP
    problem = f"the queue needs about {wait:.1f} s, too long for the deadline or too much to hold; try again in {wait:.1f} s"
    return grpc_status(Overloaded(problem, retry_after_seconds=wait))
