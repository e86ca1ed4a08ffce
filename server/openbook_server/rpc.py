"""A gRPC server for asyncio on grpcio's own core: what `grpc.aio.server` does for this project at a quarter of its price.

`grpc.aio` spends 260 µs of CPU time on a unary call, most of it on tasks and futures of its own; this one 70 µs at 64 calls
at a time, and its replies leave together, which spares clients as much (measured in docs/speed.md). Handlers are the same:
`grpc.RpcMethodHandler`s of coroutines and asynchronous generators, which get a `Call` for a context.

One thread waits for the core. When it has an event, the event loop takes that and all that are ready by then, and only when
none is left does the thread wait again: so the two never fight for the interpreter, and the busier the server is the fewer
times they take turns.

The core's Python module is not public API: pyproject.toml bounds grpcio to versions that the tests ran with.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs stop at grpcio's public face

log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]

EXPECTED = 16  # calls that the core may hand over before it is asked for more
TURN = 64  # events taken before whatever else the loop has to do gets its turn
_FLAGS = 0
_NEVER = 1e12  # seconds of time.time(): the core writes no deadline as a very late one
_OK = grpc.StatusCode.OK


class _Ended(Exception):
    """The call has its status; whoever serves it need not go on."""


class RpcServer:
    """Serves handlers on one port, on the event loop it is started on."""

    def __init__(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]], *, options: Sequence[tuple[str, int]], max_calls: int) -> None:
        """Serve the methods of `handlers`.

        Args:
            options: channel arguments of gRPC, by name.
            max_calls: at once; further ones get RESOURCE_EXHAUSTED.
        """
        self._handlers, self._max_calls = handlers, max_calls
        self._methods: dict[bytes, grpc.RpcMethodHandler[Any, Any]] = {}  # those that were asked for
        self._queue = cygrpc.CompletionQueue()
        self._core = cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._drained = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._wait, name="grpc", daemon=True)
        self._stopping = False
        self.calls: set[Call] = set()  # that are being served

    def listen(self, address: str) -> int:
        """Open a port, `HOST:PORT` with 0 for any; returns it. Without encryption.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            port = self._core.add_http2_port(address.encode())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        if not port:
            raise OSError(f"cannot listen on {address}")
        return int(port)

    def start(self) -> None:
        """Take calls from now on."""
        self._loop = asyncio.get_running_loop()
        self._core.start()
        for _ in range(EXPECTED):
            self._expect()
        self._thread.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls; those that run get `grace` seconds, then they are cancelled."""
        if self._stopping:
            return
        self._stopping = True
        stopped = self._loop.create_future()
        self._core.shutdown(self._queue, lambda event: stopped.set_result(None))
        done, _ = await asyncio.wait([stopped], timeout=grace)
        if not done:
            self._core.cancel_all_calls()
            await stopped
        await asyncio.gather(*(call.task for call in self.calls if call.task), return_exceptions=True)
        self._core.destroy()
        self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)

    def method(self, path: bytes) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What serves `/package.Service/Method`."""
        if path not in self._methods:
            details = _Details(path.decode(errors="replace"))
            found = next(filter(None, (handler.service(details) for handler in self._handlers)), None)
            if found is None:
                return None
            self._methods[path] = found
        return self._methods[path]

    def _expect(self) -> None:
        self._core.request_call(self._queue, self._queue, self._begin)

    def _wait(self) -> None:
        """The thread's work: wait for an event, hand over, wait until the loop has taken all there are."""
        while True:
            event = self._queue.poll()
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                self._loop.call_soon_threadsafe(self._drain, event)
            except RuntimeError:  # the loop was closed; there is nobody to tell
                return
            del event  # the core cannot let go of a call that we hold, and waits for it
            self._drained.acquire()

    def _drain(self, event: Any = None) -> None:
        for _ in range(TURN):
            if event is None:
                event = self._queue.poll(deadline=0.0)  # a time that has passed: what is there, or nothing
            if event.completion_type in (cygrpc.CompletionType.queue_timeout, cygrpc.CompletionType.queue_shutdown):
                self._drained.release()
                return
            try:
                event.tag(event)
            except Exception:  # of one call; the others must go on
                log.exception("a call failed in its transport")
            event = None
        self._loop.call_soon(self._drain)

    def _begin(self, event: Any) -> None:
        """A call came in, or, when the server stops, none will."""
        if not event.success or not event.call_details.method:
            return
        if not self._stopping:
            self._expect()
        call = Call(self, event)
        if call.handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method")
        elif len(self.calls) >= self._max_calls:
            call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_calls} calls are being served; try again")
        else:
            call.begin(self._loop)


