"""One call while it is served, whatever brought it here: the context that handlers get, and how they are run.

Handlers are `grpc.RpcMethodHandler`s of coroutines and asynchronous generators, as `grpc.aio` takes them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from openbook_server.errors import NotServing, Overloaded
from openbook_server.status import grpc_status

log = logging.getLogger(__name__)

NO_SUCH_METHOD = "this server has no such method"
NO_REQUEST = "this method takes one request, none came"

Metadata = Sequence[tuple[str, str | bytes]]

GRPCS_OWN = "/grpc."  # begin the paths of health and reflection: their streams end when their callers like, perhaps never
NEVER = 1e12  # seconds of time.time(): gRPC's core writes no deadline as a very late one
_COME_BACK = 1.0  # seconds after which a call that was one too many may
_KNOWN = 1_000  # paths that are remembered: whoever calls chooses them


def seconds_left(deadline: float) -> float | None:
    """Until a deadline of time.time(), negative when it has passed; None = there is none."""
    return None if deadline > NEVER else deadline - time.time()


def too_many(limit: int) -> grpc.Status:
    """For the calls beyond a limit; to be made once, for making it takes longer than all else about them."""
    return grpc_status(Overloaded(f"{limit} calls are being served; try again in {_COME_BACK:g} s", _COME_BACK))


@functools.cache
def cut_off() -> grpc.Status:
    """For the calls that a server which stops does not wait for any longer."""
    return grpc_status(NotServing("the server is shutting down; try again, or another server", _COME_BACK))


class _Ended(Exception):
    """The call has its status; whoever serves it need not go on."""


class Call(ABC):
    """The part of `grpc.aio.ServicerContext` that is used here; transports say how its messages travel."""

    def __init__(self, path: str, handler: Any, deadline: float, calls: set[Any]) -> None:
        """Args:
        handler: None where there is no such method; its functions are unions of all kinds to type checkers.
        deadline: of time.time(); beyond `NEVER` there is none.
        calls: this one is among them while it is served.
        """
        self.path, self.handler, self.deadline = path, handler, deadline
        self.task: asyncio.Task[None] | None = None
        self._calls = calls

    @abstractmethod
    async def write(self, reply: Any) -> None:
        """Send one of several replies, when the caller has room for it."""

    @abstractmethod
    def end(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
        """Send the status, after the only reply where there is one; nothing if it was sent before or nobody waits for it."""

    @abstractmethod
    def requests(self) -> AsyncIterator[Any]:
        """The caller's messages, of a method that takes several."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None = it has none."""
        left = seconds_left(self.deadline)
        return None if left is None else max(0.0, left)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status."""
        self.end(code, details, trailing_metadata)
        raise _Ended

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with a status that has more to say."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    @property
    def is_waited_for(self) -> bool:
        """Whether a server that stops lets it finish."""
        return not self.path.startswith(GRPCS_OWN)

    def parsed(self, message: bytes) -> Any:
        """What the handler gets for a message; bytes that are none end the call, whoever sent them is told."""
        try:
            return self.handler.request_deserializer(message)
        except DecodeError as error:
            self.end(grpc.StatusCode.INVALID_ARGUMENT, "the bytes are no message that this method takes")
            raise _Ended from error

    def serve(self, request: Any) -> None:
        """Run the handler in a task: with the request's bytes, or with the iterator over requests."""
        self._calls.add(self)
        self.task = asyncio.get_running_loop().create_task(self._run(request))
        self.task.add_done_callback(self._served)

    def stop(self) -> None:
        """The server waits for it no longer."""
        if self.task is not None:
            self.task.cancel()
        else:  # its message has not come
            self._calls.discard(self)
            self._cut_off()

    def _served(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(self)
        if task.cancelled():  # before it began
            self._cut_off()

    def _cut_off(self) -> None:
        """Nothing is sent where the caller hung up."""
        status = cut_off()
        self.end(status.code, status.details, status.trailing_metadata or ())

    async def _run(self, request: bytes | AsyncIterator[Any]) -> None:
        handler = self.handler
        try:
            parsed = self.parsed(request) if isinstance(request, bytes) else request
            if not handler.response_streaming:
                method = handler.stream_unary if handler.request_streaming else handler.unary_unary
                reply = handler.response_serializer(await method(parsed, self))
                self.end(grpc.StatusCode.OK, reply=reply)
                return
            replies = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(parsed, self)
            if hasattr(replies, "__aiter__"):
                async for reply in replies:
                    await self.write(reply)
            else:
                await replies  # it writes by itself
            self.end(grpc.StatusCode.OK)
        except _Ended:
            pass
        except asyncio.CancelledError:
            self._cut_off()
        except Exception as error:  # a defect of ours: logged whole, reported without internals
            log.exception("%s failed", self.path)
            self.end(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}")


class Methods:
    """What serves each path, `/package.Service/Method`."""

    def __init__(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        self._handlers = handlers
        self._known: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}

    def find(self, path: str) -> grpc.RpcMethodHandler[Any, Any] | None:
        """None where there is no such method."""
        if path not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            details = _MethodDetails(path)
            self._known[path] = next(filter(None, (handler.service(details) for handler in self._handlers)), None)
        return self._known[path]


class _MethodDetails(grpc.HandlerCallDetails):
    """What a generic handler is asked with."""

    def __init__(self, path: str) -> None:
        self.method = path
        self.invocation_metadata = ()
