"""Request bytes to messages, with invalid UTF-8 pinned to the text that holds it.

protobuf rejects a whole message for one bad string and names neither. Clients in C, C++ or by hand do send such
strings; here the bad text is taken out and named, so that the others are served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from openbook_server.errors import InvalidRequest

Request = TypeVar("Request", bound=Message)
_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> bytes


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Request]):
    """A request as it came off the wire: the message with texts that are not UTF-8 emptied, and which those are."""

    message: Request
    not_utf8: frozenset[tuple[str, int]]  # (field, index)
    failure: InvalidRequest | None = None


def parser(kind: type[Request], max_message_bytes: int) -> Callable[[bytes], Parsed[Request]]:
    """A gRPC request deserialiser that never raises: failures travel to the service, which words them."""

    def parse(data: bytes) -> Parsed[Request]:
        if len(data) > max_message_bytes:
            return Parsed(
                kind(),
                frozenset(),
                InvalidRequest("request", f"{len(data)} bytes exceed the limit of {max_message_bytes}; send fewer texts a message"),
            )
        try:
            return Parsed(kind.FromString(data), frozenset())
        except DecodeError:
            pass
        try:
            repaired, bad = _empty_bad_strings(data, kind)
            return Parsed(kind.FromString(repaired), frozenset(bad))
        except (DecodeError, ValueError):
            return Parsed(kind(), frozenset(), InvalidRequest("request", f"the bytes are no {kind.DESCRIPTOR.full_name} message"))

    return parse


def _empty_bad_strings(data: bytes, kind: type[Message]) -> tuple[bytes, list[tuple[str, int]]]:
    strings = {field.number: field.name for field in kind.DESCRIPTOR.fields if field.type == FieldDescriptor.TYPE_STRING}
    seen = dict.fromkeys(strings, 0)
    bad: list[tuple[str, int]] = []
    parts = []
    for tag, number, start, payload, end in _fields(data):
        part = data[start:end]
        if number in strings:
            try:
                data[payload:end].decode()
            except UnicodeDecodeError:
                bad.append((strings[number], seen[number]))
                part = tag + b"\0"
            seen[number] += 1
        parts.append(part)
    return b"".join(parts), bad


def _fields(data: bytes) -> Iterator[tuple[bytes, int, int, int, int]]:
    """(tag bytes, field number, start, payload start, end) of each top-level field; ValueError where the bytes run out."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        tag, kind = data[start:at], key & 7
        if kind == _LENGTH_DELIMITED:
            size, at = _varint(data, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        elif kind == 0:
            _, after = _varint(data, at)
            size = after - at
        else:
            raise ValueError("wire type not in use")
        if at + size > len(data):
            raise ValueError("truncated message")
        yield tag, key >> 3, start, at, at + size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("truncated or overlong number")