class Call:
    """One call, and the context its handler gets: the part of `grpc.aio.ServicerContext` that is used here."""

    def __init__(self, server: RpcServer, event: Any) -> None:
        self._server, self._core = server, event.call
        self._deadline: float = event.call_details.deadline  # of time.time()
        self._path: bytes = event.call_details.method
        self.handler: Any = server.method(self._path)  # its functions are unions of all kinds to type checkers
        self.task: asyncio.Task[None] | None = None
        self._answered = self._ended = False

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the request, where there is only one, and serve the call."""
        self._loop = loop
        self._server.calls.add(self)
        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_FLAGS),), self._closed)
        if self.handler.request_streaming:
            self._serve(self._requests())
        else:
            self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_FLAGS),), self._received)

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None = it has none."""
        return None if self._deadline > _NEVER else max(0.0, self._deadline - time.time())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status."""
        self.end(code, details, trailing_metadata)
        raise _Ended

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with a status that has more to say."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    async def write(self, reply: Any) -> None:
        """Send one of several replies, when the ones before have left."""
        sent = self._loop.create_future()
        operations = (*self._opening(), cygrpc.SendMessageOperation(self.handler.response_serializer(reply), _FLAGS))
        self._core.start_server_batch(operations, _resolver(sent))
        if not (await sent).success:
            raise asyncio.CancelledError  # the caller is gone

    def end(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
        """Send the status, after the only reply where there is one."""
        if self._ended:
            return
        self._ended = True
        number: int = code.value[0]
        message = () if reply is None else (cygrpc.SendMessageOperation(reply, _FLAGS),)
        status = cygrpc.SendStatusFromServerOperation(tuple(trailing_metadata), number, details.encode(), _FLAGS)
        self._core.start_server_batch((*self._opening(), *message, status), _nothing)

    def _opening(self) -> tuple[Any, ...]:
        if self._answered:
            return ()
        self._answered = True
        return (cygrpc.SendInitialMetadataOperation((), _FLAGS),)

    def _closed(self, event: Any) -> None:
        """The call is over on the wire: answered, or given up by the caller or its deadline."""
        if event.batch_operations[0].cancelled():
            self._ended = True
            if self.task is None:
                self._server.calls.discard(self)
            else:
                self.task.cancel()

    def _received(self, event: Any) -> None:
        message = event.batch_operations[0].message()
        if message is not None:
            self._serve(message)
        elif not self._ended:
            self._server.calls.discard(self)
            self.end(grpc.StatusCode.INTERNAL, "this method takes one request, none came")

    def _serve(self, request: Any) -> None:
        if not self._ended:
            self.task = self._loop.create_task(self._run(request))
            self.task.add_done_callback(lambda task: self._server.calls.discard(self))  # also of one that never began

    async def _run(self, request: bytes | AsyncIterator[Any]) -> None:
        handler = self.handler
        try:
            parsed = handler.request_deserializer(request) if isinstance(request, bytes) else request
            if not handler.response_streaming:
                method = handler.stream_unary if handler.request_streaming else handler.unary_unary
                reply = handler.response_serializer(await method(parsed, self))
                self.end(_OK, reply=reply)
                return
            replies = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(parsed, self)
            if hasattr(replies, "__aiter__"):
                async for reply in replies:
                    await self.write(reply)
            else:
                await replies  # it writes by itself
            self.end(_OK)
        except _Ended:
            pass
        except asyncio.CancelledError:
            self.end(grpc.StatusCode.CANCELLED, "the server is shutting down")  # unless the caller hung up
        except Exception as error:  # a defect of ours: logged whole, reported without internals
            log.exception("%s failed", self._path.decode(errors="replace"))
            self.end(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}")

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            received = self._loop.create_future()
            self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_FLAGS),), _resolver(received))
            message = (await received).batch_operations[0].message()
            if message is None:
                return
            yield self.handler.request_deserializer(message)


class _Details(grpc.HandlerCallDetails):
    """What a generic handler is asked with."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


def _resolver(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def resolve(event: Any) -> None:
        if not future.done():
            future.set_result(event)

    return resolve


def _nothing(event: Any) -> None:
    """Of operations whose end nobody waits for."""
