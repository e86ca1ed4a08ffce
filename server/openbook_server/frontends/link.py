"""A front end's side: forwards the calls of its port to the engine, message by message, and ends them when the engine is gone.

Bounded: a call has at most `WINDOW` messages under way in each direction, and when the engine has not read `MAX_WAITING_BYTES`
of what was sent, further calls and messages are refused until it has.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from openbook_server.call import cut_off
from openbook_server.errors import NotServing, OpenBookError, Overloaded
from openbook_server.frontends.records import WINDOW, Connection, Ending, Kind, Opening
from openbook_server.rpc import CoreCall
from openbook_server.status import grpc_status

MAX_WAITING_BYTES = 64 * 1024 * 1024  # for the engine to read
_RETRY_SECONDS = 1.0
_NUMBERS = 1 << 32


class Link:
    """The connection to the engine, whichever process that is at the moment."""

    def __init__(self, path: Path, told: Callable[[bool], Awaitable[None]], stopping: asyncio.Event, *, max_message_bytes: int) -> None:
        """Args:
        path: of the Unix socket that engines answer on.
        told: is told whether the engine answers requests, whenever that changes.
        stopping: set when the server drains, and no engine will follow.
        """
        self._path, self._told, self._stopping, self._max_message_bytes = path, told, stopping, max_message_bytes
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._ready = self._answering = False
        self._refused = 0
        self.connection: Connection | None = None  # once the engine has said something
        self.calls: dict[int, _ForwardedCall] = {}

    async def run(self) -> None:
        """Keep the connection up, for ever."""
        loop = asyncio.get_running_loop()
        telling = asyncio.ensure_future(self._tell())
        try:
            while True:
                lost = asyncio.Event()

                def protocol(lost: asyncio.Event = lost) -> Connection:
                    return Connection(self._heard, lambda _: lost.set(), max_message_bytes=self._max_message_bytes)

                # The supervisor listens: whichever engine is there next will answer.
                _, connection = await loop.create_unix_connection(protocol, str(self._path))
                try:
                    await lost.wait()
                finally:
                    connection.close()
                self._engine_lost()
        finally:
            telling.cancel()

    def forward(self, wire: CoreCall, calls: set[Any]) -> None:
        """Have the engine serve a call; `calls` holds it as long as it lasts. What `RpcServer` calls with what it has no handler for."""
        if self.connection is None:
            self._refuse(wire, self._no_engine("the engine is being started; try again in 1 s"))
        elif (overload := self.overload()) is not None:
            self._refuse(wire, overload)
        else:
            number = next(self._numbers) % _NUMBERS
            while number in self.calls:
                number = next(self._numbers) % _NUMBERS
            _ForwardedCall(self, self.connection, wire, number, calls).begin()

    def overload(self) -> Ending | None:
        """What calls and their messages get while the engine does not keep up; None while it does."""
        waiting = self.connection.waiting_bytes if self.connection is not None else 0
        if waiting <= MAX_WAITING_BYTES:
            return None
        problem = f"the engine has not read {waiting} bytes of earlier calls, more than {MAX_WAITING_BYTES}; try again in 1 s"
        return _ending(Overloaded(problem, _RETRY_SECONDS))

    def count_refused(self) -> None:
        """A call got its status from here."""
        self._refused += 1
        self._count()

    def _refuse(self, wire: CoreCall, ending: Ending) -> None:
        _end(wire, ending)
        self.count_refused()

    def _no_engine(self, problem: str) -> Ending:
        return _as_ending(cut_off()) if self._stopping.is_set() else _ending(NotServing(problem, _RETRY_SECONDS))

    def _count(self) -> None:
        if self.connection is not None:
            self.connection.send(Kind.REFUSED, 0, self._refused.to_bytes(8, "little"))

    def _heard(self, connection: Connection, kind: int, number: int, content: bytes) -> None:
        if kind == Kind.READINESS:
            if self.connection is None:
                self.connection = connection
                self._count()
            self._set(ready=bool(content[0]))
        elif (call := self.calls.get(number)) is None:
            return  # its caller hung up meanwhile
        elif kind == Kind.MESSAGE:
            call.reply(content)
        elif kind == Kind.ROOM:
            call.give_room()
        elif kind == Kind.ENDING:
            call.finish(Ending.decoded(content))

    def _engine_lost(self) -> None:
        self.connection = None
        self._set(ready=False)
        problem = "the engine ended before it answered, and is being started again; try again in 1 s (a write may have been done or not)"
        lost = self._no_engine(problem)
        self._refused += len(self.calls)
        for call in list(self.calls.values()):
            call.finish(lost)

    def _set(self, *, ready: bool) -> None:
        self._ready = ready
        self._changed.set()

    async def _tell(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._answering != self._ready:
                self._answering = self._ready
                await self._told(self._answering)


class _ForwardedCall:
    """One call on its way: nothing here waits, whoever has something to say calls."""

    def __init__(self, link: Link, engine: Connection, wire: CoreCall, number: int, calls: set[Any]) -> None:
        self._link, self._engine, self._wire, self._number, self._calls = link, engine, wire, number, calls
        self._begun = self._over = self._receiving = self._sending = False
        self._room = WINDOW  # for messages, at the engine
        self._untold: list[bytes | None] = []  # messages that it has not been sent; None = no other will come
        self._came = 0.0  # when the first of them was read; of time.monotonic()
        self._replies: deque[bytes] = deque()  # that have not left; at most WINDOW
        self._ending: Ending | None = None

    def begin(self) -> None:
        """Wait for the caller's first message."""
        self._calls.add(self)
        self._link.calls[self._number] = self
        self._wire.watch(self._closed)
        self._receive()

    def give_room(self) -> None:
        """The engine took a message."""
        self._room += 1
        self._receive()

    def reply(self, message: bytes) -> None:
        """One of several replies."""
        self._replies.append(message)
        self._send()

    def finish(self, ending: Ending) -> None:
        """The last word on it; replies that have not left go first."""
        self._forget()
        self._ending = ending
        self._send()

    def stop(self) -> None:
        """As `Call.stop`."""
        self._give_up(_as_ending(cut_off()))

    def _give_up(self, ending: Ending) -> None:
        """The last word on it is not the engine's, which need not go on."""
        if self._begun and self._number in self._link.calls:
            self._engine.send(Kind.CANCEL, self._number)
        self.finish(ending)

    def _receive(self) -> None:
        if self._room and not self._receiving and not self._over:
            self._receiving = True
            self._wire.receive(self._received)

    def _received(self, message: bytes | None) -> None:
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append(message)
        self._came = self._came or time.monotonic()
        self._receiving, self._over = False, message is None
        self._room -= 1
        self._receive()

    def _tell(self) -> None:
        """Tell the engine what came in a turn of the event loop: of most calls, all that will ever come."""
        untold, self._untold = self._untold, []
        if self._wire.ended or self._number not in self._link.calls:
            return
        if any(untold) and (overload := self._link.overload()) is not None:
            self._link.count_refused()
            self._give_up(overload)
            return
        if not self._begun:
            self._begun = True
            first, *untold = untold
            only = first is None or untold == [None]
            opening = Opening(self._wire.path, self._wire.deadline, self._came, first, only)
            self._engine.send(Kind.CALL, self._number, *opening.encoded())
            untold = [] if only else untold
        for message in untold:
            if message is not None:
                self._engine.send(Kind.MESSAGE, self._number, message)
            else:
                self._engine.send(Kind.LAST, self._number)

    def _send(self) -> None:
        """One at a time, in order."""
        if self._sending:
            return
        if self._replies:
            self._sending = True
            self._wire.send(self._replies.popleft(), self._sent)
        elif self._ending is not None:
            _end(self._wire, self._ending)

    def _sent(self, success: bool) -> None:
        self._sending = False
        if success:
            if self._ending is None:
                self._engine.send(Kind.ROOM, self._number)
            self._send()

    def _closed(self, cancelled: bool) -> None:
        self._calls.discard(self)
        if self._forget() and self._begun:
            self._engine.send(Kind.CANCEL, self._number)

    def _forget(self) -> bool:
        """Whether it was still known."""
        return self._link.calls.pop(self._number, None) is not None


def _ending(error: OpenBookError) -> Ending:
    """Of a call that the engine does not see, or will not answer."""
    return _as_ending(grpc_status(error))


def _as_ending(status: grpc.Status) -> Ending:
    return Ending(status.code.value[0], status.details, status.trailing_metadata or ())


def _end(wire: CoreCall, ending: Ending) -> None:
    wire.end(ending.code, ending.details, ending.trailing_metadata, ending.reply)
