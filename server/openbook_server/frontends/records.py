"""What front ends and the engine say to each other: records on a Unix socket, all of one turn of the event loop in one write.

A record is a header (size of what follows, number of the call, kind), then its content. Each side trusts the other to be of the
same version, for one supervisor started both, but not to be well: a record beyond the limit ends the connection.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from openbook_server.call import Metadata

WINDOW = 4  # messages of a stream that may be under way in one direction
_HEADER = struct.Struct("<IIB")
_OPENING = struct.Struct("<dd??H")
_ENDING = struct.Struct("<B?HI")
_PAIR = struct.Struct("<HI")
OVERHEAD = 1 << 20  # bytes of a record beside its message: path, details, metadata


class Kind(IntEnum):
    """What a record tells."""

    CALL = 0  # front end: a call, with its first message
    MESSAGE = 1  # front end: a further message; engine: one of several replies
    LAST = 2  # front end: no further message will come
    CANCEL = 3  # front end: nobody waits for the call any more
    ROOM = 4  # both: one of the messages was taken, another may come
    ENDING = 5  # engine: the call's status, with the only reply where there is one
    READINESS = 6  # engine: whether it answers requests (call 0)
    REFUSED = 7  # front end: calls it ended itself so far (call 0)


class Opening(NamedTuple):
    """How a call begins."""

    path: str
    deadline: float  # of time.time()
    received: float  # of time.monotonic(), which is one clock for all processes of a machine
    message: bytes | None  # None = the caller sent none, and will send none
    only: bool  # no other will come, as is known already

    def encoded(self) -> tuple[bytes, ...]:
        path = self.path.encode()
        head = _OPENING.pack(self.deadline, self.received, self.message is not None, self.only, len(path))
        return (head, path) if self.message is None else (head, path, self.message)

    @classmethod
    def decoded(cls, content: bytes) -> Opening:
        deadline, received, has_message, only, size = _OPENING.unpack_from(content)
        at = _OPENING.size + size
        return cls(content[_OPENING.size : at].decode(), deadline, received, content[at:] if has_message else None, only)


class Ending(NamedTuple):
    """How a call ends."""

    code: int
    details: str = ""
    trailing_metadata: Metadata = ()
    reply: bytes | None = None

    def encoded(self) -> tuple[bytes, ...]:
        details = self.details.encode()
        parts = [_ENDING.pack(self.code, self.reply is not None, len(self.trailing_metadata), len(details)), details]
        for key, value in self.trailing_metadata:
            name, data = key.encode(), value.encode() if isinstance(value, str) else value
            parts += (_PAIR.pack(len(name), len(data)), name, data)
        return (*parts, self.reply) if self.reply is not None else tuple(parts)

    @classmethod
    def decoded(cls, content: bytes) -> Ending:
        code, has_reply, pairs, size = _ENDING.unpack_from(content)
        at = _ENDING.size + size
        details = content[_ENDING.size : at].decode()
        metadata: list[tuple[str, str | bytes]] = []
        for _ in range(pairs):
            name_size, data_size = _PAIR.unpack_from(content, at)
            at += _PAIR.size
            name = content[at : at + name_size].decode()
            data = content[at + name_size : at + name_size + data_size]
            metadata.append((name, data if name.endswith("-bin") else data.decode()))
            at += name_size + data_size
        return cls(code, details, metadata, content[at:] if has_reply else None)


class Connection(asyncio.Protocol):
    """One end of the socket."""

    def __init__(
        self,
        heard: Callable[[Connection, int, int, bytes], None],
        lost: Callable[[Connection], None],
        *,
        opened: Callable[[Connection], None] = lambda connection: None,
        max_message_bytes: int,
    ) -> None:
        """Args:
        heard: is told of each record: kind, number of the call, content.
        opened, lost: are told when the connection is there, and when it is not any more.
        """
        self._heard, self._lost, self._opened = heard, lost, opened
        self._limit = max_message_bytes + OVERHEAD
        self._received = bytearray()
        self._parts: list[bytes] = []
        self._bytes = 0
        self._transport: asyncio.Transport | None = None

    def send(self, kind: Kind, call: int, *content: bytes) -> None:
        """Write a record when this turn of the event loop is over; to nobody if the connection is lost."""
        if self._transport is None:
            return
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        size = sum(map(len, content))
        self._parts += (_HEADER.pack(size, call, kind), *content)
        self._bytes += size

    @property
    def waiting_bytes(self) -> int:
        """That the other side has not read yet, without what the kernel holds."""
        return self._bytes + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def close(self) -> None:
        """When all that was sent has left."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport
        self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._parts.clear()
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        at, there = 0, len(self._received)
        with memoryview(self._received) as view:
            while there - at >= _HEADER.size:
                size, call, kind = _HEADER.unpack_from(view, at)
                if size > self._limit:
                    raise ValueError(f"a record of {size} bytes exceeds the limit of {self._limit}")  # asyncio logs it and hangs up
                end = at + _HEADER.size + size
                if end > there:
                    break
                self._heard(self, kind, call, bytes(view[at + _HEADER.size : end]))
                at = end
        del self._received[:at]

    def _flush(self) -> None:
        if self._transport is not None and self._parts:
            self._transport.write(b"".join(self._parts))
        self._parts.clear()
        self._bytes = 0
