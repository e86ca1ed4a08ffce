"""A gRPC server for asyncio on grpcio's own core: what `grpc.aio.server` does for this project at a quarter of its price.

`grpc.aio` spends 260 µs of CPU time on a unary call, most of it on tasks and futures of its own; this one 70 µs at 64 calls
at a time, and its replies leave together, which spares clients as much (measured in docs/speed.md). Handlers are the same, and
get a `Call` for a context.

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
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs stop at grpcio's public face

from openbook_server.call import NO_REQUEST, NO_SUCH_METHOD, Call, Metadata, Methods, seconds_left, too_many

log = logging.getLogger(__name__)

EXPECTED = 16  # calls that the core may hand over before it is asked for more
EVENTS_A_TURN = 64  # taken before whatever else the loop has to do gets its turn
_LAST_WORD = 0.1  # seconds in which those who watch health hear that the server stops
_LATE = 1.0  # seconds in which those whose calls are cut off hear why
_FLAGS = 0

Otherwise = Callable[["CoreCall", set[Any]], None]
Refusal = Callable[[str, float | None, float], grpc.Status | None]


class RpcServer:
    """Serves handlers on one port, on the event loop it is started on."""

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler[Any, Any]],
        *,
        options: Sequence[tuple[str, int]],
        max_calls: int,
        otherwise: Otherwise | None = None,
    ) -> None:
        """Serve the methods of `handlers`.

        Args:
            options: channel arguments of gRPC, by name.
            max_calls: at once; further ones are told to come back.
            otherwise: takes the calls of methods that no handler has, and the set that each must be in while it lasts, with a `stop` as
                `Call` has.
        """
        self._methods, self._max_calls, self._otherwise = Methods(handlers), max_calls, otherwise
        self._too_many = too_many(max_calls)
        self._queue = cygrpc.CompletionQueue()
        self._core = cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._drained = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._wait, name="grpc", daemon=True)
        self._stopping = False
        self._behind: float | None = None  # since when more calls come in than the loop keeps up with; monotonic
        # What a call gets unread, None where it is served: by its path, the seconds that its caller still waits (None = for ever), and the
        # seconds for which more calls have been coming in than the loop keeps up with.
        self.refusal: Refusal = lambda path, left, lag: None
        self.calls: set[Any] = set()  # that are being served

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
        """Take no more calls; those that run get `grace` seconds, then they are cut off; those of health and reflection before."""
        if self._stopping:
            return
        self._stopping = True
        stopped = self._loop.create_future()
        self._core.shutdown(self._queue, lambda event: stopped.set_result(None))
        done, _ = await asyncio.wait([stopped], timeout=min(grace, _LAST_WORD))
        for call in list(self.calls):
            if isinstance(call, Call) and call.task and not call.is_waited_for:
                call.task.cancel()
        done, _ = await asyncio.wait([stopped], timeout=max(0.0, grace - _LAST_WORD))
        if not done:
            for call in list(self.calls):
                call.stop()
            done, _ = await asyncio.wait([stopped], timeout=_LATE)
        if not done:  # some callers read nothing
            self._core.cancel_all_calls()
            await stopped
        await asyncio.gather(*(call.task for call in self.calls if isinstance(call, Call) and call.task), return_exceptions=True)
        self._core.destroy()
        self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)

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
        for _ in range(EVENTS_A_TURN):
            if event is None:
                event = self._queue.poll(deadline=0.0)  # a time that has passed: what is there, or nothing
            if event.completion_type in (cygrpc.CompletionType.queue_timeout, cygrpc.CompletionType.queue_shutdown):
                self._behind = None
                self._drained.release()
                return
            try:
                event.tag(event)
            except Exception:  # of one call; the others must go on
                log.exception("a call failed in its transport")
            event = None
        self._behind = self._behind or time.monotonic()
        self._loop.call_soon(self._drain)

    def _begin(self, event: Any) -> None:
        """A call came in, or, when the server stops, none will."""
        if not event.success or not event.call_details.method:
            return
        if not self._stopping:
            self._expect()
        call = CoreCall(event)
        handler = self._methods.find(call.path)
        if handler is None and self._otherwise is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED.value[0], NO_SUCH_METHOD)
        elif status := self._refusal(call):
            call.end(status.code.value[0], status.details, status.trailing_metadata)
        elif handler is not None:
            _ServedCall(call, handler, self.calls).begin()
        elif self._otherwise is not None:
            self._otherwise(call, self.calls)

    def _refusal(self, call: CoreCall) -> grpc.Status | None:
        if len(self.calls) >= self._max_calls:
            return self._too_many
        return self.refusal(call.path, seconds_left(call.deadline), time.monotonic() - self._behind if self._behind else 0.0)


class CoreCall:
    """A call as the core knows it: its messages and its status, by callbacks."""

    def __init__(self, event: Any) -> None:
        method: bytes = event.call_details.method
        self.path = method.decode(errors="replace")
        self.deadline: float = event.call_details.deadline  # of time.time()
        self._core = event.call
        self._answered = self._ended = False

    def watch(self, closed: Callable[[bool], None]) -> None:
        """Have `closed` called when the call is over on the wire: with False where it was answered, with True where the caller or its
        deadline gave it up."""

        def over(event: Any) -> None:
            cancelled = bool(event.batch_operations[0].cancelled())
            self._ended = self._ended or cancelled
            closed(cancelled)

        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_FLAGS),), over)

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Read a message; None where no more will come. One at a time."""
        self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_FLAGS),), lambda event: then(event.batch_operations[0].message()))

    def send(self, message: bytes, then: Callable[[bool], None]) -> None:
        """Write a message; `then` hears whether it left. One at a time."""
        operations = (*self._opening(), cygrpc.SendMessageOperation(message, _FLAGS))
        self._core.start_server_batch(operations, lambda event: then(event.success))

    def end(self, code: int, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
        """Send the status, after the only reply where there is one; nothing if the call is over."""
        if self._ended:
            return
        self._ended = True
        message = () if reply is None else (cygrpc.SendMessageOperation(reply, _FLAGS),)
        status = cygrpc.SendStatusFromServerOperation(tuple(trailing_metadata), code, details.encode(), _FLAGS)
        self._core.start_server_batch((*self._opening(), *message, status), _nothing)

    @property
    def ended(self) -> bool:
        return self._ended

    def _opening(self) -> tuple[Any, ...]:
        if self._answered:
            return ()
        self._answered = True
        return (cygrpc.SendInitialMetadataOperation((), _FLAGS),)


class _ServedCall(Call):
    """A call that a handler of this process serves."""

    def __init__(self, wire: CoreCall, handler: Any, calls: set[Any]) -> None:
        super().__init__(wire.path, handler, wire.deadline, calls)
        self._wire = wire

    def begin(self) -> None:
        """Read the request, where there is only one, and serve the call."""
        self._calls.add(self)
        self._wire.watch(self._closed)
        if self.handler.request_streaming:
            self.serve(self.requests())
        else:
            self._wire.receive(self._received)

    async def write(self, reply: Any) -> None:
        sent = asyncio.get_running_loop().create_future()
        self._wire.send(self.handler.response_serializer(reply), _resolver(sent))
        if not await sent:
            raise asyncio.CancelledError  # the caller is gone

    def end(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
        self._wire.end(code.value[0], details, trailing_metadata, reply)

    async def requests(self) -> AsyncIterator[Any]:
        while True:
            received = asyncio.get_running_loop().create_future()
            self._wire.receive(_resolver(received))
            message = await received
            if message is None:
                return
            yield self.parsed(message)

    def _closed(self, cancelled: bool) -> None:
        if not cancelled:
            return
        if self.task is None:
            self._calls.discard(self)
        else:
            self.task.cancel()

    def _received(self, message: bytes | None) -> None:
        if self._wire.ended:
            return
        if message is not None:
            self.serve(message)
        else:
            self._calls.discard(self)
            self.end(grpc.StatusCode.INTERNAL, NO_REQUEST)


def _resolver(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def resolve(value: Any) -> None:
        if not future.done():
            future.set_result(value)

    return resolve


def _nothing(event: Any) -> None:
    """Of operations whose end nobody waits for."""
