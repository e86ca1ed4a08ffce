"""Where gRPC begins and ends: bytes to parsed messages, deadlines from contexts, errors to statuses, requests to metrics.

The only place where an error becomes a gRPC status. While no service is set (starting, draining) every method answers
UNAVAILABLE with a time to come back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from openbook.v1 import openbook_pb2 as pb

from openbook_server.config import ServerConfig
from openbook_server.errors import InferenceFailed, NotServing, OpenBookError
from openbook_server.metrics import Metrics
from openbook_server.pipeline import Timings
from openbook_server.service import Service
from openbook_server.status import grpc_status
from openbook_server.wire import Parsed, parser

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["OpenBook"].full_name

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)
Method = Callable[[Parsed[Request], float, Timings], Awaitable[Reply]]
Context = grpc.aio.ServicerContext


class Frontend:
    """The methods of openbook.v1 as gRPC sees them."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self.service: Service | None = None
        self.refusal = "the server is starting"  # told to callers while there is no service

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Embed": self._method("Embed", pb.EmbedRequest, lambda service: service.embed),
            "Search": self._method("Search", pb.SearchRequest, lambda service: service.search),
            "Answer": self._method("Answer", pb.AnswerRequest, lambda service: service.answer),
            "Describe": self._method("Describe", pb.DescribeRequest, lambda service: service.describe),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _method(
        self, name: str, kind: type[Request], method_of: Callable[[Service], Method[Request, Reply]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(parsed: Parsed[Request], context: Context[Request, Reply]) -> Reply:
            timings, began = Timings(), time.perf_counter()
            status = grpc.StatusCode.CANCELLED  # what remains when the caller hangs up
            try:
                if self.service is None:
                    raise NotServing(f"{self.refusal}; try again, or another server", retry_after_seconds=1.0)
                if parsed.failure is not None:
                    raise parsed.failure
                reply = await method_of(self.service)(parsed, self._deadline(context), timings)
                status = grpc.StatusCode.OK
            except OpenBookError as error:
                status = error.status
                await _abort(context, error)
            except Exception as error:  # a defect of ours: logged whole, reported without internals
                log.exception("%s failed", name)
                status = grpc.StatusCode.INTERNAL
                await _abort(context, InferenceFailed(f"internal error: {type(error).__name__}"))
            finally:
                self._metrics.observe_request(name, status.name, time.perf_counter() - began, timings)
            return reply

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=parser(kind, self._config.max_message_bytes),
            response_serializer=lambda reply: reply.SerializeToString(),
        )

    def _deadline(self, context: Context[Request, Reply]) -> float:
        left = context.time_remaining()
        allowed = self._config.default_deadline_seconds if left is None else min(left, self._config.max_deadline_seconds)
        return time.monotonic() + allowed


async def _abort(context: Any, error: OpenBookError) -> NoReturn:
    """End the call with the error's status; grpc's type stubs do not know `abort_with_status` of the asyncio context."""
    await context.abort_with_status(grpc_status(error))
    raise AssertionError("abort_with_status raises")
