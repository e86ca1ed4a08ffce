"""The engine's side: serves the calls that front ends forward, with the handlers that its own port would have.

A front end that is lost takes its calls with it: they are cancelled, as if their callers had hung up.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from openbook_server.call import NO_REQUEST, NO_SUCH_METHOD, Call, Metadata, Methods, too_many
from openbook_server.frontends.records import OVERHEAD, WINDOW, Connection, Ending, Kind, Opening
from openbook_server.listening import Handlers
from openbook_server.rpc import Refusal

BACKLOG = 1_024  # front ends that may wait for an engine, those that died meanwhile included
_LATE = 5.0  # seconds that the last replies may take to leave


class Relay:
    """Serves handlers to front ends, on the event loop it is started on."""

    def __init__(self, handlers: Handlers, *, max_calls: int, max_message_bytes: int) -> None:
        """Args:
        max_calls: at once, of all front ends together; further ones are told to come back.
        """
        self._methods, self._max_calls, self._max_message_bytes = Methods(handlers), max_calls, max_message_bytes
        self._too_many = too_many(max_calls)
        self._front_ends: dict[Connection, _FrontEnd] = {}
        self._alone = asyncio.Event()  # no front end is connected
        self._alone.set()
        self._server: asyncio.Server | None = None
        self._ready = False
        self._refused = 0  # by front ends that are gone
        # As `RpcServer.refusal`: front ends have read the calls, but nothing is parsed yet.
        self.refusal: Refusal = lambda path, left, lag: None
        self.calls: set[Any] = set()  # that are being served

    async def listen(self, at: socket.socket) -> None:
        """Take front ends from now on, on a Unix socket that listens."""

        def connection() -> Connection:
            return Connection(self._heard, self._lost, opened=self._opened, max_message_bytes=self._max_message_bytes)

        self._server = await asyncio.get_running_loop().create_unix_server(connection, sock=at, backlog=BACKLOG)

    def tell(self, *, ready: bool) -> None:
        """Tell all front ends, and those to come, whether requests are answered."""
        self._ready = ready
        for front_end in self._front_ends:
            front_end.send(Kind.READINESS, 0, bytes([ready]))

    async def stop(self, grace: float) -> None:
        """Calls that run get `grace` seconds, those of reflection none, then they are cut off; all replies leave."""
        if self._server is None:
            return
        running = [call.task for call in self.calls if call.task is not None and call.is_waited_for]
        if running:
            await asyncio.wait(running, timeout=grace)
        for call in list(self.calls):
            call.stop()
        await asyncio.gather(*(call.task for call in self.calls), return_exceptions=True)
        self._server.close()
        self._server = None
        for front_end in list(self._front_ends):
            front_end.close()
        with suppress(TimeoutError):  # of a front end that is stuck
            await asyncio.wait_for(self._alone.wait(), _LATE)

    @property
    def front_ends(self) -> int:
        """That are connected."""
        return len(self._front_ends)

    @property
    def waiting_bytes(self) -> int:
        """That front ends have not read yet."""
        return sum(front_end.waiting_bytes for front_end in self._front_ends)

    @property
    def refused(self) -> int:
        """Calls that front ends ended by themselves, for the engine was away or did not keep up."""
        return self._refused + sum(front_end.refused for front_end in self._front_ends.values())

    def _opened(self, front_end: Connection) -> None:
        self._front_ends[front_end] = _FrontEnd()
        self._alone.clear()
        front_end.send(Kind.READINESS, 0, bytes([self._ready]))

    def _lost(self, front_end: Connection) -> None:
        gone = self._front_ends.pop(front_end)
        self._refused += gone.refused
        for call in list(gone.calls.values()):
            call.cancel()
        if not self._front_ends:
            self._alone.set()

    def _heard(self, front_end: Connection, kind: int, number: int, content: bytes) -> None:
        state = self._front_ends[front_end]
        if kind == Kind.CALL:
            self._begin(front_end, state, number, content)
        elif kind == Kind.REFUSED:
            state.refused = int.from_bytes(content, "little")
        elif (call := state.calls.get(number)) is None:
            return  # it ended meanwhile
        elif kind == Kind.CANCEL:
            call.cancel()
        elif kind == Kind.ROOM:
            call.give_room()
        else:
            call.hear(content if kind == Kind.MESSAGE else None)

    def _begin(self, front_end: Connection, state: _FrontEnd, number: int, content: bytes) -> None:
        opening = Opening.decoded(content)
        handler = self._methods.find(opening.path)
        call = _RelayedCall(opening, handler, self.calls, front_end, state.calls, number, self._max_message_bytes)
        if handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, NO_SUCH_METHOD)
        elif status := self._refusal(call, opening):
            call.end(status.code, status.details, status.trailing_metadata or ())
        elif handler.request_streaming:
            call.hear(opening.message)
            if opening.only:
                call.hear(None)
            call.serve(call.requests())
        elif opening.message is None:
            call.end(grpc.StatusCode.INTERNAL, NO_REQUEST)
        else:
            call.serve(opening.message)

    def _refusal(self, call: _RelayedCall, opening: Opening) -> grpc.Status | None:
        if len(self.calls) >= self._max_calls:
            return self._too_many
        return self.refusal(call.path, call.time_remaining(), time.monotonic() - opening.received)


class _FrontEnd:
    """What is known of one."""

    def __init__(self) -> None:
        self.calls: dict[int, _RelayedCall] = {}
        self.refused = 0


class _RelayedCall(Call):
    """A call that a front end forwards."""

    def __init__(
        self,
        opening: Opening,
        handler: Any,
        calls: set[Any],
        front_end: Connection,
        numbered: dict[int, _RelayedCall],
        number: int,
        max_message_bytes: int,
    ) -> None:
        super().__init__(opening.path, handler, opening.deadline, calls)
        self._front_end, self._numbered, self._number, self._limit = front_end, numbered, number, max_message_bytes
        self._ended = False
        # Most calls are of one message and one reply, and need neither.
        self._messages: asyncio.Queue[bytes | None] | None = None  # that the handler has not taken; at most WINDOW
        self._room: asyncio.Semaphore | None = None  # for replies, at the front end
        if handler is not None and handler.request_streaming:
            self._messages = asyncio.Queue()
        if handler is not None and handler.response_streaming:
            self._room = asyncio.Semaphore(WINDOW)
        numbered[number] = self

    def hear(self, message: bytes | None) -> None:
        """A message came; None = no other will."""
        if self._messages is not None:
            self._messages.put_nowait(message)

    def give_room(self) -> None:
        """The front end took a reply."""
        if self._room is not None:
            self._room.release()

    async def write(self, reply: Any) -> None:
        assert self._room is not None  # noqa: S101
        await self._room.acquire()
        data = self.handler.response_serializer(reply)
        if len(data) > self._limit:
            await self.abort(*self._too_large(len(data)))
        self._front_end.send(Kind.MESSAGE, self._number, data)

    def end(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
        if self._ended:
            return
        if reply is not None and len(reply) > self._limit:
            (code, details), reply = self._too_large(len(reply)), None
        parts = Ending(code.value[0], details, trailing_metadata, reply).encoded()
        if (size := sum(map(len, parts))) > self._limit + OVERHEAD:  # the front end would hang up, and end all other calls
            code, details = self._too_large(size)
            parts = Ending(code.value[0], details).encoded()
        self._forget()
        self._front_end.send(Kind.ENDING, self._number, *parts)

    async def requests(self) -> AsyncIterator[Any]:
        assert self._messages is not None  # noqa: S101
        while (message := await self._messages.get()) is not None:
            self._front_end.send(Kind.ROOM, self._number)
            yield self.parsed(message)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._forget()
        if self.task is not None:
            self.task.cancel()

    def _forget(self) -> None:
        self._ended = True
        self._numbered.pop(self._number, None)

    def _too_large(self, size: int) -> tuple[grpc.StatusCode, str]:
        # "Larger than max" is what gRPC says of such a message, and how clients tell it from one too many.
        said = f"the reply is larger than max: {size} bytes exceed the limit of {self._limit}; ask for less"
        return grpc.StatusCode.RESOURCE_EXHAUSTED, said
